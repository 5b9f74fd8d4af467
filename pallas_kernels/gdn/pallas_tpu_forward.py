"""The forward kernel of gdn on TPU."""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gdn.pallas_tpu_chunk import Plan, column_of, pairs, read_gates, stacked
from pallas_kernels.shared.triangular_tpu import NN, TN


def forward_kernel(plan: Plan, *refs: Any) -> None:
    """One chunk of a group of heads; the state stays in the final_state block from step to step.

    refs: q, k, v, gates, initial_state; out, final_state, [states].
    """
    q, k, v, gates_ref, initial, out, final, *kept = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        final[...] = initial[...]

    heads, size = range(plan.heads), plan.size
    gates = read_gates(plan, gates_ref[0, 0, 0])
    kq = stacked(plan, k[0], q[0])
    chunk = pairs(plan, kq, gates)
    if kept:
        kept[0][0, 0] = final[0].astype(plan.dtype)
    seen = [plan.dot(kq[plan.group(head)], final[0, head], NN) for head in heads]
    start = [column_of(gates.start, head) for head in heads]
    z = [v[0, :, plan.values(head)].astype(jnp.float32) - start[head] * seen[head][:size] for head in heads]
    w = [plan.dot(chunk[head].inverse, z[head], NN).astype(plan.dtype) for head in heads]
    for head in heads:
        key = kq[plan.group(head)][:size].astype(jnp.float32) * column_of(gates.beta_rest, head)
        state = final[0, head]
        kept_state = column_of(gates.kept, head) * state
        final[0, head] = kept_state + (column_of(gates.end, head) * state + plan.dot(key, w[head], TN))
    for head in heads:
        o = start[head] * seen[head][size:] + plan.dot(chunk[head].inner[size:], w[head], NN)
        out[0, :, plan.values(head)] = o.astype(out.dtype)
