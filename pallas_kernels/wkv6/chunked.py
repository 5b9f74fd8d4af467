"""wkv6 by chunks: only matrix products, with a backward pass written by hand.

Notation, per chunk of C tokens, with G the cumulative log decay and M its value at the chunk's middle token:
    R = r e^(G - M), K = k e^(M - G), X = e^M S,   O = R X + tril(R K^T) V,   S' = e^(G_C - M) (X + K^T V)
All of a chunk is counted from its middle, so that one pair of exponentials serves tokens and states alike. From one
chunk's X to the next's is one decay, e^(G_C - M) of the one and e^M of the other.
A scan goes from chunk to chunk and does all of a chunk's work: its arrays are small enough to stay in cache.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.layout import Resets, transpose, transposed

_DEFAULT_CHUNK_SIZE = 16
# The lowest sum of log_w over half a chunk: its exponential scales a state, which float32 must hold with what is read
# from it, and its inverse a chunk's keys.
_LOWEST_SUM = -60.0


class Inputs(NamedTuple):
    """The sequences: [B,T,H,K] and v [B,T,H,V], or one chunk of them: [B,H,C,K] and [B,H,C,V]."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array


class _Decays(NamedTuple):
    """What a chunk makes of log_w, [B,H,...] float32.

    `since` and `until` [C,K] are e^(G - M) and e^(M - G); `before` and `after` [1,K] are M and G_C - M.
    """

    since: jax.Array
    until: jax.Array
    before: jax.Array
    after: jax.Array


class _Carried(NamedTuple):
    """What goes from chunk to chunk, in either direction: the state is e^log_decay (state + update).

    `state` and `update` [B,H,K,V] as of the middle of the chunk they come from, `log_decay` [B,H,1,K] from there to its
    edge.
    """

    state: jax.Array
    update: jax.Array
    log_decay: jax.Array


def _carried(state: jax.Array) -> _Carried:
    """A state outside of all chunks."""
    return _Carried(state, jnp.zeros_like(state), jnp.zeros_like(transpose(state[..., :1])))


def _decays(log_w: jax.Array) -> _Decays:
    """Sums from the middle of a chunk [B,H,C,K] to each of its tokens, and their exponentials."""
    size = log_w.shape[2]
    index, middle = jnp.arange(size), max(size // 2, 1) - 1
    row, column = index[:, None], index[None, :]
    after, before = (column > middle) & (column <= row), (column > row) & (column <= middle)
    sums = layout.summed(after.astype(jnp.float32) - before.astype(jnp.float32), log_w)
    since = jnp.exp(jnp.where(jnp.abs(sums) > -_LOWEST_SUM, jnp.nan, sums))
    return _Decays(since, 1 / since, log_w[:, :, :1] - sums[:, :, :1], sums[:, :, -1:])


def _decayed(last: _Carried, log_decay: jax.Array | None = None) -> jax.Array:
    """The state handed over, at its chunk's end, or decayed by a further log_decay [B,H,1,K].

    Strong decays are taken one after the other, since a state's update is as large as their product may be small. Of a
    weak one the change is added: over a thousand chunks of the same decay the rounding of a factor just below one
    would add up, always to the same side.
    """
    state = last.state + last.update
    further = jnp.zeros_like(last.log_decay) if log_decay is None else log_decay
    total = last.log_decay + further
    weak = total > -0.5
    kept = weak.astype(jnp.float32)
    first = jnp.where(weak, 1.0, jnp.exp(last.log_decay))
    second = jnp.where(weak, jnp.expm1(total), jnp.exp(further))
    return transpose(kept) * state + transpose(second) * (transpose(first) * state)


def _visible(size: int, resets: Resets | None, itself: bool) -> jax.Array:
    """[C,C] bool, with resets [B,1,C,C]: the tokens of its segment before each one, and `itself`."""
    mask = jnp.tril(jnp.ones((size, size), bool), 0 if itself else -1)
    return mask if resets is None else mask & (resets.pairs > 0)


def _chunk_forward(chunk: Inputs, d: _Decays, x: jax.Array, resets: Resets | None) -> tuple[jax.Array, _Carried]:
    """Outputs [B,H,C,V] of one chunk, and what it hands to the next."""
    rs, ks = chunk.r * d.since, chunk.k * d.until
    # Pairs that are not visible may overflow: they are left out, not multiplied by zero.
    inner = jnp.where(_visible(chunk.r.shape[2], resets, True), rs @ transpose(ks), 0.0)
    kept = x
    if resets is not None:
        rs, ks, kept = rs * resets.head, ks * resets.tail, x * resets.keep
    return rs @ x + inner @ chunk.v, _Carried(kept, transposed(ks) @ chunk.v, d.after)


def _chunk_backward(
    chunk: Inputs, d: _Decays, x: jax.Array, d_out: jax.Array, d_end: jax.Array, resets: Resets | None
) -> tuple[Inputs, _Carried]:
    """Gradients of one chunk's inputs, and what it hands to the chunk before it.

    x is the chunk's X, d_out the gradient of its outputs, d_end that of X + K^T V.
    """
    size = chunk.r.shape[2]
    rs, ks = chunk.r * d.since, chunk.k * d.until
    inner = jnp.where(_visible(size, resets, True), rs @ transpose(ks), 0.0)
    products = d_out @ transpose(chunk.v)
    d_inner = jnp.where(_visible(size, resets, False), products, 0.0)
    d_itself = layout.row_sums(products * jnp.eye(size))
    d_rs, d_ks = d_inner @ ks, transposed(d_inner) @ rs
    d_head, d_tail = d_out @ transpose(x), chunk.v @ transpose(d_end)
    kept, rs_head, ks_tail = d_end, rs, ks
    if resets is not None:
        d_head, d_tail = d_head * resets.head, d_tail * resets.tail
        kept, rs_head, ks_tail = d_end * resets.keep, rs * resets.head, ks * resets.tail
    d_rs = d_rs + d_head
    d_chunk = Inputs(
        r=d_rs * d.since + d_itself * chunk.k,
        log_w=_decay_gradient(rs * d_rs - ks * d_ks, ks * d_tail, transpose(layout.row_sums(kept * x)), resets),
        k=(d_ks + d_tail) * d.until + d_itself * chunk.r,
        v=transposed(inner) @ d_out + ks_tail @ d_end,
    )
    return d_chunk, _Carried(kept, transposed(rs_head) @ d_out, d.before)


def _decay_gradient(d_total: jax.Array, d_rest: jax.Array, d_end: jax.Array, resets: Resets | None) -> jax.Array:
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
    return _recurrence_forward(size, inputs, initial_state, starts)[0]


def _recurrence_forward(size: int, inputs: Inputs, initial_state: jax.Array, starts: jax.Array | None) -> Any:
    """Keeps the inputs and each chunk's X."""

    def step(carry: Any, index: jax.Array) -> Any:
        last, out = carry
        chunk = Inputs(*layout.take(inputs, index, size))
        d = _decays(chunk.log_w)
        x = _decayed(last, d.before)
        chunk_out, last = _chunk_forward(chunk, d, x, layout.resets(starts, index, size))
        return (last, layout.put(out, index, chunk_out)), x

    chunks = jnp.arange(inputs.r.shape[1] // size)
    (last, out), xs = jax.lax.scan(step, (_carried(initial_state), jnp.zeros_like(inputs.v)), chunks)
    return (out, _decayed(last)), (inputs, starts, xs)


def _recurrence_backward(size: int, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The chunks in reverse."""
    inputs, starts, all_x = kept
    d_out, d_final = cotangents

    def step(carry: Any, xs: tuple[jax.Array, jax.Array]) -> Any:
        following, gradients = carry
        index, x = xs
        chunk = Inputs(*layout.take(inputs, index, size))
        (d_one,) = layout.take((d_out,), index, size)
        d = _decays(chunk.log_w)
        d_end = _decayed(following, d.after)
        d_chunk, following = _chunk_backward(chunk, d, x, d_one, d_end, layout.resets(starts, index, size))
        gradients = Inputs(
            *(layout.put(all_of, index, gradient) for all_of, gradient in zip(gradients, d_chunk, strict=True))
        )
        return (following, gradients), None

    start = (_carried(d_final), jax.tree.map(jnp.zeros_like, inputs))
    (first, gradients), _ = jax.lax.scan(step, start, (jnp.arange(all_x.shape[0]), all_x), reverse=True)
    return gradients, _decayed(first), None


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


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
    size = layout.fitting_chunk(length, chunk_size or _DEFAULT_CHUNK_SIZE)
    inputs = Inputs(*(layout.pad(x, size) for x in (r, log_w, k, v)))
    starts = None if segment_ids is None else layout.pad(layout.boundaries(segment_ids), size)
    out, final_state = recurrence(size, inputs, initial_state, starts)
    return out[:, :length], final_state
