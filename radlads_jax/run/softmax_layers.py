"""Chooses a run's softmax layers, once, from its own text and its teacher, before the student is made."""

import dataclasses
import json
from typing import Any

from radlads_jax.data import pipeline
from radlads_jax.data.packing import Batch
from radlads_jax.distill.stages import STAGES
from radlads_jax.evaluation.layer_choice import Sizes, choose_for_run, table, windows
from radlads_jax.evaluation.swaps import Student
from radlads_jax.models.tree import Params
from radlads_jax.models.window import SPEC as WINDOW
from radlads_jax.porting.student import whole_student
from radlads_jax.run import choice_file, earlier_mixers
from radlads_jax.run.display import say, show
from radlads_jax.run.job import Job
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.system import hosts


def decide(job: Job, teacher: TeacherWeights) -> Job:
    """The job with its softmax layers chosen, for which the teacher's weights are loaded anew where they were.

    Every process takes part in the passes, the first one's choice is that of all.
    """
    if not job.to_choose:
        return job
    say(f"choosing {job.to_choose} of {job.teacher.num_layers} softmax layers by forward passes of the teacher")
    params = teacher.held()
    assert params is not None, "a student with layers to choose has a teacher"
    choice = choose_for_run(
        job.teacher,
        params,
        job.tokenizer,
        _texts(job),
        job.to_choose,
        student=_beside(job, params),
        seed=job.run.seed,
        batch_size=job.run.train.eval_batch_size,
        mesh=job.mesh,
        quiet=not hosts.is_first(),
    )
    choice = json.loads(hosts.said_by_first(json.dumps(choice)))
    show(table(choice))
    choice_file.write(job.workdir, job.run, choice, job.to_choose, job.depends)
    decided = job.with_layers(tuple(choice["layers"]))
    teacher.load_anew_for(decided)
    return decided


def _beside(job: Job, teacher: Params) -> Student:
    """What stands in the layers that are not kept: an earlier run's mixers, where the student begins with some."""
    if (earlier := job.earlier) is not None:
        assert earlier.student is not None  # a run that has begun has chosen
        # Nobody asks for its logits: it needs no head of its own.
        cfg = dataclasses.replace(earlier.student, tie_embeddings=job.teacher.tie_embeddings)
        return Student(cfg, whole_student(cfg, teacher, earlier_mixers.load(earlier, cfg, job.mesh)))
    options = WINDOW.choose(job.teacher.hidden_size, **_window(job))
    length = job.run.stage(job.run.stages[0]).seq_len
    if length <= options.sinks + options.window:
        say(f"rows of {length} tokens are no longer than the window: recall alone tells the layers apart")
    return windows(job.teacher, teacher, options)


def _window(job: Job) -> dict[str, Any]:
    """The window's options, where the student has it itself."""
    return dict(job.run.student.options) if job.run.student.mixer == WINDOW.name else {}


def _texts(job: Job) -> list[Batch]:
    """The first rows that the first stage trains on, all of them in every process.

    No held-out ones: these judge afterwards what was chosen.
    """
    name = job.run.stages[0]
    seq_len = job.run.stage(name).seq_len
    batches = pipeline.make_train_iterator(
        job.token_file,
        seq_len=seq_len,
        batch_size=max(1, min(Sizes.texts, pipeline.rows_available(job.token_file, seq_len, job.run.eval_tokens))),
        seed=STAGES[name].order_seed(job.run.seed),
        eval_tokens=job.run.eval_tokens,
        cross_document=job.run.data.cross_document,
    )
    return [next(batches)]
