"""The inverses of unit lower triangular matrices inside a TPU kernel, for lists of heads, whose work overlaps."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

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


def merged(plan: _Products, stricts: list[jax.Array], found: list[jax.Array], width: int) -> list[jax.Array]:
    """Inverses of diagonal blocks of 2 * width from those of width."""
    total = stricts[0].shape[0]

    def odd(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x[start : start + width] for start in range(width, total, 2 * width)], axis=0)

    def spread(x: jax.Array) -> jax.Array:
        gap = jnp.zeros((width, total), x.dtype)
        parts = [part for start in range(0, total // 2, width) for part in (gap, x[start : start + width])]
        return jnp.concatenate(parts, axis=0)

    shape = (total // 2, total)
    corner = iota(shape, 1) // width == 2 * (iota(shape, 0) // width)
    corners = [jnp.where(corner, odd(strict), 0.0) for strict in stricts]
    right = [plan.dot(low, x, NN).astype(plan.dtype) for low, x in zip(corners, found, strict=True)]
    left = [plan.dot(odd(x), spread(y), NN) for x, y in zip(found, right, strict=True)]
    return [x + spread(y) for x, y in zip(found, left, strict=True)]


def base_inverses(plan: _Products, stricts: list[jax.Array], width: int) -> list[jax.Array]:
    """The inverses of the diagonal blocks, with zeros elsewhere.

    Forward substitution, X <- X + N_j (row j of X) for j = 0, 1, ..., on all blocks at once: they lie side by side in
    [width,...], and a product with zeros and ones spreads column j of every block over its lanes.
    """
    size = stricts[0].shape[0]
    lane = iota((width, size), 1)
    packed = []
    for strict in stricts:
        blocks = strict[:width]
        for start in range(width, size, width):
            blocks = jnp.where(lane // width == start // width, strict[start : start + width], blocks)
        packed.append(blocks)
    steps = width - 1
    source, target = iota((size, steps * size), 0), iota((size, steps * size), 1)
    block = (target % size) // width * width
    spreading = jnp.where(source == block + target // size, 1.0, 0.0)
    columns = plan.dot(jnp.concatenate(packed, axis=0), spreading, NN)
    found = []
    diagonal = iota((size, size), 0) // width == iota((size, size), 1) // width
    for index in range(len(stricts)):
        x = jnp.where(iota((width, size), 0) == lane % width, 1.0, 0.0)
        for j in range(steps):
            x = x + columns[index * width : (index + 1) * width, j * size : (j + 1) * size] * x[j : j + 1]
        found.append(jnp.where(diagonal, jnp.concatenate([x] * (size // width), axis=0), 0.0))
    return found
