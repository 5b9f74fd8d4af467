"""Reading and continuing token sequences with a state of constant size: a prefill in chunks, then one compiled loop.

A prompt's length does not matter to the compiler: it is read in chunks of 512, 64 and 8 tokens, and its last 1 to 8
tokens are the first that the decoding loop reads.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from radlads_jax.decoding.sampling import GREEDY, Sampling, choose
from radlads_jax.models import ModelConfig, bind, init_state
from radlads_jax.models.state import State, grows
from radlads_jax.models.tree import Params
from radlads_jax.system import hosts

_CHUNKS = (512, 64, 8)
# The most tokens of a prompt that `prefill` leaves to be read.
UNREAD = _CHUNKS[-1]
# The most tokens that one call of the loop makes: a caller waits for them, and reads them from the device at once.
BLOCK = 16
_CAPACITY_STEP = 256


class Sequences(NamedTuple):
    """What a model remembers of the sequences it reads; read [B]: each one's tokens so far, padding not counted."""

    state: State
    read: Int[Array, " B"]


def empty_sequences(cfg: ModelConfig, batch: int, capacity: int) -> Sequences:
    """Nothing read yet; softmax layers will hold at most `capacity` tokens, rounded up, and padding is among them."""
    return Sequences(init_state(cfg, batch, _rounded_capacity(cfg, capacity)), jnp.zeros((batch,), jnp.int32))


def _rounded_capacity(cfg: ModelConfig, tokens: int) -> int:
    """A cache size for that many tokens that lets similar lengths share a program; 1 where there is no cache."""
    return -(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP if grows(cfg) else 1


def unrolled(cfg: ModelConfig) -> ModelConfig:
    """The same model with every layer a stack of its own, so that a loop over tokens reads its weights where they are.

    Out of a scanned stack XLA copies each layer's weights before it multiplies by them, on a CPU at twice the cost of
    the products for one token.
    """
    return dataclasses.replace(cfg, stacks=tuple((mixer, 1) for mixer in cfg.layer_mixers))


def left_padded(rows: list[list[int]]) -> Int[np.ndarray, "B T"]:
    """Token rows of one width, -1 before the shorter ones."""
    width = max(map(len, rows))
    return np.stack([np.pad(np.asarray(row, np.int32), (width - len(row), 0), constant_values=-1) for row in rows])


def prefill_chunks(length: int) -> list[int]:
    """The sizes in which all but the last 1 to UNREAD of so many tokens are read."""
    sizes = []
    left = length - 1
    for size in _CHUNKS:
        sizes += [size] * (left // size)
        left %= size
    return sizes


def prefill(
    cfg: ModelConfig, params: Params, sequences: Sequences, tokens: Int[np.ndarray, "B T"]
) -> tuple[Sequences, Int[np.ndarray, "B R"]]:
    """Reads all but the last few tokens (-1 = padding, at the left); returns what is left for `decode` to read."""
    start = 0
    for size in prefill_chunks(tokens.shape[1]):
        sequences = read_chunk(cfg, params, sequences, jnp.asarray(tokens[:, start : start + size]))
        start += size
    return sequences, tokens[:, start:]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunk(cfg: ModelConfig, params: Params, sequences: Sequences, tokens: Int[Array, "B T"]) -> Sequences:
    """The sequences with these tokens read."""
    return read_tokens(cfg, params, sequences, tokens)[1]


def read_tokens(
    cfg: ModelConfig, params: Params, sequences: Sequences, tokens: Int[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Sequences]:
    """The hidden states of these tokens (-1 = padding), and the sequences with them read."""
    real = tokens >= 0
    counts = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    hidden, state = bind(cfg, params).hidden(
        jnp.maximum(tokens, 0),
        segment_ids=real.astype(jnp.int32),
        positions=jnp.maximum(sequences.read[:, None] + counts - 1, 0),
        state=sequences.state,
    )
    assert state is not None  # one was given
    return hidden, Sequences(state, sequences.read + counts[:, -1])


def decode(
    cfg: ModelConfig,
    params: Params,
    sequences: Sequences,
    unread: Int[np.ndarray, "B R"],
    *,
    steps: int,
    sampling: Sampling = GREEDY,
    keys: Key[Array, " B"] | None = None,
    done: Bool[np.ndarray, " B"] | None = None,
    stop_ids: tuple[int, ...] = (),
) -> tuple[Int[np.ndarray, "B N"], Sequences]:
    """Reads `unread`, 1 to UNREAD tokens, and makes `steps` new ones, at most BLOCK, the last of which is unread.

    done: rows that make no more. A row is also done after one of stop_ids, and has -1 from then on; the loop ends with
    fewer than `steps` tokens when all are. keys: one a row, for sampling; a draw is a function of the row's key and of
    the number of its tokens so far. Where the weights are over several processes, every one has to ask.
    """
    batch, known = unread.shape
    assert 1 <= known <= UNREAD and 1 <= steps <= BLOCK
    padded = np.pad(unread, ((0, 0), (0, UNREAD - known)))
    keys = jax.random.split(jax.random.key(0), batch) if keys is None else keys
    done = np.zeros(batch, bool) if done is None else done
    out, made, sequences = _loop(
        cfg, sampling, stop_ids, params, sequences, jnp.asarray(padded), known, keys, jnp.asarray(done), steps
    )
    # Of weights over several processes each has a part, and the compiler says where these come to be.
    return hosts.fetched(out)[:, : int(hosts.fetched(made))], sequences


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _loop(
    cfg: ModelConfig,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    params: Params,
    sequences: Sequences,
    unread: Int[Array, "B R"],
    known: Int[Array, ""] | int,
    keys: Key[Array, " B"],
    done: Bool[Array, " B"],
    steps: Int[Array, ""] | int,
) -> tuple[Int[Array, "B N"], Int[Array, ""], Sequences]:
    """(new tokens [B, BLOCK], how many of its columns are made, the sequences)."""
    decoder, batch = bind(cfg, params), unread.shape[0]

    def going_on(carry):
        made, _, _, done, _ = carry
        return (made < steps) & ~jnp.all(done)

    def step(carry):
        made, token, sequences, done, out = carry
        following = jnp.clip(made + known, 0, unread.shape[1] - 1)
        hidden, sequences = read_tokens(cfg, params, sequences, token[:, None])
        row_keys = jax.vmap(jax.random.fold_in)(keys, sequences.read)
        chosen = choose(decoder.logits(hidden)[:, 0], row_keys, sampling)
        chosen = jnp.where(done, -1, chosen)
        # Column `made` counts from 1 - known: before 0 the prompt's tokens are read and nothing is made.
        out = out.at[:, jnp.maximum(made, 0)].set(chosen)
        token = jnp.where(made < 0, jnp.take(unread, following, axis=1), chosen)
        done = done | ((made >= 0) & jnp.isin(chosen, jnp.asarray(stop_ids, jnp.int32)))
        return made + 1, token, sequences, done, out

    out = jnp.full((batch, BLOCK), -1, jnp.int32)
    start = (1 - jnp.asarray(known, jnp.int32), unread[:, 0], sequences, done, out)
    made, _, sequences, _, out = jax.lax.while_loop(going_on, step, start)
    return out, made, sequences


def compile_for(
    cfg: ModelConfig,
    params: Params,
    batch: int,
    length: int,
    capacity: int,
    sampling: Sampling = GREEDY,
    stop_ids: tuple[int, ...] = (),
) -> None:
    """Compiles what prompts of that many tokens need that is not compiled yet."""
    for size in dict.fromkeys(prefill_chunks(length)):
        key = (cfg, batch, size, _rounded_capacity(cfg, capacity))
        if key not in _compiled:
            _compiled.add(key)
            padding = jnp.full((batch, size), -1, jnp.int32)
            jax.block_until_ready(read_chunk(cfg, params, empty_sequences(cfg, batch, capacity), padding))
    nothing = np.full((batch, 1), -1, np.int32)
    sequences = empty_sequences(cfg, batch, capacity)
    decode(cfg, params, sequences, nothing, steps=1, sampling=sampling, done=np.ones(batch, bool), stop_ids=stop_ids)


# (model, batch, chunk, capacity), so that no chunk is read a second time for nothing.
_compiled: set[tuple[ModelConfig, int, int, int]] = set()


def generate_greedy(
    cfg: ModelConfig, params: Params, prompts: Int[Array, "B T"] | Int[np.ndarray, "B T"], new_tokens: int
) -> Int[np.ndarray, "B N"]:
    """The most likely next token, new_tokens times, for every row; shorter rows are left-padded with token id -1."""
    rows = np.asarray(prompts, np.int32)
    sequences = empty_sequences(cfg, rows.shape[0], rows.shape[1] + new_tokens)
    sequences, unread = prefill(cfg, params, sequences, rows)
    made: list[np.ndarray] = []
    for start in range(0, new_tokens, BLOCK):
        new, sequences = decode(cfg, params, sequences, unread, steps=min(BLOCK, new_tokens - start))
        unread = new[:, -1:]
        made.append(new)
    return np.concatenate(made, axis=1)
