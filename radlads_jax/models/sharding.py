"""How activations and batches lie over a mesh.

Between layers the residual stream is split by rows (data, fsdp) and by positions (context, tensor); inside them, by
rows, by shards of rows (context) and by heads.
"""

import contextlib
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as DeviceMesh

from pallas_kernels.sharded import ROWS, constrain, current_mesh, fitting_spec

AnyMesh = DeviceMesh | AbstractMesh
AXES = ("data", "fsdp", "tensor", "context")


def traced_over(mesh: DeviceMesh | None) -> AbstractContextManager[Any]:
    """What is traced inside knows the mesh, and lays out its values by it."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def one_device_mesh(device: Any) -> DeviceMesh:
    """A mesh of one device, for programs that are to be compiled for it."""
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=[device])


def rows_sharding(mesh: AnyMesh, rows: int) -> NamedSharding:
    """A batch's rows over data and fsdp, as far as these divide them."""
    return NamedSharding(mesh, fitting_spec((ROWS,), (rows,), mesh))


def own_rows(mesh: DeviceMesh | None, rows: int) -> np.ndarray:
    """Which of a batch's rows this process's devices compute, ascending."""
    if mesh is None:
        return np.arange(rows)
    slices = rows_sharding(mesh, rows).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in slices]))


def place_rows(mesh: DeviceMesh | None, batch: Mapping[str, Any], rows: int) -> Mapping[str, Any]:
    """A batch of `rows` rows on the devices that compute them, from this process's `own_rows` of [B, T] arrays."""
    if mesh is None:
        return batch
    placed, here = rows_sharding(mesh, rows), own_rows(mesh, rows)

    def placed_array(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return values[np.searchsorted(here, np.arange(rows)[index[0]])]

        return jax.make_array_from_callback((rows, *values.shape[1:]), placed, part)

    return {name: placed_array(values) for name, values in batch.items()}


def place_whole(mesh: DeviceMesh | None, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch of [B, T] arrays that every process has whole, on the devices that compute its rows."""
    rows = len(next(iter(batch.values())))
    own = own_rows(mesh, rows)
    placed = place_rows(mesh, {name: values[own] for name, values in batch.items()}, rows)
    return {name: jnp.asarray(values) for name, values in placed.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def moved(x: jax.Array, source: PartitionSpec, target: PartitionSpec) -> jax.Array:
    """x, which lies as `source`, as `target`; its gradient as `source` again, summed on the way there."""
    return constrain(constrain(x, *source), *target)


def _moved_forward(x: jax.Array, source: PartitionSpec, target: PartitionSpec) -> tuple[jax.Array, None]:
    return moved(x, source, target), None


def _moved_backward(source: PartitionSpec, target: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    del target
    return (constrain(gradient, *source),)


moved.defvjp(_moved_forward, _moved_backward)


def residual(x: jax.Array) -> jax.Array:
    """[B, T, D] as it lies between layers: rows over data and fsdp, positions over context and tensor."""
    return constrain(x, ROWS, ("context", "tensor"))


@jax.custom_vjp
def to_residual(x: jax.Array) -> jax.Array:
    """What a mixer or MLP gives, as `residual`; its gradient comes to them with a row's, or a shard's, positions whole.

    Left to itself the gradient stays in its positions, for which every device fetches all widths of the matrices.
    """
    return residual(x)


def _to_residual_forward(x: jax.Array) -> tuple[jax.Array, None]:
    return residual(x), None


def _to_residual_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(residual(gradient), ROWS, "context"),)


to_residual.defvjp(_to_residual_forward, _to_residual_backward)


def whole_rows(x: jax.Array) -> jax.Array:
    """[B, T, D] of the residual stream with a row's, or a shard's, positions together, as mixers and MLPs read it."""
    if current_mesh() is None:
        return x
    return moved(x, PartitionSpec(ROWS, ("context", "tensor")), PartitionSpec(ROWS, "context"))


def by_heads(x: jax.Array) -> jax.Array:
    """[B, T, H, K] with heads over tensor, positions over context."""
    return constrain(x, ROWS, "context", "tensor")
