"""What wkv7's TPU kernels compute inside a chunk, for lists of heads: one list per step, so that heads overlap.

Notation of `chunked`, but G counts from the middle of the chunk: exponents reach half as far to either side. With
σ = e^(decay of the first half), ε = e^(decay of the second half) and Ŝ = σ S:
    Y = A Ŝ + AK V,   U = (I - AB)^-1 Y,   O = R Ŝ + RB U + RK V,   S' = ε (Ŝ + B^T U + K^T V)
States are kept transposed, [V,K]: σ and ε are then rows, as everything else that belongs to key channels.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shared import tpu
from pallas_kernels.shared.tpu import LANES
from pallas_kernels.shared.triangular_tpu import BASE, NN, base_inverses, iota, merged
from pallas_kernels.shared.turns import Routine, each, staggered

# Tiles whose exponentials are made at once: more would fill the registers, fewer wait for their products.
_BATCH = 4


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
        """Two heads fill the lanes of a matrix together.

        Not in float32: sums that take K, the larger, before B round more, which log_w's gradient shows.
        """
        return 2 * self.size == LANES and self.dtype == jnp.bfloat16

    @property
    def lag(self) -> int:
        """Turns before the next chunk starts: this one is then at its inverses, whose steps wait for each other."""
        return 4 * self.heads

    @property
    def tiles(self) -> list[range]:
        """Heads whose keys fill the lanes of a register."""
        step = max(LANES // self.key_size, 1)
        return [range(first, min(first + step, self.heads)) for first in range(0, self.heads, step)]

    def flipped(self, head: int) -> bool:
        return self.paired and head % 2 == 1

    def keys(self, head: int) -> slice:
        return slice(head * self.key_size, (head + 1) * self.key_size)

    def values(self, head: int) -> slice:
        return slice(head * self.value_size, (head + 1) * self.value_size)

    def tokens(self, chunk: int) -> slice:
        return slice(chunk * self.size, (chunk + 1) * self.size)

    def dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
        return tpu.dot(x, y, axes, self.dtype)


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
    """Exponentials of a chunk's log_w, a tile's heads side by side: [C,heads*K] in plan.dtype.

    `start` and `end` [1,heads*K] float32 are σ and ε.
    """

    a: jax.Array
    r: jax.Array
    grow: jax.Array
    start: jax.Array
    end: jax.Array


class Pairs(NamedTuple):
    """One head's chunk but for its state, in plan.dtype: ra = [R; A] and bk = `stack`(B, K) [2C,K], `inner` [2C,2C].

    `inverse` is (I - AB)^-1: [C,C], or where heads are paired [C,2C] with zeros in the other head's columns.
    `start` and `end` [1,K] float32 are σ and ε.
    """

    ra: jax.Array
    bk: jax.Array
    ra_head: jax.Array
    bk_tail: jax.Array
    inner: jax.Array
    inverse: jax.Array
    start: jax.Array
    end: jax.Array


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


def _decays(plan: Plan, log_w: jax.Array, total: jax.Array) -> Decays:
    """Of log_w and its G [C,heads*K] float32."""
    before = total - log_w
    a, r, grow = (jnp.exp(x).astype(plan.dtype) for x in (before, total, -total))
    return Decays(a, r, grow, jnp.exp(-before[:1]), jnp.exp(total[plan.size - 1 :]))


def stack(plan: Plan, head: int, of_b: jax.Array, of_k: jax.Array) -> jax.Array:
    """Rows that belong to B (or U) and to K (or V), in the order of the head: paired ones take turns.

    So the AB of two heads lie in different lanes of `inner`, and both are inverted side by side.
    """
    first, second = (of_k, of_b) if plan.flipped(head) else (of_b, of_k)
    return jnp.concatenate([first, second], axis=0)


def unstack(plan: Plan, head: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rows of B (or U) and those of K (or V)."""
    first, second = x[: plan.size], x[plan.size :]
    return (second, first) if plan.flipped(head) else (first, second)


def from_values(plan: Plan, head: int, pair: Pairs, v: jax.Array) -> jax.Array:
    """AK V. To move AK to the first lanes would cost more than to multiply AB with rows of zeros."""
    rows = pair.inner[plan.size :]
    if plan.flipped(head):
        return plan.dot(rows[:, : plan.size], v, NN)
    if plan.size % LANES == 0:
        return plan.dot(rows[:, plan.size :], v, NN)
    return plan.dot(rows, jnp.concatenate([jnp.zeros_like(v), v], axis=0), NN)


def solve(plan: Plan, head: int, pair: Pairs, y: jax.Array) -> jax.Array:
    """U = (I - AB)^-1 Y."""
    if plan.flipped(head):
        return plan.dot(pair.inverse, jnp.concatenate([jnp.zeros_like(y), y], axis=0), NN)
    return plan.dot(pair.inverse[:, : plan.size], y, NN)


def solve_transposed(plan: Plan, head: int, pair: Pairs, d_u: jax.Array) -> jax.Array:
    """dY = (I - AB)^-T dU."""
    columns = slice(plan.size, None) if plan.flipped(head) else slice(plan.size)
    return plan.dot(jnp.transpose(pair.inverse)[columns], d_u, NN)


def prepared(plan: Plan, chunk: int, refs: Sequence[Any], mask: Masks) -> Routine[tuple[list[Decays], list[Pairs]]]:
    """A chunk's decays, by tiles, and its heads; refs: r, log_w, k, a, b [1,rows,heads*K]."""
    tiles, rows = plan.tiles, plan.tokens(chunk)
    batches = [tiles[first : first + _BATCH] for first in range(0, len(tiles), _BATCH)]
    done = yield from staggered([_batch(plan, batch, rows, refs, mask) for batch in batches], _BATCH)
    decay, ra, bk, inner = (list(itertools.chain(*parts)) for parts in zip(*done, strict=True))
    inverse = yield from _inverses(plan, inner)
    start, end = (
        [
            getattr(of_tile, name)[:, plan.keys(index)]
            for of_tile, tile in zip(decay, tiles, strict=True)
            for index in range(len(tile))
        ]
        for name in ("start", "end")
    )
    parts = zip(ra, bk, cut(ra, mask.head), cut(bk, mask.tail), inner, inverse, start, end, strict=True)
    return decay, [Pairs(*of_head) for of_head in parts]


def _batch(
    plan: Plan, tiles: list[range], rows: slice, refs: Sequence[Any], mask: Masks
) -> Routine[tuple[list[Decays], list[jax.Array], list[jax.Array], list[jax.Array]]]:
    """Decays of every tile; ra, bk and inner of every head."""

    def from_middle(row: jax.Array, column: jax.Array) -> jax.Array:
        return jnp.where(column <= row, 1.0, 0.0) - jnp.where(column < plan.size // 2, 1.0, 0.0)

    lanes = [slice(plan.keys(tile[0]).start, plan.keys(tile[-1]).stop) for tile in tiles]
    log_w = [refs[1][0, rows, lane].astype(jnp.float32) for lane in lanes]
    total = yield from each(sums(plan, x, from_middle) for x in log_w)
    decay, ra, bk = [], [], []
    for index, lane in enumerate(lanes):
        d = _decays(plan, log_w[index], total[index])
        r, _, k, a, b = (ref[0, rows, lane].astype(plan.dtype) for ref in refs)
        r, k, a, b = r * d.r, k * d.grow, a * d.a, b * d.grow
        decay.append(d)
        for place, head in enumerate(tiles[index]):
            keys = plan.keys(place)
            ra.append(jnp.concatenate([r[:, keys], a[:, keys]], axis=0))
            bk.append(stack(plan, head, b[:, keys], k[:, keys]))
        yield
    columns = yield from each(turned(x) for x in bk)
    products = yield from each(plan.dot(x, y, NN).astype(plan.dtype) for x, y in zip(ra, columns, strict=True))
    return decay, ra, bk, [jnp.where(mask.pairs, x, 0.0) for x in products]


def turned(x: jax.Array) -> jax.Array:
    """The transpose, by the unit for it: one that is an operand of a product is loaded as such, at half the speed.

    In two parts, which keeps the compiler from making it an operand.
    """
    x = jnp.transpose(x)
    half = x.shape[0] // 2
    return jnp.concatenate([x[:half], x[half:]], axis=0)


def cut(arrays: list[jax.Array], visible: jax.Array | None) -> list[jax.Array]:
    """The rows that are visible, zeros for the others."""
    if visible is None:
        return arrays
    return [x * jnp.where(visible, 1.0, 0.0).astype(x.dtype) for x in arrays]


def _inverses(plan: Plan, inner: list[jax.Array]) -> Routine[list[jax.Array]]:
    """(I - AB)^-1 of every head, as in `Pairs`.

    Blocks X on the diagonal are merged to twice their width, X + X (corners of AB) X: only the odd blocks' rows change.
    """
    size = plan.size
    if plan.paired:
        lower = [x[size:] for x in inner] + [jnp.zeros_like(inner[0][size:])] * (len(inner) % 2)
        first = iota((size, 2 * size), 1) < size
        stricts = [
            jnp.concatenate([jnp.where(first, x, 0.0), jnp.where(first, 0.0, y)], axis=0)
            for x, y in zip(lower[::2], lower[1::2], strict=True)
        ]
    else:
        stricts = [x[size:, :size] for x in inner]
    width = min(BASE, size)
    inverses = yield from base_inverses(plan, stricts, width)
    while width < size:
        inverses = yield from merged(plan, stricts, inverses, width)
        width *= 2
    if plan.paired:
        return [inverses[head // 2][size * (head % 2) :][:size] for head in range(plan.heads)]
    return inverses
