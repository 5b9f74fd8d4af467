"""Writes a teacher's likeliest tokens for the rows that a run trains on; stopped at any moment, it goes on there.

All devices compute each block of rows together; the hosts take turns in writing them.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.sharded import constrain
from radlads_jax.data import packing, stored_logits
from radlads_jax.data.stored_logits import StoredLogits
from radlads_jax.distill.losses import read_rows
from radlads_jax.models import ModelConfig, bind, sharding
from radlads_jax.models.tree import Params
from radlads_jax.run import teacher_logits
from radlads_jax.run.display import say
from radlads_jax.run.job import Job
from radlads_jax.system import hosts
from radlads_jax.system.space import free_bytes, shown_bytes
from radlads_jax.system.storage import AnyPath
from radlads_jax.system.terminal import progress_bar

# Tokens whose logits are in memory at once.
_SLICE_TOKENS = 256


def store(job: Job, output: AnyPath, precision: str) -> StoredLogits:
    """The job's teacher's logits in `output`, all of them. precision: of the log-probabilities.

    Raises ValueError for a job without a teacher, more tokens than there are, too small a disk, or an output that was
    begun with others.
    """
    _check(job)
    recipe = teacher_logits.recipe(job.run, job.depends, job.token_file, job.run.eval_tokens, job.teacher.vocab_size)
    recipe["log_probs"] = precision
    with hosts.first_alone("logits"):
        stored = stored_logits.begin(output, recipe)
    # As the first one sees them: the others' files may come meanwhile.
    missing = json.loads(hosts.said_by_first(json.dumps(stored.missing())))
    _check_disk(stored, len(missing))
    if not missing:
        return stored
    teacher = job.load_teacher(job.run.teacher.dtype)
    rows = packing.train_rows(
        job.token_file,
        recipe["seq_len"],
        eval_tokens=job.run.eval_tokens,
        cross_document=recipe["cross_document"],
    )
    with progress_bar("storing logits", show=hosts.is_first()) as progress:
        blocks = len(missing)
        for turn, block in enumerate(progress.track(missing, total=blocks)):
            values = _block(job, teacher, rows, stored.block_rows(block), recipe["top_k"])
            if turn % jax.process_count() == jax.process_index():
                stored.write(block, *values)
    hosts.barrier()
    return stored


def _check(job: Job) -> None:
    if job.source is None:
        raise ValueError("the config has no teacher of files; expected config.teacher.path. Set it.")
    if job.run.teacher.temperature != 1:
        raise ValueError(
            f"config.teacher.temperature is {job.run.teacher.temperature:g}; expected 1, for logits are stored as they "
            "are, and read at no other. Leave it out."
        )
    if job.run.teacher.stored_top_k > job.teacher.vocab_size:
        raise ValueError(
            f"config.teacher.top_k is {job.run.teacher.stored_top_k:,} and the teacher's vocabulary "
            f"{job.teacher.vocab_size:,}; expected no more than that. Lower it."
        )


def _check_disk(stored: StoredLogits, missing: int) -> None:
    blocks = -(-stored.num_rows // stored.recipe["block_rows"])
    size, free = stored.num_bytes * missing // blocks, free_bytes(stored.directory)
    room = "" if free is None else f", {shown_bytes(free)} free"
    tokens = stored.num_rows * stored.recipe["seq_len"]
    say(
        f"top {stored.top_k} of {stored.recipe['vocab_size']:,} tokens at {tokens:,} places: {shown_bytes(size)} to "
        f"write to {stored.directory}{room}; {blocks - missing} of {blocks} files are there"
    )
    if hosts.agreed(int(free is not None and size > free)):
        raise ValueError(
            f"the logits take {shown_bytes(size)} below {stored.directory}, where {shown_bytes(free or 0)} are free; "
            "expected room for all of them. Choose another --output, lower config.teacher.top_k, or give less text."
        )


def _block(
    job: Job, teacher: Params, rows: packing.PackedRows, numbers: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indices, log_probs, rest) of these rows, in every process."""
    size = job.run.train.eval_batch_size
    own = sharding.own_rows(job.mesh, size)
    padded = np.full(-(-len(numbers) // size) * size, -1)
    padded[: len(numbers)] = numbers
    parts = []
    for batch in padded.reshape(-1, size):
        placed = sharding.place_rows(job.mesh, rows.rows(batch[own]), size)
        with sharding.traced_over(job.mesh):
            parts.append(jax.device_get(_likeliest(job.teacher, top_k, teacher, dict(placed))))
    indices, log_probs, rest = (np.concatenate(part)[: len(numbers)] for part in zip(*parts, strict=True))
    return indices, log_probs, rest


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likeliest(
    cfg: ModelConfig, top_k: int, params: Params, batch: dict[str, Array]
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T"]]:
    """The likeliest tokens, the logarithms of their probabilities, and the probability of all others together."""
    decoder = bind(cfg, params)
    hidden = read_rows(decoder, batch)
    tokens, shape = len(hidden), batch["tokens"].shape
    slices = -(-tokens // _SLICE_TOKENS)
    padded = jnp.pad(hidden, ((0, slices * _SLICE_TOKENS - tokens), (0, 0))).reshape(slices, _SLICE_TOKENS, -1)

    def of_slice(hidden: Array) -> tuple[Array, Array, Array]:
        log_probs, indices = jax.lax.top_k(jax.nn.log_softmax(decoder.logits(hidden[None])[0]), top_k)
        return indices, log_probs, jnp.maximum(1 - jnp.exp(log_probs).sum(-1), 0)

    def joined(x: Array) -> Array:
        # On every device, so that any process can write it.
        return constrain(x.reshape(-1, *x.shape[2:])[:tokens].reshape(*shape, *x.shape[2:]))

    return jax.tree.map(joined, jax.lax.map(of_slice, padded))
