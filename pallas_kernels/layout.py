"""Sequences cut into chunks, where in a chunk the state resets, and what arguments of a recurrence must look like."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Resets(NamedTuple):
    """Which tokens of a chunk see each other and the states around it, 1.0 or 0.0.

    `pairs` [B,1,C,C]: token i (row) and j (column) are in one segment. `head` [B,1,C,1]: no reset between the
    chunk's start and token i, i included. `tail` [B,1,C,1]: no reset after token j. `keep` [B,1,1,1]: no reset in
    the chunk. `inside` [B,1,C,1]: token i is not the first of a segment.
    """

    pairs: jax.Array
    head: jax.Array
    tail: jax.Array
    keep: jax.Array
    inside: jax.Array


def fitting_chunk(length: int, chunk_size: int) -> int:
    """chunk_size, or for short sequences the power of two that just holds them."""
    return min(chunk_size, 1 << (length - 1).bit_length())


def pad(x: jax.Array, chunk_size: int) -> jax.Array:
    """[B,T,...] with zeros at the end up to a whole number of chunks."""
    missing = -x.shape[1] % chunk_size
    return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x


def take(arrays: Iterable[jax.Array], index: jax.Array, chunk_size: int) -> tuple[jax.Array, ...]:
    """Chunk `index` of arrays [B,T,H,D], float32 [B,H,C,D]."""

    def one(x: jax.Array) -> jax.Array:
        chunk = jax.lax.dynamic_slice_in_dim(x, index * chunk_size, chunk_size, axis=1)
        return jnp.swapaxes(chunk, 1, 2).astype(jnp.float32)

    return tuple(one(x) for x in arrays)


def put(x: jax.Array, index: jax.Array, chunk: jax.Array) -> jax.Array:
    """x [B,T,H,D] with chunk `index` replaced by chunk [B,H,C,D]."""
    chunk = jnp.swapaxes(chunk, 1, 2).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(x, chunk, index * chunk.shape[1], axis=1)


def boundaries(segment_ids: jax.Array) -> jax.Array:
    """[B,T] bool: token t > 0 starts a new segment."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def resets(starts: jax.Array | None, index: jax.Array, chunk_size: int) -> Resets | None:
    """The resets in chunk `index`, at the tokens that starts [B,T] marks; None for None."""
    if starts is None:
        return None
    first = jax.lax.dynamic_slice_in_dim(starts, index * chunk_size, chunk_size, axis=1)[:, None, :, None]
    count = jnp.cumsum(first.astype(jnp.int32), axis=2)
    last = count[:, :, -1:, :]
    masks = (count == transpose(count), count == 0, count == last, last == 0, ~first)
    return Resets(*(mask.astype(jnp.float32) for mask in masks))


def transpose(x: jax.Array) -> jax.Array:
    """[...,M,N] -> [...,N,M]."""
    return jnp.swapaxes(x, -1, -2)


def transposed(x: jax.Array) -> jax.Array:
    """`transpose` as an array of its own, for the left side of a product.

    XLA's CPU backend folds a transpose into the product, and has its fast matmul for transposed right sides alone.
    """
    return jax.lax.optimization_barrier(transpose(x))


def row_sums(x: jax.Array) -> jax.Array:
    """[...,M,N] -> [...,M,1], as a product: XLA's CPU backend can take ten times as long over the reduction."""
    ones = jnp.ones((*x.shape[:-2], x.shape[-1], 1), x.dtype)
    return jnp.matmul(x, ones, precision=jax.lax.Precision.HIGHEST)


def prefix_sums(x: jax.Array) -> jax.Array:
    """[...,C,K] summed from the first row to each."""
    return summed(jnp.tril(jnp.ones((x.shape[-2], x.shape[-2]), x.dtype)), x)


def suffix_sums(x: jax.Array) -> jax.Array:
    """[...,C,K] summed from each row to the last."""
    return summed(jnp.triu(jnp.ones((x.shape[-2], x.shape[-2]), x.dtype)), x)


def summed(selection: jax.Array, x: jax.Array) -> jax.Array:
    """The sums of rows of x [...,M,K] that the ones of `selection` [N,M] pick; as exact as float32 is, on a TPU too."""
    selection = jnp.broadcast_to(selection, (*x.shape[:-2], *selection.shape))
    return jnp.matmul(selection, x, precision=jax.lax.Precision.HIGHEST)


def check_recurrence(
    operation: str,
    keys: dict[str, jax.Array],
    v: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> None:
    """Raises ValueError unless all of `keys` are [B,T,H,K] alike and v, the state and the segment ids go with them."""
    first, like = next(iter(keys.items()))
    if like.ndim != 4 or like.shape[1] < 1:
        raise ValueError(f"{operation} got {first} of shape {like.shape}, expected [B,T,H,K] with T >= 1.")
    batch, length, heads, key_size = like.shape
    expected = dict.fromkeys(keys, like.shape)
    expected["v"] = (batch, length, heads, v.shape[-1])
    arrays = {**keys, "v": v}
    if initial_state is not None:
        arrays["initial_state"] = initial_state
        expected["initial_state"] = (batch, heads, key_size, v.shape[-1])
    if segment_ids is not None:
        arrays["segment_ids"] = segment_ids
        expected["segment_ids"] = (batch, length)
    check_shapes(operation, arrays, expected, f"{first} of shape {like.shape}")


def check_step(operation: str, keys: dict[str, jax.Array], v: jax.Array, state: jax.Array) -> None:
    """Raises ValueError unless all of `keys` are [B,H,K] alike and v and the state go with them."""
    first, like = next(iter(keys.items()))
    if like.ndim != 3:
        raise ValueError(f"{operation} got {first} of shape {like.shape}, expected one token of each row, [B,H,K].")
    expected = dict.fromkeys(keys, like.shape)
    expected["v"] = (*like.shape[:2], v.shape[-1])
    expected["state"] = (*like.shape, v.shape[-1])
    check_shapes(operation, {**keys, "v": v, "state": state}, expected, f"{first} of shape {like.shape}")


def check_shapes(operation: str, arrays: dict[str, jax.Array], expected: dict[str, tuple[int, ...]], like: str) -> None:
    """Raises ValueError for the first array whose shape is not the expected one; `like` says what sets it."""
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise ValueError(
                f"{operation} got {name} of shape {array.shape}, expected {expected[name]} to go with {like}; "
                "change the one that is wrong."
            )


def check_chunk_size(operation: str, chunk_size: int | None) -> None:
    """Raises ValueError unless chunk_size is None or a power of two."""
    if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
        raise ValueError(f"{operation} got chunk_size={chunk_size}, expected a power of two; try 16, 32 or 64.")
