"""Continuations of prompts, yielded as they are made; and what a conversation keeps between its turns."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from radlads_jax.data.chat_template import check_text
from radlads_jax.decoding.loaded import Model
from radlads_jax.decoding.loop import BLOCK, Sequences, decode, empty_sequences, left_padded, prefill
from radlads_jax.decoding.sampling import GREEDY, Sampling
from radlads_jax.decoding.text_stream import TextStream
from radlads_jax.models import ModelConfig
from radlads_jax.models.state import grows


class Step(NamedTuple):
    """What one call of the decoding loop made, a list item for every row: its new text and its new tokens."""

    texts: list[str]
    tokens: list[list[int]]


class Memory:
    """What a model has read of one conversation, so that the next turn need not read it all again."""

    def __init__(self, cfg: ModelConfig, capacity: int):
        """capacity: tokens that softmax layers will have room for; without such layers a conversation has no end."""
        self.cfg, self.capacity = cfg, capacity
        self.ids: list[int] = []
        self.sequences: Sequences | None = None

    def resume(self, ids: list[int], max_tokens: int) -> tuple[Sequences, list[int]]:
        """Sequences that have read a beginning of these tokens, and the rest of them.

        Raises ValueError where they and max_tokens more do not fit.
        """
        if grows(self.cfg) and len(ids) + max_tokens > self.capacity:
            raise ValueError(
                f"the conversation has {len(ids)} tokens and up to {max_tokens} will come; expected at most "
                f"{self.capacity} in all for a model with softmax layers. Raise --context, or begin a new conversation."
            )
        known = len(self.ids)
        kept, self.sequences = self.sequences, None
        if kept is not None and ids[:known] == self.ids and known < len(ids):
            return kept, ids[known:]
        return empty_sequences(self.cfg, 1, self.capacity), ids


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    memory: Memory | None = None,
    read: tuple[Sequences, np.ndarray] | None = None,
) -> Iterator[Step]:
    """Continues all prompts at once, yielding after the first new token and then after every BLOCK of them.

    A row ends at one of model.stop_ids, which is not yielded, at a stop string or after max_tokens. Every draw is a
    function of the seed, the row's number (default: its index) and how many tokens it has. memory: of the conversation
    that the only prompt continues; it is kept up to date. read: what `prefill` made of these prompts, with room for
    max_tokens more; it is used up.
    """
    rows = [list(prompt) for prompt in prompts]
    _check(rows, max_tokens, stop)
    assert read is None or memory is None
    if read is not None:
        sequences, unread = read
    elif memory is not None:
        sequences, rest = memory.resume(rows[0], max_tokens)
        sequences, unread = prefill(model.cfg, model.params, sequences, left_padded([rest]))
    else:
        sequences = empty_sequences(model.cfg, len(rows), max(map(len, rows)) + max_tokens)
        sequences, unread = prefill(model.cfg, model.params, sequences, left_padded(rows))
    streams = [TextStream(model.tokenizer, stop, prompt) for prompt in rows]
    row_numbers = jnp.arange(len(rows)) if numbers is None else jnp.asarray(numbers)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_numbers)
    done, made = np.zeros(len(rows), bool), 0
    while made < max_tokens and not done.all():
        if memory is not None:
            memory.sequences = None  # the loop gives up the arrays that it is called with
        new, sequences = decode(
            model.cfg,
            model.params,
            sequences,
            unread,
            steps=min(BLOCK, max_tokens - made) if made else 1,
            sampling=sampling,
            keys=keys,
            done=done,
            stop_ids=model.stop_ids,
        )
        unread, made = new[:, -1:], made + new.shape[1]
        if memory is not None:
            (conversation,) = rows
            conversation += new[0].tolist()
            memory.ids, memory.sequences = conversation[:-1], sequences
        tokens = [[i for i in row if i >= 0 and i not in model.stop_ids] for row in new.tolist()]
        texts = [stream.push(ids) for stream, ids in zip(streams, tokens, strict=True)]
        ended = np.isin(new, model.stop_ids).any(axis=1) | np.asarray([stream.stopped for stream in streams])
        for row in np.flatnonzero(~done & (ended | (made >= max_tokens))):
            texts[row] += streams[row].finish()
        done |= ended
        yield Step(texts, tokens)


def _check(prompts: list[list[int]], max_tokens: int, stop: Sequence[str]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("a prompt holds no token; expected at least one to continue. Leave empty prompts out.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; expected at least 1. Change --max_tokens.")
    if not all(stop):
        raise ValueError("a stop string is empty; expected text. Leave --stop out to stop at the model's end tokens.")
    for text in stop:
        check_text(text, "a stop string")
