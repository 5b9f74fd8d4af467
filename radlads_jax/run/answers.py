"""What models answer in made-up tales: how often all of what follows with certainty is said.

The tales are the synthetic language's, of its own seed but none that a run has read: facts that are asked for, lists to
repeat, counting. Next-token accuracy hides these few tokens among many that anyone would guess.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool
from rich.table import Table

from pallas_kernels.sharded import constrain
from radlads_jax.data import synthetic
from radlads_jax.distill.losses import Batch, next_tokens, read_rows
from radlads_jax.models import ModelConfig, bind, sharding
from radlads_jax.models.tree import Params

_TITLES = {"answer": "facts recalled", "copy": "lists repeated", "count": "counts"}
# No run has as many documents: what comes from here on, none has read.
_FIRST_TALE = 1 << 40
_ROW_STEP = 64


class _Tales(NamedTuple):
    """Rows of a tale each, and per row the (kind, begin, end) of the tokens that follow with certainty."""

    rows: list[list[int]]
    marks: list[list[tuple[str, int, int]]]


def answer_scores(
    models: Mapping[str, tuple[ModelConfig, Params]],
    tokenizer: Any,
    count: int,
    *,
    seed: int = 0,
    beginning: tuple[int, ...] = (),
    batch_size: int = 8,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """{"tales": their number, "scores": [{"what": facts recalled, "asked": how many, model's name: share right}, ...]}.

    count: how many tales, of the language `seed`. beginning: ids that documents begin with. tokenizer: a fast one.
    Right is an answer whose every token is the model's likeliest one after the tale's own text before it.
    """
    tales = _tales(tokenizer, seed, count, beginning)
    spans = [(row, *mark) for row, marks in enumerate(tales.marks) for mark in marks]
    kinds = [kind for kind in _TITLES if any(kind == of for _, of, _, _ in spans)]
    asked = [sum(kind == of for _, of, _, _ in spans) for kind in kinds]
    scores: list[dict[str, Any]] = [
        {"what": _TITLES[kind], "asked": number} for kind, number in zip(kinds, asked, strict=True)
    ]
    for name, (cfg, params) in models.items():
        right = _likeliest(cfg, params, tales.rows, batch_size, mesh)
        for kind, score in zip(kinds, scores, strict=True):
            said = [right[row][begin - 1 : end - 1].all() for row, of, begin, end in spans if of == kind]
            score[name] = float(np.mean(said))
    return {"tales": count, "scores": scores}


def answers_table(answers: Mapping[str, Any]) -> Table:
    """What `answer_scores` found, for a terminal."""
    table = Table(title=f"Right answers in {answers['tales']:,} tales", title_justify="left")
    names = [name for name in ("teacher", "control", "student") if name in answers["scores"][0]]
    for column in ("", "asked", *names):
        table.add_column(column, justify="right" if column else "left")
    for score in answers["scores"]:
        table.add_row(score["what"], f"{score['asked']:,}", *(f"{score[name]:.1%}" for name in names))
    return table


def _tales(tokenizer: Any, seed: int, count: int, beginning: tuple[int, ...]) -> _Tales:
    tales = _Tales([], [])
    for index in range(_FIRST_TALE, _FIRST_TALE + count):
        spans = synthetic.spans(seed, index)
        encoded = tokenizer("".join(s.text for s in spans), add_special_tokens=False, return_offsets_mapping=True)
        # A token has to have one before it.
        before = list(beginning) or [tokenizer.eos_token_id or 0]
        ids = before + encoded["input_ids"]
        marks: list[tuple[str, int, int]] = []
        starts, ends = (np.asarray(places) for places in zip(*encoded["offset_mapping"], strict=True))
        begin = 0
        for span in spans:
            end = begin + len(span.text)
            # Without one that goes on after the span, like a full stop with the line's end.
            inside = len(before) + np.flatnonzero((starts >= begin) & (ends <= end))
            if span.kind in _TITLES and len(inside):
                marks.append((span.kind, int(inside[0]), int(inside[-1]) + 1))
            begin = end
        tales.rows.append(ids)
        tales.marks.append(marks)
    return tales


def _likeliest(
    cfg: ModelConfig, params: Params, rows: list[list[int]], batch_size: int, mesh: Mesh | None
) -> list[Bool[np.ndarray, " T"]]:
    """Of every row, whether its token t + 1 is the likeliest one after those up to t."""
    width = -(-max(map(len, rows)) // _ROW_STEP) * _ROW_STEP
    right: list[Bool[np.ndarray, " T"]] = []
    for first in range(0, len(rows), batch_size):
        tokens, segments = (np.zeros((batch_size, width), np.int32) for _ in range(2))
        for i, row in enumerate(rows[first : first + batch_size]):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
        placed = sharding.place_whole(mesh, batch)
        with sharding.traced_over(mesh):
            right += list(jax.device_get(_is_likeliest(cfg, params, placed)))
    return right[: len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _is_likeliest(cfg: ModelConfig, params: Params, batch: Batch) -> Bool[Array, "B T"]:
    decoder, tokens = bind(cfg, params), batch["tokens"]
    hidden = read_rows(decoder, batch).reshape(*tokens.shape, -1)
    # A row's logits at a time: the vocabulary may be a large one.
    best = jax.lax.map(lambda row: jnp.argmax(decoder.logits(row[None])[0], axis=-1), hidden)
    return constrain(best == next_tokens(tokens))
