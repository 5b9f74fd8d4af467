"""The forward kernel of wkv7 on TPU."""

from typing import Any

from jax.experimental import pallas as pl

from pallas_kernels.shared.triangular_tpu import NN, TN
from pallas_kernels.shared.turns import Routine, each, finished, staggered
from pallas_kernels.wkv7.pallas_tpu_chunk import Plan, from_values, masks, prepared, solve, stack, turned


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

    heads, size, dot = range(plan.heads), plan.size, plan.dot
    done: list[int] = []

    def work(chunk: int) -> Routine[None]:
        rows = plan.tokens(chunk)
        mask = masks(plan, None if counts is None else counts[0, chunk])
        _, pairs = yield from prepared(plan, chunk, (r, log_w, k, a, b), mask)
        values = [v[0, rows, plan.values(head)].astype(plan.dtype) for head in heads]
        while len(done) < chunk:
            yield
        centred = [final[0, head] * pairs[head].start for head in heads]
        low = [x.astype(plan.dtype) for x in centred]
        if kept:
            for head in heads:
                kept[0][0, chunk, head] = low[head]
        columns = yield from each(turned(x) for x in low)
        seen = yield from each(dot(pairs[head].ra_head, columns[head], NN) for head in heads)
        y = yield from each(seen[head][size:] + from_values(plan, head, pairs[head], values[head]) for head in heads)
        u = yield from each(solve(plan, head, pairs[head], y[head]).astype(plan.dtype) for head in heads)
        uv = [stack(plan, head, u[head], values[head]) for head in heads]
        added = yield from each(dot(uv[head], pairs[head].bk_tail, TN) for head in heads)
        if mask.keep is not None:
            centred = [x * mask.keep for x in centred]
        for head in heads:
            final[0, head] = (centred[head] + added[head]) * pairs[head].end
        done.append(chunk)
        o = yield from each(seen[head][:size] + dot(pairs[head].inner[:size], uv[head], NN) for head in heads)
        for head in heads:
            out[0, rows, plan.values(head)] = o[head].astype(out.dtype)

    finished(staggered([work(chunk) for chunk in range(plan.chunks)], plan.lag))
