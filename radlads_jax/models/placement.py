"""Where every parameter lies on a mesh, by the axes that its Tensor names.

Weights lie split over fsdp and, by heads and widths, over tensor. A layer brings its own together over fsdp when it
runs, in the dtype it computes in, and hands its gradients back split.
"""

import functools
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.sharded import Axes, constrain, current_mesh, fitting_spec
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.sharding import AnyMesh, moved
from radlads_jax.models.spec import Tensor
from radlads_jax.models.tensors import layer_tensors, tensor_of
from radlads_jax.models.tree import joined, stack_of


def param_axes(cfg: ModelConfig, path: str, rank: int) -> tuple[Axes, ...]:
    """The axes of an array's dimensions, by the parameter of cfg that its path is or ends in, as in an optimizer's
    state; none where it is no parameter's (a counter), or has another rank than it (a factored moment)."""
    tensor = tensor_of(cfg, path)
    if tensor is None or rank != _rank(tensor, path):
        return ()
    return (None, *tensor.axes) if stack_of(path) is not None else tensor.axes


def _rank(tensor: Tensor, path: str) -> int:
    return len(tensor.shape) + (tensor.row is not None) + (stack_of(path) is not None)


def shardings(mesh: AnyMesh | None, tree: Any, cfg: ModelConfig) -> Any:
    """The sharding of every leaf of a tree of cfg's parameters or of a training state of theirs; None without a mesh.

    An axis that does not divide its dimension is left out.
    """
    if mesh is None:
        return None

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, fitting_spec(param_axes(cfg, joined(path), len(leaf.shape)), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def abstract(mesh: AnyMesh | None, tree: Any, cfg: ModelConfig) -> Any:
    """Shapes, dtypes and shardings of a tree's leaves, without arrays."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    placed = shardings(mesh, tree, cfg)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)


def constrain_params(params: Any, cfg: ModelConfig) -> Any:
    """Parameters, or gradients of theirs, as `shardings` places them on the mesh that is being traced under."""
    if current_mesh() is None:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, x: constrain(x, *param_axes(cfg, joined(path), len(x.shape))), params
    )


def gathered(layer: Any, cfg: ModelConfig, mixer: str, prefix: str = "") -> Any:
    """The parameters of one layer with this mixer (or those under `prefix`, as "mixer/"), whole over fsdp; matrices in
    cfg.dtype.

    They are cast before they travel. Their gradients go back to where the parameters lie.
    """
    mesh = current_mesh()
    if mesh is None:
        return layer
    table, tensor_parts = _layer_table(cfg, mixer), mesh.shape["tensor"]
    counts = {"heads": cfg.num_heads, "kv_heads": cfg.num_kv_heads, "width": tensor_parts, "nothing": 1}

    def of_leaf(path: tuple, x: jax.Array) -> jax.Array:
        tensor = table[prefix + joined(path).removesuffix("/value")]
        stored = fitting_spec(tensor.axes, x.shape, mesh)
        dropped = {"fsdp"} if counts[tensor.split_by] % tensor_parts == 0 else {"fsdp", "tensor"}
        used = tuple(_without(entry, dropped) for entry in stored)
        x = x.astype(cfg.dtype) if x.ndim > 1 else x
        return moved(x, stored, PartitionSpec(*used))

    return jax.tree_util.tree_map_with_path(of_leaf, layer)


@functools.lru_cache
def _layer_table(cfg: ModelConfig, mixer: str) -> dict[str, Tensor]:
    return {tensor.path: tensor for tensor in layer_tensors(cfg, mixer)}


def _without(entry: Axes, dropped: set[str]) -> Axes:
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return tuple(name for name in names if name not in dropped) or None
