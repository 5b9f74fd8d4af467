"""wkv7 by chunks: only matrix products, with a backward pass written by hand.

Notation, per chunk of C tokens and with G the cumulative log decay from the chunk's start:
    A = a e^(G - log_w), R = r e^G, B = b e^-G, K = k e^-G,   [[AB, AK], [RB, RK]] = masked [A; R] [B; K]^T
    Y = A S + AK V,   U = (I - AB)^-1 Y,   O = R S + RB U + RK V,   S' = e^G_C (S + B^T U + K^T V)
A scan goes from chunk to chunk and does all of a chunk's work: its arrays are small enough to stay in cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.layout import Resets, transpose, transposed
from pallas_kernels.shared.triangular import invert_unit_lower

# A chunk by default: a quarter of the head size, within these. Pairs of tokens cost in proportion to a chunk's length,
# states to its inverse; measured on a CPU, forward and backward, 16 against 32 takes 0.9 of the time at K=64, and as
# long at K=128, where 32 keeps half as many states.
_CHUNK_SIZES = (16, 32)
# Below this sum of log_w over a chunk, quotients of float32 exponentials lose digits, then all of them.
_LOWEST_SUM = -81.0


class Inputs(NamedTuple):
    """The sequences: [B,T,H,K] and v [B,T,H,V], or one chunk of them: [B,H,C,K] and [B,H,C,V]."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array
    a: jax.Array
    b: jax.Array


class _Pairs(NamedTuple):
    """What a chunk holds beside its state, [B,H,...] float32.

    `ar` [2C,K] is [A; R], `bk` [2C,K] is [B; K], `inner` [2C,2C] is [[AB, AK], [RB, RK]], `inverse` [C,C] is
    (I - AB)^-1, `end` [K,1] is e^G_C; `a_decay`, `r_decay` and `grow` [C,K] are e^(G - log_w), e^G and e^-G.
    `ar_head` and `bk_tail` lack the tokens that resets part from the chunk's start or end.
    """

    ar: jax.Array
    bk: jax.Array
    ar_head: jax.Array
    bk_tail: jax.Array
    inner: jax.Array
    inverse: jax.Array
    end: jax.Array
    a_decay: jax.Array
    r_decay: jax.Array
    grow: jax.Array


def _visible(size: int, resets: Resets | None) -> jax.Array:
    """[2C,2C]: which tokens of [B; K] those of [A; R] see; A only earlier ones."""
    lower = jnp.tril(jnp.ones((size, size), jnp.float32))
    strict = lower - jnp.eye(size, dtype=jnp.float32)
    mask = jnp.block([[strict, strict], [lower, lower]])
    return mask if resets is None else mask * jnp.tile(resets.pairs, (1, 1, 2, 2))


def _twice(mask: jax.Array) -> jax.Array:
    """A mask of C rows for two stacked arrays of C rows."""
    return jnp.concatenate([mask, mask], axis=-2)


def _chunk_pairs(chunk: Inputs, resets: Resets | None) -> _Pairs:
    """Everything of one chunk that does not depend on its state."""
    size = chunk.r.shape[-2]
    total = layout.prefix_sums(chunk.log_w)
    total = jnp.where(total < _LOWEST_SUM, jnp.nan, total)
    a_decay, r_decay, grow = jnp.exp(total - chunk.log_w), jnp.exp(total), jnp.exp(-total)
    ar = jnp.concatenate([chunk.a * a_decay, chunk.r * r_decay], axis=-2)
    bk = jnp.concatenate([chunk.b * grow, chunk.k * grow], axis=-2)
    inner = (ar @ transpose(bk)) * _visible(size, resets)
    inverse = invert_unit_lower(inner[..., :size, :size])
    end = transpose(r_decay[..., -1:, :])
    if resets is None:
        return _Pairs(ar, bk, ar, bk, inner, inverse, end, a_decay, r_decay, grow)
    ar_head, bk_tail = ar * _twice(resets.head), bk * _twice(resets.tail)
    return _Pairs(ar, bk, ar_head, bk_tail, inner, inverse, end, a_decay, r_decay, grow)


def _chunk_forward(chunk: Inputs, state: jax.Array, resets: Resets | None) -> tuple[jax.Array, jax.Array]:
    """Outputs [B,H,C,V] of one chunk and the state after it."""
    size = chunk.r.shape[-2]
    p = _chunk_pairs(chunk, resets)
    from_state = p.ar_head @ state
    u = p.inverse @ (from_state[..., :size, :] + p.inner[..., :size, size:] @ chunk.v)
    uv = jnp.concatenate([u, chunk.v], axis=-2)
    out = from_state[..., size:, :] + p.inner[..., size:, :] @ uv
    kept = state if resets is None else resets.keep * state
    return out, p.end * (kept + transposed(p.bk_tail) @ uv)


def _chunk_backward(
    chunk: Inputs,
    state: jax.Array,
    next_state: jax.Array,
    d_out: jax.Array,
    d_next: jax.Array,
    resets: Resets | None,
) -> tuple[Inputs, jax.Array]:
    """Gradients of one chunk's inputs and of the state before it, given the states around it.

    d_out is the gradient of the chunk's outputs, d_next that of the state after it.
    """
    size = chunk.r.shape[-2]
    p = _chunk_pairs(chunk, resets)
    u = p.inverse @ (p.ar_head[..., :size, :] @ state + p.inner[..., :size, size:] @ chunk.v)
    uv = jnp.concatenate([u, chunk.v], axis=-2)
    d_end = p.end * d_next
    d_uv = p.bk_tail @ d_end + transposed(p.inner[..., size:, :]) @ d_out
    d_y = transposed(p.inverse) @ d_uv[..., :size, :]
    d_v = d_uv[..., size:, :] + transposed(p.inner[..., :size, size:]) @ d_y
    d_yo = jnp.concatenate([d_y, d_out], axis=-2)
    d_inner = (d_yo @ transpose(uv)) * _visible(size, resets)
    d_ar = d_yo @ transpose(state)
    d_bk = uv @ transpose(d_end)
    d_state = d_end
    if resets is not None:
        d_ar, d_bk = d_ar * _twice(resets.head), d_bk * _twice(resets.tail)
        d_state = resets.keep * d_end
    d_ar = d_ar + d_inner @ p.bk
    d_bk = d_bk + transposed(d_inner) @ p.ar
    d_state = d_state + transposed(p.ar_head) @ d_yo
    d_last = transpose(layout.row_sums(d_next * next_state))
    d_log_w = _decay_gradient(p, d_ar, d_bk, d_last, resets)
    d_a, d_r = d_ar[..., :size, :] * p.a_decay, d_ar[..., size:, :] * p.r_decay
    d_b, d_k = d_bk[..., :size, :] * p.grow, d_bk[..., size:, :] * p.grow
    return Inputs(d_r, d_log_w, d_k, d_v, d_a, d_b), d_state


def _decay_gradient(p: _Pairs, d_ar: jax.Array, d_bk: jax.Array, d_last: jax.Array, resets: Resets | None) -> jax.Array:
    """d log_w [B,H,C,K] from the gradients of [A; R], [B; K] and G_C [1,K].

    d G_t = R_t dR_t + A_{t+1} dA_{t+1} - B_t dB_t - K_t dK_t; d log_w_t is their sum from t to the chunk's end.
    """
    size = p.inverse.shape[-1]
    ar_part, bk_part = p.ar * d_ar, p.bk * d_bk
    a_part = ar_part[..., :size, :]
    d_total = ar_part[..., size:, :] + a_part - bk_part[..., :size, :] - bk_part[..., size:, :]
    d_log_w = layout.suffix_sums(d_total) - a_part + d_last
    return d_log_w if resets is None else d_log_w * resets.inside


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(
    size: int, inputs: Inputs, initial_state: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """All chunks one after the other; the inputs' length is a whole number of chunks."""
    return _recurrence_forward(size, inputs, initial_state, starts)[0]


def _recurrence_forward(size: int, inputs: Inputs, initial_state: jax.Array, starts: jax.Array | None) -> Any:
    """Keeps the inputs and the state each chunk begins with."""

    def step(carry: Any, index: jax.Array) -> Any:
        state, out = carry
        chunk = Inputs(*layout.take(inputs, index, size))
        chunk_out, next_state = _chunk_forward(chunk, state, layout.resets(starts, index, size))
        return (next_state, layout.put(out, index, chunk_out)), state

    chunks = jnp.arange(inputs.r.shape[1] // size)
    (final_state, out), states = jax.lax.scan(step, (initial_state, jnp.zeros_like(inputs.v)), chunks)
    return (out, final_state), (inputs, starts, states, final_state)


def _recurrence_backward(size: int, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The chunks in reverse."""
    inputs, starts, states, final_state = kept
    d_out, d_final = cotangents

    def step(carry: Any, xs: tuple[jax.Array, jax.Array]) -> Any:
        next_state, d_state, gradients = carry
        index, state = xs
        chunk = Inputs(*layout.take(inputs, index, size))
        (d_one,) = layout.take((d_out,), index, size)
        resets = layout.resets(starts, index, size)
        d_chunk, d_state = _chunk_backward(chunk, state, next_state, d_one, d_state, resets)
        gradients = Inputs(
            *(layout.put(all_of, index, gradient) for all_of, gradient in zip(gradients, d_chunk, strict=True))
        )
        return (state, d_state, gradients), None

    start = (final_state, d_final, jax.tree.map(jnp.zeros_like, inputs))
    (_, d_initial, gradients), _ = jax.lax.scan(step, start, (jnp.arange(states.shape[0]), states), reverse=True)
    return gradients, d_initial, None


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def wkv7_chunked(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `wkv7`: fills the last chunk with tokens that leave the state alone."""
    length = r.shape[1]
    default = min(max(r.shape[-1] // 4, _CHUNK_SIZES[0]), _CHUNK_SIZES[1])
    size = layout.fitting_chunk(length, chunk_size or default)
    inputs = Inputs(*(layout.pad(x, size) for x in (r, log_w, k, v, a, b)))
    starts = None if segment_ids is None else layout.pad(layout.boundaries(segment_ids), size)
    out, final_state = recurrence(size, inputs, initial_state, starts)
    return out[:, :length], final_state
