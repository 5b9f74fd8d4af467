"""What gdn's TPU kernels compute inside a chunk, for lists of heads: one list per step, so that heads overlap.

Notation of `chunked`, with beta on the other side of the inverse, where it is a row and not a column:
    N = strict(K K^T * D) diag(beta),   P = (Q K^T * D) diag(beta),   Z = V - e^G K S,   W = (I + N)^-1 Z
    O = e^G Q S + P W,   S' = e^G_C S + (beta e^(G_C - G) K)^T W
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shared import tpu
from pallas_kernels.shared.triangular_tpu import BASE, NT, base_inverses, iota, merged
from pallas_kernels.shared.turns import finished


class Plan(NamedTuple):
    """How the work is cut: a chunk of `size` tokens, `heads` heads and their `groups` key heads a grid step.

    Matrix products are in `dtype`; for float32 decays are summed in two parts, as in `chunked`.
    """

    size: int
    heads: int
    groups: int
    key_size: int
    value_size: int
    dtype: Any

    @property
    def parts(self) -> int:
        return 1 if self.dtype == jnp.bfloat16 else 2

    def group(self, head: int) -> int:
        """The key head that a head reads."""
        return head * self.groups // self.heads

    def keys(self, group: int) -> slice:
        return slice(group * self.key_size, (group + 1) * self.key_size)

    def values(self, head: int) -> slice:
        return slice(head * self.value_size, (head + 1) * self.value_size)

    def dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        return tpu.dot(x, y, axes, self.dtype)


class Gates(NamedTuple):
    """Decays and betas of a chunk, all heads together: rows [heads,C], columns [C,heads], scalars [1,heads].

    `sums` and `sums_column` are G in parts, `start` is e^G, `rest` e^(G_C - G); the state's decay is kept + end.
    """

    sums: list[jax.Array]
    sums_column: list[jax.Array]
    beta: jax.Array
    rest: jax.Array
    start: jax.Array
    beta_rest: jax.Array
    kept: jax.Array
    end: jax.Array


class Pairs(NamedTuple):
    """One head's chunk but for its state: `products` [2C,C] = [K; Q] K^T in float32, `decay` [C,C] is D.

    `inner` [2C,C] = [N; P] and `inverse` = (I + N)^-1 in plan.dtype.
    """

    products: jax.Array
    decay: jax.Array
    inner: jax.Array
    inverse: jax.Array


def read_gates(plan: Plan, rows: jax.Array) -> Gates:
    """rows [(parts+1)*heads,C] float32: the parts of G, then beta."""
    heads, size = plan.heads, plan.size
    columns = jnp.transpose(rows)
    blocks = [slice(part * heads, (part + 1) * heads) for part in range(plan.parts + 1)]
    *sums, beta = (rows[block] for block in blocks)
    *sums_column, beta_column = (columns[:, block] for block in blocks)
    gap = sum_of([x[:, size - 1 :] - x for x in sums])
    gap_column = sum_of([x[size - 1 :] - x for x in sums_column])
    total = sum_of([x[size - 1 :] for x in sums_column])
    weak = total > -0.5
    # Beyond a few terms the series is a float32's expm1.
    series = total * (1 + total / 2 * (1 + total / 3 * (1 + total / 4 * (1 + total / 5 * (1 + total / 6)))))
    series = series + total**7 / 5040
    return Gates(
        sums,
        sums_column,
        beta,
        jnp.exp(gap),
        jnp.exp(sum_of(sums_column)),
        beta_column * jnp.exp(gap_column),
        jnp.where(weak, 1.0, 0.0),
        jnp.where(weak, series, jnp.exp(total)),
    )


def sum_of(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def row_of(x: jax.Array, head: int) -> jax.Array:
    """[1,C] of [heads,C]."""
    return x[head : head + 1]


def column_of(x: jax.Array, head: int) -> jax.Array:
    """[C,1] of [C,heads]."""
    return x[:, head : head + 1]


def stacked(plan: Plan, k: jax.Array, q: jax.Array) -> list[jax.Array]:
    """[K; Q] [2C,K] of every key head of k and q [C,groups*K]."""
    groups = [plan.keys(group) for group in range(plan.groups)]
    return [jnp.concatenate([k[:, keys], q[:, keys]], axis=0).astype(plan.dtype) for keys in groups]


def pairs(plan: Plan, kq: list[jax.Array], gates: Gates) -> list[Pairs]:
    """Every head's."""
    size, heads = plan.size, range(plan.heads)
    products = [plan.dot(x, x[:size], NT) for x in kq]
    row, column = iota((size, size), 0), iota((size, size), 1)
    decays, inner = [], []
    for head in heads:
        gaps = [column_of(c, head) - row_of(r, head) for c, r in zip(gates.sums_column, gates.sums, strict=True)]
        decay = jnp.exp(jnp.where(row >= column, sum_of(gaps), -jnp.inf))
        weights = decay * row_of(gates.beta, head)
        mine = products[plan.group(head)]
        decays.append(decay)
        inner.append((jnp.where(row > column, mine[:size] * weights, 0.0), mine[size:] * weights))
    width = min(BASE, size)
    stricts = [-n.astype(plan.dtype) for n, _ in inner]
    inverses = finished(base_inverses(plan, stricts, width))
    while width < size:
        inverses = finished(merged(plan, stricts, inverses, width))
        width *= 2
    return [
        Pairs(
            products[plan.group(head)],
            decays[head],
            jnp.concatenate([x.astype(plan.dtype) for x in inner[head]], axis=0),
            inverses[head].astype(plan.dtype),
        )
        for head in heads
    ]
