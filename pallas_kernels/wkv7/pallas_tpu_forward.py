"""The forward kernel of wkv7 on TPU."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.shared.triangular_tpu import NN, NT, TN
from pallas_kernels.wkv7.pallas_tpu_chunk import Plan, decays, from_values, masks, pairs, solve, stack


def forward_kernel(plan: Plan, has_counts: bool, *refs: Any) -> None:
    """One block of chunks of a group of heads; the state stays in the final_state block from step to step.

    refs: r, log_w, k, v, a, b, [counts], initial_state; out, final_state, [states].
    """
    r, log_w, k, v, a, b = refs[:6]
    counts = refs[6] if has_counts else None
    initial, out, final, *kept = refs[6 + has_counts :]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        final[...] = initial[...]

    chunks = range(plan.chunks)
    heads = range(plan.heads)
    rows = [plan.tokens(chunk) for chunk in chunks]
    decay = [decays(plan, log_w[0, row].astype(jnp.float32)) for row in rows]
    mask = [masks(plan, None if counts is None else counts[0, chunk]) for chunk in chunks]
    prepared = pairs(plan, [[x[0, row] for x in (r, k, a, b)] for row in rows], decay, mask)
    size = plan.size
    for chunk in chunks:
        values = [v[0, rows[chunk], plan.values(head)].astype(plan.dtype) for head in heads]
        chunk_pairs, start, end = prepared[chunk], decay[chunk].start, decay[chunk].end
        state = [final[0, head] for head in heads]
        if kept:
            kept[0][0, chunk] = final[0]
        centred = [state[head] * start[:, plan.keys(head)] for head in heads]
        seen = [plan.dot(chunk_pairs[head].ra_head, centred[head], NT) for head in heads]
        y = [seen[head][size:] + from_values(plan, chunk, chunk_pairs[head], values[head]) for head in heads]
        u = [solve(plan, chunk, chunk_pairs[head], y[head]).astype(plan.dtype) for head in heads]
        uv = [stack(plan, chunk, u[head], values[head]) for head in heads]
        added = [plan.dot(uv[head], chunk_pairs[head].bk_tail, TN) for head in heads]
        keep = mask[chunk].keep
        for head in heads:
            old = centred[head] if keep is None else centred[head] * keep
            final[0, head] = (old + added[head]) * end[:, plan.keys(head)]
        for head in heads:
            o = seen[head][:size] + plan.dot(chunk_pairs[head].inner[:size], uv[head], NN)
            out[0, rows[chunk], plan.values(head)] = o.astype(out.dtype)
