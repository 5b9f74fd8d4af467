"""How much a run will write, by the shapes of what it writes."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from radlads_jax.distill.program import abstract_state
from radlads_jax.models import ModelConfig
from radlads_jax.porting.names import disk_tensors
from radlads_jax.porting.writers import writer_for
from radlads_jax.run import earlier_mixers, fingerprint
from radlads_jax.run.job import Job


def bytes_to_write(job: Job) -> int:
    """At most, of checkpoints, copies and export, from where the run stands."""
    directory, run = epath.Path(job.workdir), job.run
    largest = left = 0
    for name, recipe in run.recipes.items():
        saved = directory / "checkpoints" / name
        written = {path.name for path in (saved.iterdir() if saved.exists() else ()) if path.name.isdigit()}
        if str(recipe.steps) in written:
            continue
        state = abstract_state(job.stage_plan(name).on_one_device())
        size = _bytes((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
        # One that was stopped between two of them has saved once more.
        saves = max(-(-recipe.steps // run.train.checkpoint_every), len(written) + 1)
        left += max(min(run.train.keep_checkpoints, saves) - len(written), 0) * size
        # An old checkpoint is deleted only after its successor is whole.
        largest = max(largest, size if saves > run.train.keep_checkpoints else 0)
    left += largest
    if job.earlier is not None and job.earlier.student is not None:
        copied = earlier_mixers.abstract_mixers(job.student)
        left += _bytes((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(copied))
    if fingerprint.finished(job.workdir, run.stages) is None:
        form = writer_for(job.student, run.export.engine)
        tensors = disk_tensors(form.written(exported(job))).values()
        left += _bytes((location.disk_shape, run.export.dtype) for location in tensors)
    return left


def exported(job: Job) -> ModelConfig:
    """The student as it is exported."""
    return dataclasses.replace(job.student, tie_embeddings=job.student.tie_embeddings or job.run.export.retie)


def _bytes(arrays: Iterable[tuple[tuple[int, ...], Any]]) -> int:
    """Of arrays by shape and dtype."""
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in arrays)
