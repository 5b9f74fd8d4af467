"""The backward kernel of gdn on TPU."""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gdn.pallas_tpu_chunk import (
    Gates,
    Pairs,
    Plan,
    column_of,
    pairs,
    read_gates,
    row_of,
    stacked,
    sum_of,
)
from pallas_kernels.shared.tpu import LANES
from pallas_kernels.shared.triangular_tpu import NN, NT, TN, iota


def backward_kernel(plan: Plan, *refs: Any) -> None:
    """One chunk of a group of heads, last chunk first; the state's gradient stays in d_initial's block.

    refs: q, k, v, gates, states, d_out, d_final; d_q, d_k, d_v, d_gates, d_initial. d_gates [3*heads,C] are those of
    G, of G_C - G and of beta.
    """
    q, k, v, gates_ref, states, d_out, d_final, d_q, d_k, d_v, d_gates, d_initial = refs

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_initial[...] = d_final[...]

    heads, size, dot = range(plan.heads), plan.size, plan.dot
    gates = read_gates(plan, gates_ref[0, 0, 0])
    kq = stacked(plan, k[0], q[0])
    mine = [kq[plan.group(head)] for head in heads]
    chunk = pairs(plan, kq, gates)
    beta_rest = [column_of(gates.beta_rest, head) for head in heads]
    start = [jnp.concatenate([column_of(gates.start, head)] * 2, axis=0) for head in heads]
    state = [states[0, 0, head].astype(plan.dtype) for head in heads]
    seen = [start[head] * dot(mine[head], state[head], NN) for head in heads]
    z = [v[0, :, plan.values(head)].astype(jnp.float32) - seen[head][:size] for head in heads]
    w = [dot(chunk[head].inverse, z[head], NN) for head in heads]
    d_o = [d_out[0, :, plan.values(head)].astype(plan.dtype) for head in heads]
    into = [dot(mine[head][:size], d_initial[0, head], NN) for head in heads]
    d_w = [dot(chunk[head].inner[size:], d_o[head], TN) + beta_rest[head] * into[head] for head in heads]
    d_z = [dot(chunk[head].inverse, d_w[head], TN) for head in heads]
    d_seen = [jnp.concatenate([-d_z[head].astype(plan.dtype), d_o[head]], axis=0) for head in heads]
    for head in heads:
        d_v[0, :, plan.values(head)] = d_z[head].astype(d_v.dtype)
    grads = [_pair_gradients(plan, chunk[head], row_of(gates.beta, head), d_seen[head], w[head]) for head in heads]
    rows = []
    for head in heads:
        through_start = d_o[head].astype(jnp.float32) * seen[head][size:] - d_z[head] * seen[head][:size]
        rows += [_row_sums(grads[head].exponents, through_start), _row_sums(w[head] * into[head])]
    ends = [jnp.sum(d_initial[0, head] * states[0, 0, head].astype(jnp.float32), keepdims=True) for head in heads]
    d_gates[0, 0, 0] = _gate_gradients(plan, gates, rows, grads, ends)
    scaled = [start[head] * d_seen[head].astype(jnp.float32) for head in heads]
    scaled = [x.astype(plan.dtype) for x in scaled]
    for group in range(plan.groups):
        of_group = [head for head in heads if plan.group(head) == group]
        d_pairs = _total([grads[head].products for head in of_group]).astype(plan.dtype)
        d_kq = _total([dot(scaled[head], state[head], NT) for head in of_group])
        d_kq = d_kq + dot(d_pairs, kq[group][:size], NN)
        d_key = _total([beta_rest[head] * dot(w[head], d_initial[0, head], NT) for head in of_group])
        d_key = d_key + dot(d_pairs, kq[group], TN) + d_kq[:size]
        d_q[0, :, plan.keys(group)] = d_kq[size:].astype(d_q.dtype)
        d_k[0, :, plan.keys(group)] = d_key.astype(d_k.dtype)
    for head in heads:
        d_state = d_initial[0, head]
        through = column_of(gates.end, head) * d_state + dot(mine[head], scaled[head], TN)
        d_initial[0, head] = column_of(gates.kept, head) * d_state + through


class _PairGradients(NamedTuple):
    """Of one head's pairs: `products` [2C,C] and `exponents` [C,C], G_i - G_j, without what pairs with itself.

    `beta` and `itself` [1,C] are what beta's gradient takes from tokens after its own, and from its own.
    """

    products: jax.Array
    exponents: jax.Array
    beta: jax.Array
    itself: jax.Array


def _pair_gradients(plan: Plan, chunk: Pairs, beta: jax.Array, d_seen: jax.Array, w: jax.Array) -> _PairGradients:
    """d_seen = [-dZ; dO] [2C,V]."""
    size = plan.size
    row, column = iota((size, size), 0), iota((size, size), 1)
    d_inner = plan.dot(d_seen, w, NT)
    weighted = d_inner * chunk.products
    of_pairs = jnp.where(row > column, (weighted[:size] + weighted[size:]) * chunk.decay, 0.0)
    itself = jnp.where(row == column, weighted[size:], 0.0)
    lower = chunk.decay * beta
    d_products = [jnp.where(row > column, d_inner[:size] * lower, 0.0), d_inner[size:] * lower]
    return _PairGradients(
        jnp.concatenate(d_products, axis=0),
        of_pairs * beta,
        jnp.sum(of_pairs, axis=0, keepdims=True),
        jnp.sum(itself, axis=0, keepdims=True),
    )


def _gate_gradients(
    plan: Plan, gates: Gates, columns: list[jax.Array], grads: list[_PairGradients], ends: list[jax.Array]
) -> jax.Array:
    """[3*heads,C]: d G, d (G_C - G), d beta.

    columns are two of each head [C,1]: d G but for what a token's pairs with later ones take off, and d (beta rest).
    """
    heads, size = plan.heads, plan.size
    lane = iota((size, LANES), 1)
    packed = jnp.zeros((size, LANES), jnp.float32)
    for index, x in enumerate(columns):
        packed = jnp.where(lane == index % 2 * heads + index // 2, x, packed)
    packed = jnp.transpose(packed)
    d_total, d_rest = packed[:heads], packed[heads : 2 * heads]
    later = jnp.concatenate([x.beta for x in grads], axis=0)
    itself = jnp.concatenate([x.itself for x in grads], axis=0)
    d_rest = gates.rest * d_rest
    decay = jnp.exp(sum_of([x[:, size - 1 :] for x in gates.sums]))
    at_end = jnp.where(iota((heads, size), 1) == size - 1, decay * jnp.concatenate(ends, axis=0), 0.0)
    d_total = d_total - gates.beta * later + at_end
    return jnp.concatenate([d_total, gates.beta * d_rest, later + itself + d_rest], axis=0)


def _row_sums(*arrays: jax.Array) -> jax.Array:
    """[C,1]: sums over all columns, those of arrays of one width at once."""
    if len({x.shape for x in arrays}) == 1:
        arrays = (_total(list(arrays)),)
    return _total([jnp.sum(x, axis=1, keepdims=True) for x in arrays])


def _total(arrays: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, arrays)
