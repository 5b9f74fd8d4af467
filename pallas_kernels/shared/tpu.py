"""What the recurrences' TPU calls share: the sizes they take, and how sequences, states and resets are cut into blocks.

A grid step sees one row of the batch, a group of heads and a block of `rows` tokens, which is one chunk or a few; the
last axis runs in order, and from the end where the recurrence runs backward.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, layout
from pallas_kernels.dispatch import KERNEL_HEAD_SIZES

CHUNK_SIZES = (16, 32, 64, 128)
LANES = 128


def check_sizes(operation: str, key_size: int, value_size: int, chunk_size: int | None) -> None:
    """Raises NotImplementedError for head or chunk sizes that the kernels are not made for."""
    if key_size not in KERNEL_HEAD_SIZES or value_size not in KERNEL_HEAD_SIZES:
        raise NotImplementedError(
            f"{operation} on TPU got heads of {key_size} key and {value_size} value channels, expected 64 or 128 each; "
            "take implementation='chunked'."
        )
    if chunk_size not in (None, *CHUNK_SIZES):
        raise NotImplementedError(
            f"{operation} on TPU got chunk_size={chunk_size}, expected one of {CHUNK_SIZES} or None."
        )


def dot(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype: Any) -> jax.Array:
    """A product of matrices in a kernel, in float32: one pass of bfloat16 operands, or all of float32's digits."""
    return jax.lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def interpreted(interpret: Any) -> Any:
    """pallas_call's `interpret`: None interprets wherever there is no TPU."""
    return dispatch.backend() != "tpu" if interpret is None else interpret


def filled(x: jax.Array, rows: int, more_heads: int) -> jax.Array:
    """x [B,T,H,...] with zeros up to a whole number of blocks, and with more heads of zeros."""
    x = layout.pad(x, rows)
    return jnp.pad(x, ((0, 0), (0, 0), (0, more_heads), *((0, 0),) * (x.ndim - 3))) if more_heads else x


def wide(x: jax.Array, rows: int, more_heads: int) -> jax.Array:
    """The same of x [B,T,H,K], heads side by side: [B,T,H*K]."""
    x = filled(x, rows, more_heads)
    return x.reshape(*x.shape[:2], -1)


def resets_so_far(segment_ids: jax.Array | None, rows: int, size: int) -> jax.Array | None:
    """[B,N,1,C] float32: the segments that have begun in a chunk up to each of its tokens."""
    if segment_ids is None:
        return None
    starts = layout.pad(layout.boundaries(segment_ids), rows)
    return jnp.cumsum(starts.reshape(starts.shape[0], -1, 1, size).astype(jnp.float32), axis=-1)


def block_specs(
    length: int,
    *,
    size: int,
    chunks: int = 1,
    key_channels: int,
    value_channels: int,
    state: tuple[int, int, int],
    rows: dict[str, int] | None = None,
    reverse: bool,
) -> dict[str, pl.BlockSpec]:
    """What of each kind of array a grid step sees: sequences "key" and "value" [B,T,channels], "state" and "states".

    size, chunks: tokens of a chunk, and chunks of a block. state: of a group of heads. "counts": as `resets_so_far` has
    them. rows: of arrays [B,S,N,rows,C] of S groups of heads, by the names of their specs.
    """
    blocks = length // (size * chunks)

    def at(index: jax.Array) -> jax.Array:
        return blocks - 1 - index if reverse else index

    def sequence(channels: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, size * chunks, channels), lambda b, h, n: (b, at(n), h))

    def of_rows(count: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, chunks, count, size), lambda b, h, n: (b, h, at(n), 0, 0))

    return {
        "key": sequence(key_channels),
        "value": sequence(value_channels),
        "counts": pl.BlockSpec((1, chunks, 1, size), lambda b, h, n: (b, at(n), 0, 0)),
        "state": pl.BlockSpec((1, *state), lambda b, h, n: (b, h, 0, 0)),
        "states": pl.BlockSpec((1, chunks, *state), lambda b, h, n: (b, at(n), h, 0, 0)),
        **{name: of_rows(count) for name, count in (rows or {}).items()},
    }


def compiler_params(vmem_bytes: int) -> pltpu.CompilerParams:
    """Blocks of a sequence in order, batch and heads in any."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes)
