"""The backward kernel of wkv7 on TPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.shared.tpu import LANES
from pallas_kernels.shared.triangular_tpu import NN, TN
from pallas_kernels.shared.turns import Routine, each, finished, staggered
from pallas_kernels.wkv7.pallas_tpu_chunk import (
    Decays,
    Masks,
    Pairs,
    Plan,
    cut,
    from_values,
    masks,
    prepared,
    solve,
    solve_transposed,
    stack,
    sums,
    turned,
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

    heads, size, dot = range(plan.heads), plan.size, plan.dot
    done: list[int] = []

    def work(chunk: int) -> Routine[None]:
        rows = plan.tokens(chunk)
        mask = masks(plan, None if counts is None else counts[0, chunk])
        decay, pairs = yield from prepared(plan, chunk, (r, log_w, k, a, b), mask)
        values = [v[0, rows, plan.values(head)].astype(plan.dtype) for head in heads]
        d_o = [d_out[0, rows, plan.values(head)].astype(plan.dtype) for head in heads]
        centred = [states[0, chunk, head] for head in heads]
        columns = yield from each(turned(x) for x in centred)
        seen = yield from each(dot(pairs[head].ra_head[size:], columns[head], NN) for head in heads)
        y = yield from each(seen[head] + from_values(plan, head, pairs[head], values[head]) for head in heads)
        u = yield from each(solve(plan, head, pairs[head], y[head]).astype(plan.dtype) for head in heads)
        uv = [stack(plan, head, u[head], values[head]) for head in heads]
        # Transposed as a whole, then cut by rows: the product takes no rows that nobody needs.
        inner = yield from each(unstack(plan, head, jnp.transpose(pairs[head].inner)) for head in heads)
        from_out = yield from each(dot(inner[head][0][:, :size], d_o[head], NN) for head in heads)
        while len(done) < plan.chunks - 1 - chunk:
            yield
        d_end = [d_initial[0, head] * pairs[head].end for head in heads]
        low = [x.astype(plan.dtype) for x in d_end]
        columns = yield from each(turned(x) for x in low)
        through = yield from each(unstack(plan, head, dot(pairs[head].bk_tail, columns[head], NN)) for head in heads)
        d_u = [through[head][0] + from_out[head] for head in heads]
        d_y = yield from each(solve_transposed(plan, head, pairs[head], d_u[head]).astype(plan.dtype) for head in heads)
        d_oy = [jnp.concatenate([d_o[head], d_y[head]], axis=0) for head in heads]
        d_centred = yield from each(dot(d_oy[head], pairs[head].ra_head, TN) for head in heads)
        kept = d_end if mask.keep is None else [x * mask.keep for x in d_end]
        for head in heads:
            d_initial[0, head] = (kept[head] + d_centred[head]) * pairs[head].start
        done.append(chunk)
        d_value = yield from each(through[head][1] + dot(inner[head][1], d_oy[head], NN) for head in heads)
        for head in heads:
            d_v[0, rows, plan.values(head)] = d_value[head].astype(d_v.dtype)
        last = [jnp.sum(kept[head] * centred[head], axis=0, keepdims=True) for head in heads]
        gradients = yield from _gradients(plan, pairs, mask, decay, centred, uv, d_oy, low, last)
        for ref, by_tile in zip((d_r, d_log_w, d_k, d_a, d_b), gradients, strict=True):
            for tile, gradient in zip(plan.tiles, by_tile, strict=True):
                lanes = slice(plan.keys(tile[0]).start, plan.keys(tile[-1]).stop)
                ref[0, rows, lanes] = gradient.astype(ref.dtype)

    finished(staggered([work(chunk) for chunk in reversed(range(plan.chunks))], plan.lag))


def _gradients(
    plan: Plan,
    pairs: list[Pairs],
    mask: Masks,
    decay: list[Decays],
    centred: list[jax.Array],
    uv: list[jax.Array],
    d_oy: list[jax.Array],
    d_end: list[jax.Array],
    last: list[jax.Array],
) -> Routine[list[list[jax.Array]]]:
    """Those of r, log_w, k, a, b, each by tiles [C,heads*K].

    log_w's is the sum of R dR + A dA - B dB - K dK over what comes after it in the chunk, plus G_C's own. Within the
    chunk the two sides cancel; they do so to float32's digits because both multiply the same rounded A, R, B, K.
    """
    heads, size, dot = range(plan.heads), plan.size, plan.dot
    columns = yield from each(turned(x) for x in uv)
    products = yield from each(dot(d_oy[head], columns[head], NN).astype(plan.dtype) for head in heads)
    d_inner = [jnp.where(mask.pairs, x, 0.0) for x in products]
    d_tail = yield from each(dot(uv[head], d_end[head], NN) for head in heads)
    d_tail = cut(d_tail, mask.tail)
    d_seen = cut(d_oy, mask.head)
    d_ra = yield from each(
        _two_products(plan, d_seen[head], centred[head], d_inner[head], pairs[head].bk) for head in heads
    )
    d_bk = yield from each(d_tail[head] + dot(d_inner[head], pairs[head].ra, TN) for head in heads)

    def of_tile(tile: range, decay: Decays) -> tuple[jax.Array, ...]:
        totals, owns, lasts = [], [], []
        for head in tile:
            ra, bk = pairs[head].ra.astype(jnp.float32), pairs[head].bk.astype(jnp.float32)
            ra_part, bk_part = ra * d_ra[head], bk * d_bk[head]
            # What a token's own log_w has no part in, A dA, is left out, not taken off a sum that has it.
            owns.append(ra_part[:size] - bk_part[:size] - bk_part[size:])
            totals.append(owns[-1] + ra_part[size:])
            lasts.append(last[head] + jnp.sum(bk * d_tail[head], axis=0, keepdims=True))
        total, own, end = (jnp.concatenate(parts, axis=1) for parts in (totals, owns, lasts))
        d_log_w = sums(plan, total, lambda row, column: jnp.where(column > row, 1.0, 0.0)) + own + end
        if mask.inside is not None:
            d_log_w = jnp.where(mask.inside, d_log_w, 0.0)
        low_ra, low_bk = ([x[head].astype(plan.dtype) for head in tile] for x in (d_ra, d_bk))
        d_r, d_a = (jnp.concatenate([x[part] for x in low_ra], axis=1) for part in (slice(size), slice(size, None)))
        parts = [unstack(plan, head, x) for head, x in zip(tile, low_bk, strict=True)]
        d_b, d_k = (jnp.concatenate(of_heads, axis=1) for of_heads in zip(*parts, strict=True))
        return d_r * decay.r, d_log_w, d_k * decay.grow, d_a * decay.a, d_b * decay.grow

    done = yield from each(of_tile(*tile) for tile in zip(plan.tiles, decay, strict=True))
    return [list(of_input) for of_input in zip(*done, strict=True)]


def _two_products(plan: Plan, x: jax.Array, y: jax.Array, z: jax.Array, w: jax.Array) -> jax.Array:
    """x y + z w, as one product where that moves nothing across lanes: a matrix unit 256 deep does both at once."""
    if x.shape[1] % LANES:
        return plan.dot(x, y, NN) + plan.dot(z, w, NN)
    return plan.dot(jnp.concatenate([x, z], axis=1), jnp.concatenate([y, w], axis=0), NN)
