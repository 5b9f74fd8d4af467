"""wkv6 by chunks: only matrix products, with a backward pass written by hand.

Within a chunk o_i gets sum_j (r_i . e^(G_i - G_j) k_j) v_j, G the cumulative log decay, where decays of -5 a token make
e^-G too large to split off. Every pair of tokens is therefore served at one level: neighbours in a group of GROUP
tokens, with exponents counted from the group's middle; all others where a boundary between two spans of 8, 16, ...
tokens comes between them, with both exponents counted from that boundary and so never positive.
A scan goes from chunk to chunk and does all of a chunk's work: its arrays are small enough to stay in cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import layout
from pallas_kernels.layout import Resets, transpose

DEFAULT_CHUNK_SIZE = 16
GROUP = 8


class Inputs(NamedTuple):
    """The sequences: [B,T,H,K] and v [B,T,H,V], or one chunk of them: [B,H,C,K] and [B,H,C,V]."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array


class Levels(NamedTuple):
    """Constants of a chunk size, for L levels.

    `sums` [L+2,C,C]: times log_w they give each level's exponents, the sums from the chunk's start to each token
    (itself included), and from each token (itself not included) to the chunk's end. `sign` [L,1,1] is -1 where a
    key's exponent is the opposite of a receptance's. `masks` [L,C,C]: the pairs of each level; together, all i > j.
    """

    sums: np.ndarray
    sign: np.ndarray
    masks: np.ndarray


class Pairs(NamedTuple):
    """What a chunk holds beside its state, [B,H,...] float32.

    `r_decay` and `k_decay` [L,C,K] are the exponentials of each level, `rs` and `ks` [L,C,K] r and k times those;
    `from_start` and `to_end` [C,K] are e^G_i and e^(G_C - G_j), `r_head` and `k_tail` r and k times those, without
    the tokens that resets part from the chunk's start or end; `inner` [C,C] holds the pairs i >= j; `end` and `rest`
    [K,1] are e^G_C rounded to float32 and what the rounding left out.
    """

    r_decay: jax.Array
    k_decay: jax.Array
    rs: jax.Array
    ks: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    r_head: jax.Array
    k_tail: jax.Array
    inner: jax.Array
    end: jax.Array
    rest: jax.Array


@functools.cache
def levels(size: int) -> Levels:
    """The levels of a chunk of `size` tokens, a power of two."""
    i, j = np.indices((size, size))
    start, end = j <= i, j > i
    group = min(GROUP, size)
    middle = i // group * group + group // 2
    centred = np.where(i >= middle, (j <= i) & (j > middle), 0) - np.where(i < middle, (j > i) & (j <= middle), 0)
    sums, sign, masks = [centred], [-1], [(i // group == j // group) & (j < i)]
    span = group
    while span < size:
        in_span, second = i // span == j // span, i // span % 2 == 1
        sums.append(in_span & np.where(second, start, end))
        sign.append(1)
        masks.append((i // span == j // span + 1) & second)
        span *= 2
    sums += [start, end]
    signs = np.asarray(sign, np.float32)[:, None, None]
    return Levels(np.asarray(sums, np.float32), signs, np.asarray(masks, np.float32))


def level_masks(size: int, resets: Resets | None) -> jax.Array:
    """[L,C,C] or, with resets, [B,1,L,C,C]."""
    masks = jnp.asarray(levels(size).masks)
    return masks if resets is None else masks * resets.pairs[:, :, None]


def chunk_pairs(chunk: Inputs, resets: Resets | None) -> Pairs:
    """Everything of one chunk that does not depend on its state."""
    batch, heads, size, width = chunk.r.shape
    constants = levels(size)
    stacked = jnp.asarray(constants.sums.reshape(-1, size))
    exponents = jnp.broadcast_to(stacked, (batch, heads, *stacked.shape)) @ chunk.log_w
    exponents = exponents.reshape(batch, heads, -1, size, width)
    r_decay, k_decay = jnp.exp(exponents[:, :, :-2]), jnp.exp(exponents[:, :, :-2] * constants.sign)
    rs, ks = r_decay * chunk.r[:, :, None], k_decay * chunk.k[:, :, None]
    itself = jnp.sum(chunk.r * chunk.k, axis=-1, keepdims=True) * jnp.eye(size, dtype=jnp.float32)
    inner = jnp.sum((rs @ transpose(ks)) * level_masks(size, resets), axis=2) + itself
    from_start, to_end = jnp.exp(exponents[:, :, -2]), jnp.exp(exponents[:, :, -1])
    r_head, k_tail = chunk.r * from_start, chunk.k * to_end
    if resets is not None:
        r_head, k_tail = r_head * resets.head, k_tail * resets.tail
    end, rest = chunk_decay(transpose(exponents[:, :, -2, -1:]))
    if resets is not None:
        end, rest = end * resets.keep, rest * resets.keep
    return Pairs(r_decay, k_decay, rs, ks, from_start, to_end, r_head, k_tail, inner, end, rest)


def chunk_decay(total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e^total as a float32 and the remainder, kept where decay is weak.

    Over a thousand chunks of the same weak decay the rounding of e^total would add up, always to the same side.
    """
    end = jnp.exp(total)
    return end, jnp.where(end > 0.5, jnp.expm1(total) - (end - 1.0), 0.0)


def decayed(p: Pairs, state: jax.Array) -> jax.Array:
    """diag(e^G_C) state."""
    return p.end * state + p.rest * state


def chunk_forward(chunk: Inputs, state: jax.Array, resets: Resets | None) -> tuple[jax.Array, jax.Array]:
    """Outputs [B,H,C,V] of one chunk and the state after it."""
    p = chunk_pairs(chunk, resets)
    return p.r_head @ state + p.inner @ chunk.v, decayed(p, state) + transpose(p.k_tail) @ chunk.v


def chunk_backward(
    chunk: Inputs, state: jax.Array, d_out: jax.Array, d_next: jax.Array, resets: Resets | None
) -> tuple[Inputs, jax.Array]:
    """Gradients of one chunk's inputs and of the state before it, given that state.

    d_out is the gradient of the chunk's outputs, d_next that of the state after it.
    """
    p = chunk_pairs(chunk, resets)
    size = chunk.r.shape[2]
    d_inner = d_out @ transpose(chunk.v)
    d_levels = d_inner[:, :, None] * level_masks(size, resets)
    d_rs, d_ks = d_levels @ p.ks, transpose(d_levels) @ p.rs
    d_itself = jnp.sum(d_out * chunk.v, axis=-1, keepdims=True)
    d_r_head, d_k_tail = d_out @ transpose(state), chunk.v @ transpose(d_next)
    last_token = (jnp.arange(size) == size - 1)[:, None]
    d_last = transpose(jnp.sum(d_next * state * p.end, axis=-1, keepdims=True))
    from_start = d_r_head * p.r_head + d_last * last_token
    d_exponents = jnp.concatenate(
        [p.rs * d_rs + levels(size).sign * (p.ks * d_ks), jnp.stack([from_start, d_k_tail * p.k_tail], axis=2)], axis=2
    )
    if resets is not None:
        d_r_head, d_k_tail = d_r_head * resets.head, d_k_tail * resets.tail
    d_chunk = Inputs(
        r=jnp.sum(d_rs * p.r_decay, axis=2) + d_r_head * p.from_start + d_itself * chunk.k,
        log_w=decay_gradient(d_exponents, resets),
        k=jnp.sum(d_ks * p.k_decay, axis=2) + d_k_tail * p.to_end + d_itself * chunk.r,
        v=transpose(p.inner) @ d_out + p.k_tail @ d_next,
    )
    return d_chunk, decayed(p, d_next) + transpose(p.r_head) @ d_out


def decay_gradient(d_exponents: jax.Array, resets: Resets | None) -> jax.Array:
    """d log_w [B,H,C,K] from the gradients [B,H,L+2,C,K] of all exponents, which are sums of log_w."""
    batch, heads, _, size, width = d_exponents.shape
    stacked = jnp.asarray(levels(size).sums.reshape(-1, size).T)
    stacked = jnp.broadcast_to(stacked, (batch, heads, *stacked.shape))
    d_log_w = stacked @ d_exponents.reshape(batch, heads, -1, width)
    return d_log_w if resets is None else d_log_w * resets.inside


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(
    size: int, inputs: Inputs, initial_state: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """All chunks one after the other; the inputs' length is a whole number of chunks."""
    return recurrence_forward(size, inputs, initial_state, starts)[0]


def recurrence_forward(size: int, inputs: Inputs, initial_state: jax.Array, starts: jax.Array | None) -> Any:
    """Keeps the inputs and the state each chunk begins with."""

    def step(carry: Any, index: jax.Array) -> Any:
        state, out = carry
        chunk = Inputs(*layout.take(inputs, index, size))
        chunk_out, next_state = chunk_forward(chunk, state, layout.resets(starts, index, size))
        return (next_state, layout.put(out, index, chunk_out)), state

    chunks = jnp.arange(inputs.r.shape[1] // size)
    (final_state, out), states = jax.lax.scan(step, (initial_state, jnp.zeros_like(inputs.v)), chunks)
    return (out, final_state), (inputs, starts, states)


def recurrence_backward(size: int, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The chunks in reverse."""
    inputs, starts, states = kept
    d_out, d_final = cotangents

    def step(carry: Any, xs: tuple[jax.Array, jax.Array]) -> Any:
        d_state, gradients = carry
        index, state = xs
        chunk = Inputs(*layout.take(inputs, index, size))
        (d_one,) = layout.take((d_out,), index, size)
        d_chunk, d_state = chunk_backward(chunk, state, d_one, d_state, layout.resets(starts, index, size))
        gradients = Inputs(*(layout.put(all_of, index, one) for all_of, one in zip(gradients, d_chunk, strict=True)))
        return (d_state, gradients), None

    start = (d_final, jax.tree.map(jnp.zeros_like, inputs))
    (d_initial, gradients), _ = jax.lax.scan(step, start, (jnp.arange(states.shape[0]), states), reverse=True)
    return gradients, d_initial, None


recurrence.defvjp(recurrence_forward, recurrence_backward)


def wkv6_chunked(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `wkv6`: fills the last chunk with tokens that leave the state alone."""
    length = r.shape[1]
    size = layout.fitting_chunk(length, chunk_size or DEFAULT_CHUNK_SIZE)
    inputs = Inputs(*(layout.pad(x, size) for x in (r, log_w, k, v)))
    starts = None if segment_ids is None else layout.pad(layout.boundaries(segment_ids), size)
    out, final_state = recurrence(size, inputs, initial_state, starts)
    return out[:, :length], final_state
