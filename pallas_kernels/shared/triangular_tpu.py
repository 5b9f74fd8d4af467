"""The inverses of unit lower triangular matrices inside a TPU kernel, for lists of heads, whose work overlaps."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.shared.turns import Routine, each

# Which axes of two matrices a product sums over.
NN, NT, TN = (1, 0), (1, 1), (0, 0)
# Diagonal blocks of this size are inverted row by row, larger ones are merged from their quarters.
BASE = 16


@runtime_checkable
class _Products(Protocol):
    """How a kernel's plan multiplies matrices: operands of `dtype`, sums in float32."""

    @property
    def dtype(self) -> Any: ...

    def dot(self, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array: ...


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def merged(
    plan: _Products, stricts: list[jax.Array], inverses: list[jax.Array], width: int
) -> Routine[list[jax.Array]]:
    """Inverses of diagonal blocks of 2 * width from those of width.

    A product takes every second block alone: two matrices share one, the second in the places that the first leaves,
    and so each loads half as many rows into the matrix unit.
    """
    total = stricts[0].shape[0]

    def blocks(x: jax.Array, first: int) -> list[jax.Array]:
        return [x[start : start + width] for start in range(first * width, total, 2 * width)]

    def taking_turns(evens: list[jax.Array], odds: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([x for pair in zip(evens, odds, strict=True) for x in pair], axis=0)

    def halves(x: jax.Array) -> list[jax.Array]:
        return [x[start : start + width] for start in range(0, x.shape[0], width)]

    def product(left: list[jax.Array], right: list[list[jax.Array]], first: int) -> list[jax.Array]:
        """left x right of both matrices; columns of left and rows of right are those of blocks first, first + 2, ..."""
        there = pltpu.roll(left[1], width if first == 0 else total - width, 1)
        rows = taking_turns(*(right if first == 0 else right[::-1]))
        both = plan.dot(jnp.concatenate([left[0], there], axis=0), rows, NN).astype(plan.dtype)
        return [both[: total // 2], both[total // 2 :]]

    shape = (total // 2, total)
    corner = iota(shape, 1) // width == 2 * (iota(shape, 0) // width)
    odds = [jnp.concatenate(blocks(x, 1), axis=0) for x in inverses]
    corners = [jnp.where(corner, jnp.concatenate(blocks(x, 1), axis=0), 0.0) for x in stricts]
    evens = [blocks(x, 0) for x in inverses]
    # An odd one out goes with itself.
    pairs = [(index, min(index + 1, len(stricts) - 1)) for index in range(0, len(stricts), 2)]
    right = yield from each(product([corners[i], corners[j]], [evens[i], evens[j]], 0) for i, j in pairs)
    left = yield from each(
        product([odds[i], odds[j]], [halves(x) for x in of_pair], 1)
        for (i, j), of_pair in zip(pairs, right, strict=True)
    )
    filled = [x for of_pair in left for x in of_pair][: len(stricts)]
    return [taking_turns(even, halves(odd + x)) for even, odd, x in zip(evens, odds, filled, strict=True)]


def base_inverses(plan: _Products, stricts: list[jax.Array], width: int) -> Routine[list[jax.Array]]:
    """The inverses of the diagonal blocks, with zeros elsewhere.

    Forward substitution, X <- X + N_j (row j of X) for j = 0, 1, ..., on all blocks at once: they lie side by side in
    [width,...], and column j of every block is spread over its lanes. Once half of the columns are done, so are the
    rows above.
    """
    size, half = stricts[0].shape[0], width // 2
    lane = iota((width, size), 1)
    first = lane[:half] // width * width
    diagonal = iota((size, size), 0) // width == iota((size, size), 1) // width
    unit = jnp.where(iota((width, size), 0) == lane % width, 1.0, 0.0)
    packed = []
    for strict in stricts:
        blocks = strict[:width]
        for start in range(width, size, width):
            blocks = jnp.where(lane // width == start // width, strict[start : start + width], blocks)
        packed.append(blocks.astype(jnp.float32))
        yield

    def column(blocks: jax.Array, j: int) -> jax.Array:
        return jnp.take_along_axis(blocks, first + j, axis=1, mode="promise_in_bounds")

    above, below = [unit[:half]] * len(stricts), [unit[half:]] * len(stricts)
    for j in range(width - 1):
        for index, blocks in enumerate(packed):
            row = above[index][j : j + 1] if j < half else below[index][j - half : j - half + 1]
            if j < half - 1:
                above[index] = above[index] + column(blocks[:half], j) * row
            below[index] = below[index] + column(blocks[half:], j) * row
        yield
    inverses = []
    for parts in zip(above, below, strict=True):
        x = jnp.concatenate(parts, axis=0).astype(plan.dtype)
        inverses.append(jnp.where(diagonal, jnp.concatenate([x] * (size // width), axis=0), 0.0))
    return inverses
