"""Parameters as tensors on disk: each is brought to the host when it is written, one at a time."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.spec import Layout
from radlads_jax.models.tree import ParamPath
from radlads_jax.porting.load import to_disk
from radlads_jax.porting.names import Location, disk_tensors
from radlads_jax.porting.safetensors_write import PlannedTensor


def planned_tensors(flat: dict[ParamPath, Any], cfg: ModelConfig, dtype: str | None) -> list[PlannedTensor]:
    """Every tensor of the model under its name on disk. dtype: None keeps each parameter's own."""
    return [_planned(name, flat, location, dtype) for name, location in disk_tensors(cfg).items()]


def _planned(name: str, flat: dict[ParamPath, Any], location: Location, dtype: str | None) -> PlannedTensor:
    param = flat[location.path]
    disk_dtype = np.dtype(jnp.dtype(dtype or param.dtype))
    return PlannedTensor(name, location.disk_shape, disk_dtype, lambda: _fetched(param, location, disk_dtype))


def _fetched(param: jax.Array, location: Location, dtype: np.dtype) -> np.ndarray:
    """One layer's tensor on the host; where several processes share an array, every one gets the whole tensor."""
    replicated = None
    if isinstance(param, jax.Array) and not param.is_fully_addressable:
        assert isinstance(param.sharding, NamedSharding)
        replicated = NamedSharding(param.sharding.mesh, PartitionSpec())
    index = np.array(location.index, np.int32)
    taken = _reader(replicated)(param, index, axes=len(location.index), layout=location.layout, dtype=dtype)
    return np.asarray(taken)


@functools.cache
def _reader(sharding: Sharding | None) -> Callable[..., jax.Array]:
    return jax.jit(_taken, static_argnames=("axes", "layout", "dtype"), out_shardings=sharding)


def _taken(param: jax.Array, index: jax.Array, *, axes: int, layout: Layout, dtype: np.dtype) -> jax.Array:
    for axis in range(axes):
        param = jax.lax.dynamic_index_in_dim(param, index[axis], axis=0, keepdims=False)
    return to_disk(param.astype(dtype), layout)
