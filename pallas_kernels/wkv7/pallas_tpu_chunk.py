"""What wkv7's TPU kernels compute inside a chunk, for lists of heads: one list per step, so that heads overlap.

Notation of `chunked`, but G counts from the middle of the chunk: exponents reach half as far to either side. With
σ = e^(decay of the first half), ε = e^(decay of the second half) and Ŝ = σ S:
    Y = A Ŝ + AK V,   U = (I - AB)^-1 Y,   O = R Ŝ + RB U + RK V,   S' = ε (Ŝ + B^T U + K^T V)
States are kept transposed, [V,K]: σ and ε are then rows, as everything else that belongs to key channels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shared.triangular_tpu import BASE, NN, NT, base_inverses, iota, merged

LANES = 128


class Plan(NamedTuple):
    """How the work is cut: `chunks` of `size` tokens and `heads` heads a grid step; matrix products in `dtype`."""

    size: int
    chunks: int
    heads: int
    key_size: int
    value_size: int
    dtype: Any

    @property
    def rows(self) -> int:
        return self.size * self.chunks

    @property
    def paired(self) -> bool:
        """Two chunks fill the lanes of a matrix together."""
        return self.chunks == 2 and 2 * self.size == LANES

    def flipped(self, chunk: int) -> bool:
        return self.paired and chunk == 1

    def keys(self, head: int) -> slice:
        return slice(head * self.key_size, (head + 1) * self.key_size)

    def values(self, head: int) -> slice:
        return slice(head * self.value_size, (head + 1) * self.value_size)

    def tokens(self, chunk: int) -> slice:
        return slice(chunk * self.size, (chunk + 1) * self.size)

    def dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        """The product in float32: one pass of bfloat16 operands, or all of float32's digits."""
        return jax.lax.dot_general(
            x.astype(self.dtype),
            y.astype(self.dtype),
            (((axes[0],), (axes[1],)), ((), ())),
            precision=None if self.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )


class Masks(NamedTuple):
    """Which tokens of a chunk see each other; the rest is None without resets, else as in `layout.Resets`.

    `pairs` [2C,2C] bool: rows R, A and columns B, K. `head`, `tail` [2C,1] bool, `keep` [1,1], `inside` [C,1] bool.
    """

    pairs: jax.Array
    head: jax.Array | None
    tail: jax.Array | None
    keep: jax.Array | None
    inside: jax.Array | None


class Decays(NamedTuple):
    """Exponentials of one chunk's log_w, all heads side by side, [C,heads*K]; `start` and `end` [1,heads*K]: σ, ε."""

    a: jax.Array
    r: jax.Array
    grow: jax.Array
    start: jax.Array
    end: jax.Array


class Pairs(NamedTuple):
    """One head's chunk but for its state, in plan.dtype: ra = [R; A] and bk = `stack`(B, K) [2C,K], `inner` [2C,2C].

    `inverse` is (I - AB)^-1: [C,C], or where chunks are paired [C,2C] with zeros in the other chunk's columns.
    """

    ra: jax.Array
    bk: jax.Array
    ra_head: jax.Array
    bk_tail: jax.Array
    inner: jax.Array
    inverse: jax.Array


def masks(plan: Plan, counts: jax.Array | None) -> Masks:
    """counts [1,C] float32: resets from the chunk's start to each token, itself included."""
    size = plan.size
    row, column = iota((2 * size, 2 * size), 0), iota((2 * size, 2 * size), 1)
    seen = column % size < jnp.where(row < size, row + 1, row - size)
    if counts is None:
        return Masks(seen, None, None, None, None)
    twice = jnp.concatenate([counts, counts], axis=1)
    both = jnp.sum(jnp.where(row == column, twice, 0.0), axis=1, keepdims=True)
    last = counts[:, size - 1 :]
    before = jnp.where(iota((size, size), 0) == iota((size, size), 1) + 1, counts, 0.0)
    inside = jnp.sum(before, axis=1, keepdims=True) == both[:size]
    keep = jnp.where(last == 0.0, 1.0, 0.0)
    return Masks(seen & (both == twice), both == 0.0, both == last, keep, inside)


def sums(plan: Plan, x: jax.Array, weights: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Float32 x [C,D] summed over rows with weights(to_row, from_row) of 0, 1 and -1.

    Where products are bfloat16, x is split in two such numbers, one below the other.
    """
    size = plan.size
    if plan.dtype != jnp.bfloat16:
        return plan.dot(weights(iota((size, size), 0), iota((size, size), 1)), x, NN)
    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    row, column = iota((size, 2 * size), 0), iota((size, 2 * size), 1) % size
    return plan.dot(weights(row, column), jnp.concatenate([high, low], axis=0), NN)


def decays(plan: Plan, log_w: jax.Array) -> Decays:
    """log_w [C,heads*K] float32."""
    size = plan.size

    def from_middle(row: jax.Array, column: jax.Array) -> jax.Array:
        return jnp.where(column <= row, 1.0, 0.0) - jnp.where(column < size // 2, 1.0, 0.0)

    total = sums(plan, log_w, from_middle)
    before = total - log_w
    return Decays(jnp.exp(before), jnp.exp(total), jnp.exp(-total), jnp.exp(-before[:1]), jnp.exp(total[size - 1 :]))


def stack(plan: Plan, chunk: int, of_b: jax.Array, of_k: jax.Array) -> jax.Array:
    """Rows that belong to B (or U) and to K (or V), in the order of the chunk: paired ones take turns.

    So the AB of two chunks lie in different lanes of `inner`, and both are inverted side by side.
    """
    first, second = (of_k, of_b) if plan.flipped(chunk) else (of_b, of_k)
    return jnp.concatenate([first, second], axis=0)


def unstack(plan: Plan, chunk: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of B (or U) and those of K (or V)."""
    first, second = x[: plan.size], x[plan.size :]
    return (second, first) if plan.flipped(chunk) else (first, second)


def from_values(plan: Plan, chunk: int, pair: Pairs, v: jax.Array) -> jax.Array:
    """AK V. To move AK to the first lanes would cost more than to multiply AB with rows of zeros."""
    rows = pair.inner[plan.size :]
    if plan.flipped(chunk):
        return plan.dot(rows[:, : plan.size], v, NN)
    if plan.size % LANES == 0:
        return plan.dot(rows[:, plan.size :], v, NN)
    return plan.dot(rows, jnp.concatenate([jnp.zeros_like(v), v], axis=0), NN)


def solve(plan: Plan, chunk: int, pair: Pairs, y: jax.Array) -> jax.Array:
    """U = (I - AB)^-1 Y."""
    if plan.flipped(chunk):
        return plan.dot(pair.inverse, jnp.concatenate([jnp.zeros_like(y), y], axis=0), NN)
    return plan.dot(pair.inverse[:, : plan.size], y, NN)


def solve_transposed(plan: Plan, chunk: int, pair: Pairs, d_u: jax.Array) -> jax.Array:
    """dY = (I - AB)^-T dU."""
    columns = plan.tokens(chunk) if plan.paired else slice(plan.size)
    return plan.dot(jnp.transpose(pair.inverse)[columns], d_u, NN)


def pairs(
    plan: Plan, arrays: Sequence[Sequence[jax.Array]], decay: Sequence[Decays], mask: Sequence[Masks]
) -> list[list[Pairs]]:
    """Every chunk's heads; arrays are each chunk's r, k, a, b [C,heads*K]."""
    chunks, heads = range(plan.chunks), range(plan.heads)
    ra: list[list[jax.Array]] = []
    bk: list[list[jax.Array]] = []
    for c in chunks:
        r, k, a, b = (x.astype(jnp.float32) for x in arrays[c])
        scaled = (a * decay[c].a, r * decay[c].r, b * decay[c].grow, k * decay[c].grow)
        a, r, b, k = (x.astype(plan.dtype) for x in scaled)
        keys = [plan.keys(head) for head in heads]
        ra.append([jnp.concatenate([r[:, key], a[:, key]], axis=0) for key in keys])
        bk.append([stack(plan, c, b[:, key], k[:, key]) for key in keys])
    inner = [[jnp.where(mask[c].pairs, plan.dot(ra[c][h], bk[c][h], NT), 0.0) for h in heads] for c in chunks]
    inverse = _inverses(plan, inner)
    found = []
    for c in chunks:
        ra_head, bk_tail = cut(ra[c], mask[c].head), cut(bk[c], mask[c].tail)
        low = [x.astype(plan.dtype) for x in inner[c]]
        found.append([Pairs(*one) for one in zip(ra[c], bk[c], ra_head, bk_tail, low, inverse[c], strict=True)])
    return found


def cut(arrays: list[jax.Array], visible: jax.Array | None) -> list[jax.Array]:
    """The rows that are visible, zeros for the others."""
    if visible is None:
        return arrays
    return [x * jnp.where(visible, 1.0, 0.0).astype(x.dtype) for x in arrays]


def _inverses(plan: Plan, inner: list[list[jax.Array]]) -> list[list[jax.Array]]:
    """(I - AB)^-1 of every chunk and head, as in `Pairs`.

    Blocks X on the diagonal are merged to twice their width, X + X (corners of AB) X: only the odd blocks' rows change.
    """
    size, heads = plan.size, range(plan.heads)
    if plan.paired:
        lane = iota((size, 2 * size), 1)
        own = [lane >= size if plan.flipped(chunk) else lane < size for chunk in range(2)]
        stricts = [jnp.concatenate([jnp.where(own[c], inner[c][h][size:], 0.0) for c in range(2)]) for h in heads]
    else:
        stricts = [x[size:, :size] for heads_of_chunk in inner for x in heads_of_chunk]
    width = min(BASE, size)
    found = base_inverses(plan, stricts, width)
    while width < size:
        found = merged(plan, stricts, found, width)
        width *= 2
    low = [x.astype(plan.dtype) for x in found]
    if plan.paired:
        return [[x[plan.tokens(chunk)] for x in low] for chunk in range(2)]
    return [low[chunk * plan.heads : (chunk + 1) * plan.heads] for chunk in range(plan.chunks)]
