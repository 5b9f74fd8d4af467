"""The backward kernel of wkv7 on TPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.shared.triangular_tpu import NN, NT, TN
from pallas_kernels.wkv7.pallas_tpu_chunk import (
    LANES,
    Decays,
    Masks,
    Pairs,
    Plan,
    cut,
    decays,
    from_values,
    masks,
    pairs,
    solve,
    solve_transposed,
    stack,
    sums,
    unstack,
)


def backward_kernel(plan: Plan, has_counts: bool, *refs: Any) -> None:
    """One block of chunks of a group of heads, last chunk first; the state's gradient stays in d_initial's block.

    refs: r, log_w, k, v, a, b, [counts], states, d_out, d_final; d_r, d_log_w, d_k, d_v, d_a, d_b, d_initial.
    """
    r, log_w, k, v, a, b = refs[:6]
    counts = refs[6] if has_counts else None
    states, d_out, d_final, d_r, d_log_w, d_k, d_v, d_a, d_b, d_initial = refs[6 + has_counts :]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_initial[...] = d_final[...]

    chunks, heads, size, dot = range(plan.chunks), range(plan.heads), plan.size, plan.dot
    rows = [plan.tokens(chunk) for chunk in chunks]
    decay = [decays(plan, log_w[0, row].astype(jnp.float32)) for row in rows]
    mask = [masks(plan, None if counts is None else counts[0, chunk]) for chunk in chunks]
    prepared = pairs(plan, [[x[0, row] for x in (r, k, a, b)] for row in rows], decay, mask)
    values = [[v[0, row, plan.values(head)].astype(plan.dtype) for head in heads] for row in rows]
    d_o = [[d_out[0, row, plan.values(head)].astype(plan.dtype) for head in heads] for row in rows]
    centred, uv = [], []
    for c in chunks:
        chunk_pairs = prepared[c]
        centred.append([states[0, c, head] * decay[c].start[:, plan.keys(head)] for head in heads])
        seen = [dot(chunk_pairs[head].ra_head[size:], centred[c][head], NT) for head in heads]
        y = [seen[head] + from_values(plan, c, chunk_pairs[head], values[c][head]) for head in heads]
        u = [solve(plan, c, chunk_pairs[head], y[head]).astype(plan.dtype) for head in heads]
        uv.append([stack(plan, c, u[head], values[c][head]) for head in heads])
    for c in reversed(chunks):
        chunk_pairs = prepared[c]
        d_end = [d_initial[0, head] * decay[c].end[:, plan.keys(head)] for head in heads]
        # Transposed as a whole, then cut by rows: the product takes no rows that nobody needs.
        inner_b, inner_k = zip(*(unstack(plan, c, jnp.transpose(x.inner)) for x in chunk_pairs), strict=True)
        b_end, k_end = zip(*(unstack(plan, c, dot(chunk_pairs[h].bk_tail, d_end[h], NT)) for h in heads), strict=True)
        d_u = [b_end[head] + dot(inner_b[head][:, :size], d_o[c][head], NN) for head in heads]
        d_y = [solve_transposed(plan, c, chunk_pairs[head], d_u[head]).astype(plan.dtype) for head in heads]
        d_oy = [jnp.concatenate([d_o[c][head], d_y[head]], axis=0) for head in heads]
        for head in heads:
            kept = d_end[head] if mask[c].keep is None else d_end[head] * mask[c].keep
            d_centred = kept + dot(d_oy[head], chunk_pairs[head].ra_head, TN)
            d_initial[0, head] = d_centred * decay[c].start[:, plan.keys(head)]
        for head in heads:
            d_value = k_end[head] + dot(inner_k[head], d_oy[head], NN)
            d_v[0, rows[c], plan.values(head)] = d_value.astype(d_v.dtype)
        chunk_gradients = _gradients(plan, c, chunk_pairs, mask[c], decay[c], centred[c], uv[c], d_oy, d_end)
        for ref, gradient in zip((d_r, d_log_w, d_k, d_a, d_b), chunk_gradients, strict=True):
            ref[0, rows[c]] = gradient.astype(ref.dtype)


def _gradients(
    plan: Plan,
    chunk: int,
    pairs: list[Pairs],
    mask: Masks,
    decay: Decays,
    centred: list[jax.Array],
    uv: list[jax.Array],
    d_oy: list[jax.Array],
    d_end: list[jax.Array],
) -> tuple[jax.Array, ...]:
    """Those of r, log_w, k, a, b [C,heads*K] float32.

    log_w's is the sum of R dR + A dA - B dB - K dK over what comes after it in the chunk, plus G_C's own. Within the
    chunk the two sides cancel; they do so to float32's digits because both multiply the same rounded A, R, B, K.
    """
    heads, size, dot = range(plan.heads), plan.size, plan.dot
    d_inner = [jnp.where(mask.pairs, dot(d_oy[h], uv[h], NT), 0.0).astype(plan.dtype) for h in heads]
    d_tail = cut([dot(uv[head], d_end[head], NN) for head in heads], mask.tail)
    d_seen = cut(d_oy, mask.head)
    d_ra = [_two_products(plan, d_seen[h], centred[h].astype(plan.dtype), d_inner[h], pairs[h].bk) for h in heads]
    d_bk = [d_tail[head] + dot(d_inner[head], pairs[head].ra, TN) for head in heads]
    last, total, own = [], [], []
    for head in heads:
        ra, bk = pairs[head].ra.astype(jnp.float32), pairs[head].bk.astype(jnp.float32)
        ra_part, bk_part = ra * d_ra[head], bk * d_bk[head]
        kept = d_end[head] * centred[head] if mask.keep is None else d_end[head] * centred[head] * mask.keep
        last.append(jnp.sum(kept, axis=0, keepdims=True) + jnp.sum(bk * d_tail[head], axis=0, keepdims=True))
        total.append(ra_part[:size] + ra_part[size:] - bk_part[:size] - bk_part[size:])
        own.append(ra_part[size:])
    wide = [jnp.concatenate(parts, axis=1) for parts in (total, own, last)]
    d_log_w = sums(plan, wide[0], lambda row, column: jnp.where(column >= row, 1.0, 0.0)) - wide[1] + wide[2]
    if mask.inside is not None:
        d_log_w = jnp.where(mask.inside, d_log_w, 0.0)
    d_r, d_a = (jnp.concatenate([x[part] for x in d_ra], axis=1) for part in (slice(size), slice(size, None)))
    d_b, d_k = (jnp.concatenate([unstack(plan, chunk, x)[part] for x in d_bk], axis=1) for part in (0, 1))
    return d_r * decay.r, d_log_w, d_k * decay.grow, d_a * decay.a, d_b * decay.grow


def _two_products(plan: Plan, x: jax.Array, y: jax.Array, z: jax.Array, w: jax.Array) -> jax.Array:
    """x y + z w, as one product where that moves nothing across lanes: a matrix unit 256 deep does both at once."""
    if x.shape[1] % LANES:
        return plan.dot(x, y, NN) + plan.dot(z, w, NN)
    return plan.dot(jnp.concatenate([x, z], axis=1), jnp.concatenate([y, w], axis=0), NN)
