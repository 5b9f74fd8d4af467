"""Porting: a Hugging Face checkpoint into our parameter tree, one tensor at a time."""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from pallas_kernels.sharded import fitting
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.spec import Layout
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import ParamPath, Params, flatten, nest, shown
from radlads_jax.porting.model_tensors import model_tensors
from radlads_jax.porting.names import Location, disk_tensors
from radlads_jax.porting.safetensors_read import StoredTensor
from radlads_jax.system.storage import as_path, in_bucket

# A parameter tree's shardings, one for all, or None for the default device.
_Shardings = dict[str, Any] | Sharding | None
_Array = TypeVar("_Array", np.ndarray, jax.Array)


def load_params(
    source_dir: str | os.PathLike, cfg: ModelConfig, *, dtype: str | None = None, shardings: _Shardings = None
) -> Params:
    """The parameters of a model directory, cast to dtype (default: cfg.param_dtype) and placed with their shardings.

    Every (stacked) parameter is allocated once on the devices; then each tensor is mapped from its file, its slices
    copied to the devices that hold them, and put into its layer in place: the host never holds more than one tensor.
    Of a tensor in a bucket every device fetches other rows, so that all hosts together read it about once.
    Raises ValueError as `model_tensors` does, before any is read.
    """
    source = as_path(source_dir)
    stored = model_tensors(source, cfg)
    expected = disk_tensors(cfg)
    shapes = param_shapes(cfg)
    placement = _by_path(shardings, shapes)
    param_dtype = jnp.dtype(dtype or cfg.param_dtype)
    params = _zeros(shapes, param_dtype, placement)
    in_file_order = sorted(expected, key=lambda name: (stored[name].file, stored[name].start))
    for name in in_file_order:
        location = expected[name]
        params[location.path] = _place(params[location.path], stored[name], location, placement[location.path])
    return nest(params)


def _by_path(shardings: _Shardings, shapes: dict[ParamPath, tuple[int, ...]]) -> dict[ParamPath, Sharding | None]:
    if shardings is None or isinstance(shardings, Sharding):
        return dict.fromkeys(shapes, shardings)
    flat = flatten(shardings)
    if flat.keys() != shapes.keys():
        raise ValueError(
            f"the shardings lack {[shown(p) for p in shapes.keys() - flat.keys()]} and have in excess "
            f"{[shown(p) for p in flat.keys() - shapes.keys()]}; expected one for each parameter. Build them from the "
            "model's own tree."
        )
    return flat


def _zeros(
    shapes: dict[ParamPath, tuple[int, ...]], dtype: np.dtype, placement: dict[ParamPath, Sharding | None]
) -> dict[ParamPath, jax.Array]:
    make = _zeros_maker(tuple(shapes.values()), dtype, tuple(placement[path] for path in shapes))
    return dict(zip(shapes, make(), strict=True))


@functools.cache
def _zeros_maker(
    shapes: tuple[tuple[int, ...], ...], dtype: np.dtype, shardings: tuple[Sharding | None, ...]
) -> Callable[[], tuple[jax.Array, ...]]:
    return jax.jit(lambda: tuple(jnp.zeros(shape, dtype) for shape in shapes), out_shardings=shardings)


def _place(param: jax.Array, tensor: StoredTensor, location: Location, sharding: Sharding | None) -> jax.Array:
    """The parameter with one tensor from a file put in; the old array is given up."""
    layout = location.layout
    if isinstance(sharding, NamedSharding) and (in_bucket(tensor.file) or not sharding.is_fully_addressable):
        value = _by_rows(tensor, sharding, location)
    elif isinstance(sharding, NamedSharding):
        host = tensor.open()
        value_sharding = _disk_sharding(sharding, location)
        value = jax.make_array_from_callback(host.shape, value_sharding, lambda index: host[index])
    elif sharding is None or isinstance(sharding, SingleDeviceSharding):
        # A view of the file: it changes its layout on its way to the device, in one pass over the memory.
        value, layout = jax.device_put(_to_ours(tensor.open(), layout), sharding), "same"
    else:
        raise NotImplementedError(f"porting places parameters with NamedSharding, not {type(sharding).__name__}.")
    index = np.array(location.index, np.int32)
    placed = _writer(sharding)(param, value, index, layout=layout)
    # The next tensor is mapped only when this one has left the host.
    return jax.block_until_ready(placed)


def _by_rows(tensor: StoredTensor, sharding: NamedSharding, location: Location) -> jax.Array:
    """One tensor as it is stored, of which every process reads other rows; the devices exchange them as it is placed.

    As the parameter itself lies, a host keeps columns of most matrices: they are in all pages of a file, so that every
    host would read the whole of it, and in a bucket they are many small ranges.
    """
    kept = _disk_sharding(sharding, location).spec[0]
    # First those axes over which rows are split in the parameter too: the others change places within their groups.
    order = sorted(
        sharding.mesh.axis_names, key=lambda axis: axis not in (kept if isinstance(kept, tuple) else (kept,))
    )
    placed = NamedSharding(sharding.mesh, PartitionSpec(fitting(order, tensor.shape[0], sharding.mesh)))

    def rows(index: tuple[slice, ...] | None) -> tuple[int, int]:
        assert index is not None
        begin, end, _ = index[0].indices(tensor.shape[0])
        return begin, end

    ranges = sorted(set(map(rows, placed.addressable_devices_indices_map(tensor.shape).values())))
    parts = dict(zip(ranges, tensor.read_rows(ranges), strict=True))
    return jax.make_array_from_callback(tensor.shape, placed, lambda index: parts[rows(index)])


def _disk_sharding(sharding: NamedSharding, location: Location) -> NamedSharding:
    """The sharding of one tensor as it is on disk, so that every device gets just the part it keeps."""
    rank = len(location.index) + len(location.shape)
    spec = (*sharding.spec, *[None] * (rank - len(sharding.spec)))[len(location.index) :]
    axes = {"same": spec, "transposed": spec[::-1], "vector": (None, None, *spec)}[location.layout]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


@functools.cache
def _writer(sharding: Sharding | None) -> Callable[..., jax.Array]:
    # Without out_shardings the compiler may choose another sharding, and the donated buffer could not be reused.
    return jax.jit(_written, donate_argnums=0, static_argnames="layout", out_shardings=sharding)


def _written(param: jax.Array, value: jax.Array, index: jax.Array, *, layout: Layout) -> jax.Array:
    value = _to_ours(value, layout).astype(param.dtype)
    leading = param.ndim - value.ndim
    starts = [index[axis] if axis < leading else 0 for axis in range(param.ndim)]
    # As integers, because XLA on CPU widens a whole bfloat16 array to update a part of it.
    bits = jnp.dtype(f"uint{8 * param.dtype.itemsize}")
    whole = jax.lax.bitcast_convert_type(param, bits)
    part = jax.lax.bitcast_convert_type(value, bits).reshape((1,) * leading + value.shape)
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(whole, part, starts), param.dtype)


def _to_ours(tensor: _Array, layout: Layout) -> _Array:
    """A tensor as it is on disk, in our layout."""
    return {"same": tensor, "transposed": tensor.T, "vector": tensor.reshape(-1)}[layout]


def to_disk(tensor: jax.Array, layout: Layout) -> jax.Array:
    """The inverse of `_to_ours`."""
    return {"same": tensor, "transposed": tensor.T, "vector": tensor.reshape(1, 1, -1)}[layout]
