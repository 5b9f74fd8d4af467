"""The forward and the backward kernel of wkv6 on TPU, for lists of heads: one list per step, so that heads overlap.

Exponents are those of `levels`, the last two from the chunk's start and to its end. A level's array serves
twice: X holds decayed receptances in the later of two neighbouring spans and decayed keys in the earlier one, so that
X X^T has all of the level's pairs and, with D = dO V^T + V dO^T under the level's mask, D X has the gradients of both.
States are kept transposed, [V,K]: a decay is then one row, as everything else that belongs to key channels.
Eight heads together spill registers to VMEM, whose slots are free: one after the other, forward takes a third longer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.shared import tpu
from pallas_kernels.shared.triangular_tpu import NN, NT, TN
from pallas_kernels.wkv6.levels import GROUP

# The hardware has 2^x.
_LOG2_E = 1.4426950408889634


class Plan(NamedTuple):
    """How the work is cut: a chunk of `size` tokens and `heads` heads a grid step; matrix products in `dtype`."""

    size: int
    heads: int
    key_size: int
    value_size: int
    dtype: Any

    @property
    def spans(self) -> list[int]:
        return [1 << n for n in range(self.size.bit_length() - 1) if 1 << n >= GROUP]

    def keys(self, head: int) -> slice:
        return slice(head * self.key_size, (head + 1) * self.key_size)

    def values(self, head: int) -> slice:
        return slice(head * self.value_size, (head + 1) * self.value_size)

    def dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        return tpu.dot(x, y, axes, self.dtype)


class _Resets(NamedTuple):
    """As in `layout.Resets`, float32: `pairs` [C,C], `head`, `tail` and `inside` [C,1]."""

    pairs: jax.Array
    head: jax.Array
    tail: jax.Array
    inside: jax.Array


class _Chunk(NamedTuple):
    """One head's chunk: r, k [C,K] float32, v [C,V] in plan.dtype, L+2 exponents in log2 [C,K] float32."""

    r: jax.Array
    k: jax.Array
    v: jax.Array
    exponents: list[jax.Array]


def _find_resets(plan: Plan, counts: jax.Array | None) -> _Resets | None:
    """counts [1,C] float32: resets from the chunk's start to each token, itself included."""
    if counts is None:
        return None
    size = plan.size
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    mine = jnp.sum(jnp.where(row == column, counts, 0.0), axis=1, keepdims=True)
    before = jnp.sum(jnp.where(row == column + 1, counts, 0.0), axis=1, keepdims=True)
    masks = (mine == counts, mine == 0.0, mine == counts[:, size - 1 :], mine == before)
    return _Resets(*(jnp.where(mask, 1.0, 0.0) for mask in masks))


def _read_chunks(plan: Plan, sums: Any, r: Any, log_w: Any, k: Any, v: Any) -> list[_Chunk]:
    """Every head of a block; `sums` [3C,C], and [3C,2C] where products are bfloat16.

    log_w is then the sum of two bfloat16 numbers, so that 16 of its bits count.
    """
    scaled = log_w[0].astype(jnp.float32) * _LOG2_E
    if plan.dtype == jnp.bfloat16:
        high = scaled.astype(jnp.bfloat16)
        low = (scaled - high.astype(jnp.float32)).astype(jnp.bfloat16)
        scaled = jnp.concatenate([high, low], axis=0)
    in_groups = plan.dot(sums[...], scaled, NN)

    def one(head: int) -> _Chunk:
        keys = plan.keys(head)
        exponents = _all_exponents(plan, *jnp.split(in_groups[:, keys], 3))
        r_one, k_one = (x[0, :, keys].astype(jnp.float32) for x in (r, k))
        return _Chunk(r_one, k_one, v[0, :, plan.values(head)].astype(plan.dtype), exponents)

    return [one(head) for head in range(plan.heads)]


def _all_exponents(plan: Plan, centred: jax.Array, prefix: jax.Array, suffix: jax.Array) -> list[jax.Array]:
    """Every exponent [C,K] from those within groups: two neighbouring spans' sums make those of the span of both."""
    exponents = [centred]
    for span in plan.spans:
        exponents.append(_alternate(prefix, suffix, span))
        prefixes, suffixes = [], []
        for start in range(0, plan.size, 2 * span):
            middle, end = start + span, start + 2 * span
            prefixes += [prefix[start:middle], prefix[middle:end] + prefix[middle - 1 : middle]]
            suffixes += [suffix[start:middle] + prefix[end - 1 : end], suffix[middle:end]]
        prefix, suffix = jnp.concatenate(prefixes, axis=0), jnp.concatenate(suffixes, axis=0)
    return [*exponents, prefix, suffix]


def _alternate(later: jax.Array, earlier: jax.Array, span: int) -> jax.Array:
    """The rows of `earlier` in the first, third, ... span of rows, those of `later` in the others."""
    parts = range(later.shape[0] // span)
    return jnp.concatenate([(later if n % 2 else earlier)[n * span : (n + 1) * span] for n in parts], axis=0)


def _place(inner: jax.Array, pairs: jax.Array, span: int) -> jax.Array:
    """`inner` [C,C] with a level's pairs in it: rows of a later span, columns of the span before.

    Overwrites columns further to the left as well, which the next levels fill.
    """
    size = inner.shape[0]
    column = jax.lax.broadcasted_iota(jnp.int32, (span, size), 1)
    rows = []
    for start in range(0, size, span):
        old, new = inner[start : start + span], pairs[start : start + span]
        rows.append(jnp.where(column < start, new, old) if start // span % 2 else old)
    return jnp.concatenate(rows, axis=0)


def _place_transposed(inner: jax.Array, pairs: jax.Array, span: int) -> jax.Array:
    """The same with rows and columns exchanged: rows of an earlier span, columns of the span after."""
    size = inner.shape[0]
    column = jax.lax.broadcasted_iota(jnp.int32, (span, size), 1)
    rows = []
    for start in range(0, size, span):
        old, new = inner[start : start + span], pairs[start : start + span]
        rows.append(old if start // span % 2 else jnp.where(column >= start + span, new, old))
    return jnp.concatenate(rows, axis=0)


def _ends(chunk: _Chunk, resets: _Resets | None) -> tuple[jax.Array, jax.Array]:
    """The decay from the chunk's start to each token and from each token to its end, zero across a reset."""
    start, tail = (jnp.exp2(exponent) for exponent in chunk.exponents[-2:])
    return (start, tail) if resets is None else (start * resets.head, tail * resets.tail)


def forward_kernel(plan: Plan, has_counts: bool, *refs: Any) -> None:
    """One chunk of a group of heads; the state stays in the final_state block from step to step.

    refs: sums, group, r, log_w, k, v, [counts], initial_state; out, final_state, [states].
    """
    sums, group_ref, *sequences = refs[:6]
    counts = refs[6][0, 0] if has_counts else None
    initial, out, final, *kept = refs[6 + has_counts :]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        final[...] = initial[...]

    heads = range(plan.heads)
    resets = _find_resets(plan, counts)
    chunks = _read_chunks(plan, sums, *sequences)
    group = group_ref[...] != 0.0
    inner = []
    for c in chunks:
        centred = c.exponents[0]
        pairs = plan.dot(c.r * jnp.exp2(centred), c.k * jnp.exp2(-centred), NT)
        inner.append(jnp.where(group, pairs, 0.0))
    for level, span in enumerate(plan.spans, start=1):
        for head, c in enumerate(chunks):
            x = jnp.exp2(c.exponents[level]) * _alternate(c.r, c.k, span)
            inner[head] = _place(inner[head], plan.dot(x, x, NT), span)
    if kept:
        kept[0][0, 0] = final[0].astype(plan.dtype)
    for head, c in zip(heads, chunks, strict=True):
        start, tail = _ends(c, resets)
        state = final[0, head]
        seen = inner[head] if resets is None else inner[head] * resets.pairs
        o = plan.dot(c.r * start, state, NT) + plan.dot(seen, c.v, NN)
        out[0, :, plan.values(head)] = o.astype(out.dtype)
        final[0, head] = state * start[plan.size - 1 :] + plan.dot(c.v, c.k * tail, TN)


def backward_kernel(plan: Plan, has_counts: bool, *refs: Any) -> None:
    """The same in reverse; the state's gradient stays in the d_initial block.

    refs: sums, group, sums_transposed, masks, r, log_w, k, v, [counts], states, d_out, d_final;
    d_r, d_log_w, d_k, d_v, d_initial.
    """
    sums, group_ref, sums_transposed, masks, *sequences = refs[:8]
    counts = refs[8][0, 0] if has_counts else None
    states, d_out_ref, d_final, *gradients = refs[8 + has_counts :]
    d_r_ref, d_log_w_ref, d_k_ref, d_v_ref, d_state_ref = gradients

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_state_ref[...] = d_final[...]

    heads = range(plan.heads)
    resets = _find_resets(plan, counts)
    chunks = _read_chunks(plan, sums, *sequences)
    d_out = [d_out_ref[0, :, plan.values(head)].astype(plan.dtype) for head in heads]
    group = group_ref[...].T != 0.0
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (plan.size, plan.size), axis) for axis in (0, 1))
    later = row > column
    d_pairs = []
    for c, d_o in zip(chunks, d_out, strict=True):
        both = jnp.where(later, plan.dot(d_o, c.v, NT), plan.dot(c.v, d_o, NT))
        d_pairs.append((both if resets is None else both * resets.pairs).astype(plan.dtype))
    inner, d_r, d_k, d_exponents = [], [], [], []
    for head, c in enumerate(chunks):
        centred = c.exponents[0]
        r_decay, k_decay = jnp.exp2(centred), jnp.exp2(-centred)
        rs, ks = (c.r * r_decay).astype(plan.dtype), (c.k * k_decay).astype(plan.dtype)
        inner.append(jnp.where(group, plan.dot(ks, rs, NT), 0.0))
        d_rs = plan.dot(d_pairs[head] * masks[0], ks, NN) * r_decay
        d_ks = plan.dot(d_pairs[head] * masks[1], rs, NN) * k_decay
        itself = jnp.sum(d_out[head].astype(jnp.float32) * c.v.astype(jnp.float32), axis=1, keepdims=True)
        d_exponents.append([(d_rs * c.r - d_ks * c.k).astype(plan.dtype)])
        d_r.append(d_rs + itself * c.k)
        d_k.append(d_ks + itself * c.r)
    for level, span in enumerate(plan.spans, start=1):
        for head, c in enumerate(chunks):
            decay, rk = jnp.exp2(c.exponents[level]), _alternate(c.r, c.k, span)
            x = (decay * rk).astype(plan.dtype)
            inner[head] = _place_transposed(inner[head], plan.dot(x, x, NT), span)
            d_rk = plan.dot(d_pairs[head] * masks[level + 1], x, NN) * decay
            d_exponents[head].append((d_rk * rk).astype(plan.dtype))
            d_r[head] = _alternate(d_r[head] + d_rk, d_r[head], span)
            d_k[head] = _alternate(d_k[head], d_k[head] + d_rk, span)
    last = jax.lax.broadcasted_iota(jnp.int32, (plan.size, 1), 0) == plan.size - 1
    for head, c in enumerate(chunks):
        start, tail = _ends(c, resets)
        state, d_state = states[0, 0, head], d_state_ref[0, head]
        end = start[plan.size - 1 :]
        d_head = plan.dot(d_out[head], state, NN) * start
        d_tail = plan.dot(c.v, d_state, NN) * tail
        d_end = jnp.sum(d_state * state.astype(jnp.float32), axis=0, keepdims=True) * end
        d_start = d_head * c.r + jnp.where(last, d_end, 0.0)
        d_exponents[head] += [d_start.astype(plan.dtype), (d_tail * c.k).astype(plan.dtype)]
        d_r_ref[0, :, plan.keys(head)] = (d_r[head] + d_head).astype(d_r_ref.dtype)
        d_k_ref[0, :, plan.keys(head)] = (d_k[head] + d_tail).astype(d_k_ref.dtype)
        seen = inner[head] if resets is None else inner[head] * resets.pairs
        d_v = plan.dot(seen, d_out[head], NN) + plan.dot(c.k * tail, d_state, NT)
        d_v_ref[0, :, plan.values(head)] = d_v.astype(d_v_ref.dtype)
        d_state_ref[0, head] = d_state * end + plan.dot(d_out[head], c.r * start, TN)
    stacked = jnp.concatenate([jnp.concatenate(parts, axis=0) for parts in d_exponents], axis=1)
    d_log_w = plan.dot(sums_transposed[...], stacked, NN)
    if resets is not None:
        d_log_w = d_log_w * resets.inside
    d_log_w_ref[0] = d_log_w.astype(d_log_w_ref.dtype)
