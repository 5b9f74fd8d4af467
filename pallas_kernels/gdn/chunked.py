"""gdn by chunks: only matrix products, with a backward pass written by hand.

Notation, per chunk of C tokens and with G the cumulative log decay from the chunk's start:
    D = e^(G_i - G_j) for i >= j, else 0,   A = tril(diag(beta) (K K^T * D), -1),   P = Q K^T * D
    Z = V - e^G K S,   U = (I + A)^-1 diag(beta) Z,   O = e^G Q S + P U,   S' = e^G_C S + (e^(G_C - G) K)^T U
No exponent is positive, so that any decay is safe, and a reset is one of e^_RESET, which is zero. A scan goes from
chunk to chunk and does all of a chunk's work: its arrays are small enough to stay in cache, those of key heads that
serve several heads included.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.layout import row_sums, transpose, transposed
from pallas_kernels.shared.triangular import invert_unit_lower

# A chunk by default: a quarter of the head size, within these, as for wkv7.
_CHUNK_SIZES = (16, 32)
# Decays are summed in two parts, multiples of 1/_STEPS and the rest. Sums of the first are exact and the others' small:
# a weak decay between two tokens is right to its last digits after any strong one before them.
_STEPS = 16.0
_RESET = -128.0


class _Inputs(NamedTuple):
    """The sequences as `gdn` takes them, or one chunk of them: [B,G,C,K], v [B,H,C,V], log_g and beta [B,H,C]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_g: jax.Array
    beta: jax.Array


class _Decays(NamedTuple):
    """What a chunk makes of log_g, [B,H,...] float32.

    `pairs` [C,C] is D, `start` [C,1] e^G, `rest` [C,1] e^(G_C - G). The state's own decay is kept + end, [1,1]: of a
    weak one the change is added, since over a thousand chunks of the same decay the rounding of a factor just below
    one would add up, always to the same side.
    """

    pairs: jax.Array
    start: jax.Array
    rest: jax.Array
    kept: jax.Array
    end: jax.Array


class _Pairs(NamedTuple):
    """A chunk but for its state, [B,...] float32: kq = [K; Q] [G,2C,K], `products` = [K; Q] K^T [H,2C,C].

    `between` [H,2C,C] are the products' decays, those with K for j < i alone; `inner` is P, `inverse` (I + A)^-1.
    """

    kq: jax.Array
    products: jax.Array
    between: jax.Array
    inner: jax.Array
    inverse: jax.Array


def _of_heads(x: jax.Array, heads: int) -> jax.Array:
    """x [B,G,...] for each of the heads that share it, [B,H,...]."""
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def of_groups(x: jax.Array, groups: int) -> jax.Array:
    """x [B,H,...] summed over the heads that share a key head, [B,G,...]."""
    return x if x.shape[1] == groups else x.reshape(x.shape[0], groups, -1, *x.shape[2:]).sum(2)


def two_parts(log_g: jax.Array) -> jax.Array:
    """[2,...]: multiples of 1/_STEPS, and what is left."""
    coarse = jnp.round(log_g * _STEPS) / _STEPS
    return jnp.stack([coarse, log_g - coarse])


def with_resets(log_g: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """log_g [B,T,H] with _RESET in the place of the decays that a new segment makes nothing of."""
    if segment_ids is None:
        return log_g
    return jnp.where(layout.boundaries(segment_ids)[..., None], _RESET, log_g)


def _decays(log_g: jax.Array) -> _Decays:
    """log_g [B,H,C]."""
    size = log_g.shape[-1]
    coarse, fine = layout.prefix_sums(two_parts(log_g)[..., None])
    gap = (coarse - transpose(coarse)) + (fine - transpose(fine))
    pairs = jnp.exp(jnp.where(jnp.tril(jnp.ones((size, size), bool)), gap, -jnp.inf))
    start, total = jnp.exp(coarse + fine), coarse[..., -1:, :] + fine[..., -1:, :]
    weak = total > -0.5
    kept, end = weak.astype(jnp.float32), jnp.where(weak, jnp.expm1(total), jnp.exp(total))
    return _Decays(pairs, start, transpose(pairs[..., -1:, :]), kept, end)


def _chunk_pairs(chunk: _Inputs, d: _Decays) -> _Pairs:
    """Everything of one chunk that does not depend on its state."""
    size, heads = chunk.q.shape[-2], chunk.v.shape[1]
    kq = jnp.concatenate([chunk.k, chunk.q], axis=-2)
    products = _of_heads(kq @ transpose(chunk.k), heads)
    strict = d.pairs * (1 - jnp.eye(size, dtype=jnp.float32))
    between = jnp.concatenate([strict, d.pairs], axis=-2)
    inner = products * between
    inverse = invert_unit_lower(-chunk.beta[..., None] * inner[..., :size, :])
    return _Pairs(kq, products, between, inner[..., size:, :], inverse)


def _chunk_forward(chunk: _Inputs, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Outputs [B,H,C,V] of one chunk and the state after it."""
    size, heads = chunk.q.shape[-2], chunk.v.shape[1]
    d = _decays(chunk.log_g)
    p = _chunk_pairs(chunk, d)
    seen = _of_heads(p.kq, heads) @ state
    z = chunk.v - d.start * seen[..., :size, :]
    u = p.inverse @ (chunk.beta[..., None] * z)
    out = d.start * seen[..., size:, :] + p.inner @ u
    written = transposed(d.rest * _of_heads(chunk.k, heads)) @ u
    return out, d.kept * state + (d.end * state + written)


def _chunk_backward(chunk: _Inputs, state: jax.Array, d_out: jax.Array, d_next: jax.Array) -> tuple[_Inputs, jax.Array]:
    """Gradients of one chunk's inputs and of the state before it.

    d_out is the gradient of the chunk's outputs, d_next that of the state after it.
    """
    size, groups, heads = chunk.q.shape[-2], chunk.q.shape[1], chunk.v.shape[1]
    d, beta = _decays(chunk.log_g), chunk.beta[..., None]
    p = _chunk_pairs(chunk, d)
    start = jnp.concatenate([d.start, d.start], axis=-2)
    kq_start, k_rest = start * _of_heads(p.kq, heads), d.rest * _of_heads(chunk.k, heads)
    seen = kq_start @ state
    z = chunk.v - seen[..., :size, :]
    u = p.inverse @ (beta * z)
    into_state = k_rest @ d_next
    d_y = transposed(p.inverse) @ (transposed(p.inner) @ d_out + into_state)
    d_v = beta * d_y
    d_seen = jnp.concatenate([-d_v, d_out], axis=-2)
    d_inner = (jnp.concatenate([-d_y, d_out], axis=-2) @ transpose(u)) * p.between
    exponents = d_inner * p.products
    d_beta = row_sums(exponents[..., :size, :]) + row_sums(d_y * z)
    weights = jnp.concatenate([beta, jnp.ones_like(beta)], axis=-2)
    d_pairs = of_groups(weights * d_inner, groups)
    d_kq = of_groups(start * (d_seen @ transpose(state)), groups) + d_pairs @ chunk.k
    d_k = transposed(d_pairs) @ p.kq + of_groups(d.rest * (u @ transpose(d_next)), groups)
    from_start = row_sums(d_seen * seen)
    d_start = from_start[..., :size, :] + from_start[..., size:, :]
    exponents = beta * exponents[..., :size, :] + exponents[..., size:, :] * (1 - jnp.eye(size))
    d_log_g = _decay_gradient(exponents, d_start, row_sums(u * into_state), d, jnp.sum(d_next * state, (-2, -1)))
    d_state = d.kept * d_next + (d.end * d_next + transposed(kq_start) @ d_seen)
    d_chunk = _Inputs(d_kq[..., size:, :], d_kq[..., :size, :] + d_k, d_v, d_log_g, d_beta[..., 0])
    return d_chunk, d_state


def _decay_gradient(
    exponents: jax.Array, d_start: jax.Array, d_rest: jax.Array, d: _Decays, d_end: jax.Array
) -> jax.Array:
    """d log_g [B,H,C] from the gradients of G_i - G_j [C,C], of G [C,1], of G_C - G [C,1], and of the state's decay.

    A token's decay is in each G from it on, in each G_C - G before it, and in each pair that it parts.
    """
    size = exponents.shape[-1]
    later = jnp.triu(jnp.ones((size, size), jnp.float32))
    d_total = row_sums(exponents) - row_sums(transpose(exponents)) + d_start
    d_log_g = layout.summed(later, d_total) + layout.summed(1 - later, d_rest)
    return d_log_g[..., 0] + (d.kept + d.end)[..., 0] * d_end[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(size: int, inputs: _Inputs, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All chunks one after the other; the inputs' length is a whole number of chunks."""
    return _recurrence_forward(size, inputs, initial_state)[0]


def _recurrence_forward(size: int, inputs: _Inputs, initial_state: jax.Array) -> Any:
    """Keeps the inputs and the state each chunk begins with."""

    def step(carry: Any, index: jax.Array) -> Any:
        state, out = carry
        chunk = _Inputs(*layout.take(inputs, index, size))
        chunk_out, next_state = _chunk_forward(chunk, state)
        return (next_state, layout.put(out, index, chunk_out)), state

    chunks = jnp.arange(inputs.q.shape[1] // size)
    (final_state, out), states = jax.lax.scan(step, (initial_state, jnp.zeros_like(inputs.v)), chunks)
    return (out, final_state), (inputs, states)


def _recurrence_backward(size: int, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The chunks in reverse."""
    inputs, states = kept
    d_out, d_final = cotangents

    def step(carry: Any, xs: tuple[jax.Array, jax.Array]) -> Any:
        d_state, gradients = carry
        index, state = xs
        chunk = _Inputs(*layout.take(inputs, index, size))
        (d_one,) = layout.take((d_out,), index, size)
        d_chunk, d_state = _chunk_backward(chunk, state, d_one, d_state)
        gradients = _Inputs(
            *(layout.put(all_of, index, gradient) for all_of, gradient in zip(gradients, d_chunk, strict=True))
        )
        return (d_state, gradients), None

    start = (d_final, jax.tree.map(jnp.zeros_like, inputs))
    (d_initial, gradients), _ = jax.lax.scan(step, start, (jnp.arange(states.shape[0]), states), reverse=True)
    return gradients, d_initial


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def gdn_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gdn`: fills the last chunk with tokens that leave the state alone."""
    length = q.shape[1]
    default = min(max(q.shape[-1] // 4, _CHUNK_SIZES[0]), _CHUNK_SIZES[1])
    size = layout.fitting_chunk(length, chunk_size or default)
    inputs = _Inputs(*(layout.pad(x, size) for x in (q, k, v, with_resets(log_g, segment_ids), beta)))
    out, final_state = recurrence(size, inputs, initial_state)
    return out[:, :length], final_state
