"""The teacher's weights over a run: when they are loaded, and when they leave memory."""

import jax

from radlads_jax.distill.program import StagePlan
from radlads_jax.models.tree import Params
from radlads_jax.run.job import Job


class TeacherWeights:
    """The teacher's weights, from when they are first asked for, by whatever part of a run asks first.

    params: what is loaded already, in the dtype it is run in. They are given up when a stage begins that has none.
    """

    def __init__(self, job: Job, params: Params | None = None):
        self.job, self._params = job, params

    def load_anew_for(self, job: Job) -> None:
        """For another job from here on, whose stacks are cut at other layers."""
        self.job, self._params = job, None

    def held(self) -> Params | None:
        """None where the student has no teacher."""
        if self._params is None and self.job.student.recurrent_mixer:
            self._params = self.job.load_teacher(self.job.run.teacher.dtype)
        return self._params

    def for_stage(self, plan: StagePlan) -> Params | None:
        """What the stage's step reads; where it reads none of the weights, they leave memory."""
        if plan.needs_weights:
            return self.held()
        if self._params is not None:
            # Whoever handed them over holds them still.
            for leaf in jax.tree.leaves(self._params):
                leaf.delete()
            self._params = None
        return None
