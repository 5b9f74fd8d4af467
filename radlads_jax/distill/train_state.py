"""What training changes: the trained parameters, the optimizer's state and the counters of a stage."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from radlads_jax.models.tree import Params


class TrainState(NamedTuple):
    """step: batches seen, counted whether or not their update was taken. skipped, skipped_in_a_row: non-finite ones."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_a_row: jax.Array

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        # Each counter is its own buffer: donation refuses the same one twice.
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(step, params, optimizer.init(params), skipped, in_a_row)

    def advance(self, params: Params, opt_state: optax.OptState, finite: jax.Array) -> "TrainState":
        """The next state: updated where the step was finite, otherwise as it was but for the counters."""

        def choose(new, old):
            return jnp.where(finite, new, old)

        return TrainState(
            self.step + 1,
            jax.tree.map(choose, params, self.params),
            jax.tree.map(choose, opt_state, self.opt_state),
            self.skipped + jnp.where(finite, 0, 1),
            jnp.where(finite, 0, self.skipped_in_a_row + 1),
        )
