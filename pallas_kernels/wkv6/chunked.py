"""wkv6 by chunks: only matrix products, with a backward pass written by hand.

Notation, per chunk of C tokens, with G the cumulative log decay and M its value at the chunk's middle:
    R = r e^(G - M), K = k e^(M - G),   O = r e^G S + (tril(R K^T, -1) + diag(r k^T)) V,
    S' = e^G_C S + (k e^(G_C - G))^T V
Decays of -5 a token make these exponents large: they are summed exactly (`exponents`), so that a quotient of two
exponentials has no more error than one of them.
A scan goes from chunk to chunk and does all of a chunk's work: its arrays are small enough to stay in cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.layout import Resets, transpose, transposed

DEFAULT_CHUNK_SIZE = 16
# Multiples of this add up exactly in float32 as long as the sums stay above -1024.
GRID = 2.0**-14
# Below this sum of log_w over half a chunk, quotients of float32 exponentials lose digits, then all of them.
LOWEST_SUM = -81.0


class Inputs(NamedTuple):
    """The sequences: [B,T,H,K] and v [B,T,H,V], or one chunk of them: [B,H,C,K] and [B,H,C,V]."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array


class Pairs(NamedTuple):
    """What a chunk holds beside its state, [B,H,...] float32.

    `r_decay` and `k_decay` [C,K] are e^(G - M) and e^(M - G), `rs` and `ks` r and k times those; `from_start` and
    `to_end` [C,K] are e^G and e^(G_C - G), `r_head` and `k_tail` r and k times those, without the tokens that resets
    part from the chunk's start or end; `inner` [C,C] holds the pairs i >= j; `end` and `rest` [K,1] are e^G_C rounded
    to float32 and what the rounding left out.
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


def exponents(log_w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """G as two terms [B,H,C,K]: a sum of multiples of GRID, which is exact, and that of the small remainders."""
    coarse = jnp.round(log_w * (1 / GRID)) * GRID
    sums = layout.prefix_sums(jnp.concatenate([coarse, log_w - coarse], axis=-1))
    return sums[..., : log_w.shape[-1]], sums[..., log_w.shape[-1] :]


def exponential(coarse: jax.Array, fine: jax.Array) -> jax.Array:
    """e^(coarse + fine); |fine| is at most GRID times a chunk's tokens: three terms of its series are enough."""
    return jnp.exp(coarse) * (1 + fine + 0.5 * fine * fine)


def earlier(size: int, resets: Resets | None) -> jax.Array:
    """[C,C] bool, with resets [B,1,C,C]: the tokens before each one, in its segment."""
    mask = jnp.tril(jnp.ones((size, size), bool), -1)
    return mask if resets is None else mask & (resets.pairs > 0)


def chunk_pairs(chunk: Inputs, resets: Resets | None) -> Pairs:
    """Everything of one chunk that does not depend on its state."""
    size = chunk.r.shape[2]
    coarse, fine = exponents(chunk.log_w)
    half = max(size // 2, 1)
    middle, last = slice(half - 1, half), slice(size - 1, size)
    centred, small = coarse - coarse[:, :, middle], fine - fine[:, :, middle]
    centred = jnp.where(jnp.abs(centred) > -LOWEST_SUM, jnp.nan, centred)
    r_decay, k_decay = exponential(centred, small), exponential(-centred, -small)
    from_start = r_decay * exponential(coarse[:, :, middle], fine[:, :, middle])
    to_end = k_decay * r_decay[:, :, last]
    rs, ks = chunk.r * r_decay, chunk.k * k_decay
    itself = jnp.sum(chunk.r * chunk.k, axis=-1, keepdims=True) * jnp.eye(size, dtype=jnp.float32)
    # Pairs that are not `earlier` may overflow: they are left out, not multiplied by zero.
    inner = jnp.where(earlier(size, resets), rs @ transpose(ks), 0.0) + itself
    r_head, k_tail = chunk.r * from_start, chunk.k * to_end
    end, rest = chunk_decay(transpose(coarse[:, :, last]), transpose(fine[:, :, last]))
    if resets is not None:
        r_head, k_tail = r_head * resets.head, k_tail * resets.tail
        end, rest = end * resets.keep, rest * resets.keep
    return Pairs(r_decay, k_decay, rs, ks, from_start, to_end, r_head, k_tail, inner, end, rest)


def chunk_decay(coarse: jax.Array, fine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """e^(coarse + fine) as a float32 and the remainder, kept where decay is weak.

    Over a thousand chunks of the same weak decay the rounding of e^total would add up, always to the same side.
    """
    end = exponential(coarse, fine)
    return end, jnp.where(end > 0.5, jnp.expm1(coarse + fine) - (end - 1.0), 0.0)


def decayed(p: Pairs, state: jax.Array) -> jax.Array:
    """diag(e^G_C) state."""
    return p.end * state + p.rest * state


def chunk_forward(chunk: Inputs, state: jax.Array, resets: Resets | None) -> tuple[jax.Array, jax.Array]:
    """Outputs [B,H,C,V] of one chunk and the state after it."""
    p = chunk_pairs(chunk, resets)
    return p.r_head @ state + p.inner @ chunk.v, decayed(p, state) + transposed(p.k_tail) @ chunk.v


def chunk_backward(
    chunk: Inputs, state: jax.Array, d_out: jax.Array, d_next: jax.Array, resets: Resets | None
) -> tuple[Inputs, jax.Array]:
    """Gradients of one chunk's inputs and of the state before it, given that state.

    d_out is the gradient of the chunk's outputs, d_next that of the state after it.
    """
    p = chunk_pairs(chunk, resets)
    d_inner = jnp.where(earlier(chunk.r.shape[2], resets), d_out @ transpose(chunk.v), 0.0)
    d_rs, d_ks = d_inner @ p.ks, transposed(d_inner) @ p.rs
    d_itself = jnp.sum(d_out * chunk.v, axis=-1, keepdims=True)
    d_r_head, d_k_tail = d_out @ transpose(state), chunk.v @ transpose(d_next)
    if resets is not None:
        d_r_head, d_k_tail = d_r_head * resets.head, d_k_tail * resets.tail
    d_end = transpose(p.end * layout.row_sums(d_next * state))
    d_chunk = Inputs(
        r=d_rs * p.r_decay + d_r_head * p.from_start + d_itself * chunk.k,
        log_w=decay_gradient(p.rs * d_rs - p.ks * d_ks + p.r_head * d_r_head, p.k_tail * d_k_tail, d_end, resets),
        k=d_ks * p.k_decay + d_k_tail * p.to_end + d_itself * chunk.r,
        v=transposed(p.inner) @ d_out + p.k_tail @ d_next,
    )
    return d_chunk, decayed(p, d_next) + transposed(p.r_head) @ d_out


def decay_gradient(d_total: jax.Array, d_rest: jax.Array, d_end: jax.Array, resets: Resets | None) -> jax.Array:
    """d log_w [B,H,C,K]: the gradients of G from each token on, of G_C - G of the tokens before, and of G_C [1,K]."""
    size = d_total.shape[2]
    later = jnp.triu(jnp.ones((size, size), jnp.float32))
    d_log_w = layout.summed(later, d_total) + layout.summed(1 - later, d_rest) + d_end
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
