"""How likely a model finds given tokens: log-probabilities of the ends of token rows, batched by length."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from radlads_jax.decoding.loop import Sequences, empty_sequences, read_chunk, read_tokens
from radlads_jax.models import ModelConfig, bind
from radlads_jax.models.tree import Params
from radlads_jax.system.terminal import progress_bar

# Rows are read in chunks of this many tokens, shorter ones at one of the widths below it.
_CHUNK = 512
_WIDTHS = (32, 64, 128, 256, _CHUNK)
# Tokens whose logits are in memory at once.
_LOGIT_TOKENS = 256
# A batch of longer rows has fewer of them.
FULL_BATCH_WIDTH = 1024


class Score(NamedTuple):
    """Of a row's tokens from its start on: their log-probabilities, and whether each was the most likely one."""

    log_probabilities: Float[np.ndarray, " N"]
    is_best: Bool[np.ndarray, " N"]


def score_rows(
    cfg: ModelConfig,
    params: Params,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    batch_size: int = 8,
    *,
    bar: bool = False,
) -> list[Score]:
    """log p(row[t] | row[:t]) for t >= start >= 1, for every row with its start.

    Rows of similar length are read together, the longest first, so that what does not fit in memory shows at once.
    bar: show on stderr how many rows are scored.
    """
    for row, start in zip(rows, starts, strict=True):
        if not 1 <= start < len(row):
            raise ValueError(
                f"a row of {len(row)} tokens is to be scored from token {start}; expected 1 to {len(row) - 1}, as the "
                "first token has none before it. Begin the row with a beginning-of-text token."
            )
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores: dict[int, Score] = {}
    with progress_bar("scoring", show=bar) as progress:
        task = progress.add_task("", total=len(rows))
        while order:
            width = padded_width(len(rows[order[0]]) - 1)
            size = min(batch_size, max(1, batch_size * FULL_BATCH_WIDTH // width))
            batch, order = order[:size], order[size:]
            # An incomplete batch is filled up, since another number of rows is another program.
            filled = batch + [batch[-1]] * (size - len(batch))
            scored = _score_batch(cfg, params, [rows[i] for i in filled], [starts[i] for i in filled], width)
            scores |= dict(zip(batch, scored, strict=False))
            progress.update(task, completed=len(scores))
    return [scores[i] for i in range(len(rows))]


def score_continuations(
    cfg: ModelConfig,
    params: Params,
    sequences: Sequences,
    unread: Int[np.ndarray, "B R"],
    continuations: Sequence[Sequence[int]],
) -> list[Score]:
    """log p of every token of a continuation for each row, after what `prefill` has read and left unread of it.

    Whose sequences stay as they are, and so are in memory twice; they have room for padded_width(R + the longest one)
    more tokens.
    """
    known = unread.shape[1]
    width = padded_width(known + max(map(len, continuations)))
    tokens = np.full((len(unread), width + 1), -1, np.int32)
    tokens[:, :known] = unread
    for row, continuation in zip(tokens, continuations, strict=True):
        row[known : known + len(continuation)] = continuation
    # What reads them gives up the arrays that it is called with.
    sequences = jax.tree.map(jnp.copy, sequences)
    scored = []
    size = min(width, _CHUNK)
    for begin in range(0, width, size):
        chunk = jnp.asarray(tokens[:, begin : begin + size])
        targets = jnp.asarray(tokens[:, begin + 1 : begin + size + 1])
        chunk_scores, sequences = _score_chunk(cfg, params, sequences, chunk, targets)
        scored.append(jax.device_get(chunk_scores))
    log_probabilities, is_best = (np.concatenate(parts, axis=1) for parts in zip(*scored, strict=True))
    parts = [slice(known - 1, known - 1 + len(continuation)) for continuation in continuations]
    return [Score(p[part], best[part]) for p, best, part in zip(log_probabilities, is_best, parts, strict=True)]


def padded_width(length: int) -> int:
    """The width that rows of this many tokens are padded to."""
    return next((width for width in _WIDTHS if length <= width), -(-length // _CHUNK) * _CHUNK)


def _score_batch(
    cfg: ModelConfig, params: Params, rows: list[Sequence[int]], starts: list[int], width: int
) -> list[Score]:
    tokens = np.full((len(rows), width + 1), -1, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[width + 1 - len(row) :] = row
    # The first column whose next token any row asks for.
    first = min(width + start - len(row) for row, start in zip(rows, starts, strict=True))
    size = min(width, _CHUNK)
    sequences = empty_sequences(cfg, len(rows), width)
    scored = []
    for begin in range(0, width, size):
        chunk = jnp.asarray(tokens[:, begin : begin + size])
        if begin + size <= first:
            sequences = read_chunk(cfg, params, sequences, chunk)
            continue
        targets = jnp.asarray(tokens[:, begin + 1 : begin + size + 1])
        chunk_scores, sequences = _score_chunk(cfg, params, sequences, chunk, targets)
        scored.append(jax.device_get(chunk_scores))
    log_probabilities, is_best = (np.concatenate(parts, axis=1) for parts in zip(*scored, strict=True))
    counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
    return [
        Score(p[len(p) - n :], best[len(best) - n :])
        for p, best, n in zip(log_probabilities, is_best, counts, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_chunk(
    cfg: ModelConfig,
    params: Params,
    sequences: Sequences,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
) -> tuple[tuple[Float[Array, "B T"], Bool[Array, "B T"]], Sequences]:
    hidden, sequences = read_tokens(cfg, params, sequences, tokens)
    decoder = bind(cfg, params)

    def score(inputs):
        hidden, targets = inputs
        logits = decoder.logits(hidden[None])[0]
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets

    count = tokens.size
    slices = -(-count // _LOGIT_TOKENS)
    missing = slices * min(_LOGIT_TOKENS, count) - count
    flat = jnp.pad(hidden.reshape(count, -1), ((0, missing), (0, 0))).reshape(slices, -1, hidden.shape[-1])
    flat_targets = jnp.pad(targets.reshape(count), (0, missing)).reshape(slices, -1)
    by_slice = jax.lax.map(score, (flat, flat_targets))
    log_probabilities, is_best = (x.reshape(-1)[:count].reshape(tokens.shape) for x in by_slice)
    return (log_probabilities, is_best), sequences
