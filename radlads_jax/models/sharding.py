"""The mesh, and where every parameter lies on it: RULES from a parameter's path to the axes of its dimensions.

Weights lie split over fsdp and, by heads and widths, over tensor. A layer brings its own together over fsdp when it
runs, in the dtype it computes in, and hands its gradients back split. Between layers the residual stream is split by
rows (data, fsdp) and by positions (context, tensor); inside them, by rows, by pieces of rows (context) and by heads.
"""

import contextlib
import functools
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.sharding import Mesh as DeviceMesh

from pallas_kernels.sharded import ROWS, Axes, constrain, current_mesh, fitting_spec
from radlads_jax.models.config import ModelConfig

AnyMesh = DeviceMesh | AbstractMesh
AXES = ("data", "fsdp", "tensor", "context")

# Path of a parameter (whole, or the end of a path in the optimizer's state) -> axes of its dimensions, the layers of a
# stack on the first; () where all of them are whole. An axis that does not divide its dimension is left out.
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (r"embed/embedding", ("tensor", "fsdp")),
    (r"head/kernel", ("fsdp", "tensor")),
    (r"norm/scale", ()),
    (r"stacks/\d+/(input|post)_norm/scale", ()),
    (r"stacks/\d+/mlp/(gate|up)/kernel", (None, "fsdp", "tensor")),
    (r"stacks/\d+/mlp/down/kernel", (None, "tensor", "fsdp")),
    (r"stacks/\d+/mixer/(q|k|v|gate)/kernel", (None, "fsdp", "tensor")),
    (r"stacks/\d+/mixer/o/kernel", (None, "tensor", "fsdp")),
    (r"stacks/\d+/mixer/(q|k|v)/bias", (None, "tensor")),
    (r"stacks/\d+/mixer/o/bias", ()),
    (r"stacks/\d+/mixer/(q|k)_norm/scale", ()),
    (r"stacks/\d+/mixer/(decay|iclr|value|gate|shift)/a", (None, ("fsdp", "tensor"), None)),
    (r"stacks/\d+/mixer/(decay|iclr|value|gate)/b", (None, None, ("tensor", "fsdp"))),
    (r"stacks/\d+/mixer/(decay|iclr|value)/base", (None, "tensor")),
    (r"stacks/\d+/mixer/shift/b", (None, None, None, ("fsdp", "tensor"))),
    (r"stacks/\d+/mixer/shift/mu(_x)?", ()),
    (r"stacks/\d+/mixer/(k_k|k_a)", (None, "tensor")),
    (r"stacks/\d+/mixer/r_k", (None, "tensor", None)),
    (r"stacks/\d+/mixer/ln_x/(scale|bias)", (None, "tensor")),
)
_BY_KV_HEADS = re.compile(r"mixer/(k|v)/(kernel|bias)$")
# What every device of a tensor group uses whole: first factors of low-rank maps, and the token shift.
_USED_WHOLE = re.compile(r"mixer/(\w+/a|shift/b)$")


def traced_over(mesh: DeviceMesh | None) -> AbstractContextManager[Any]:
    """What is traced inside knows the mesh, and lays out its values by it."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def one_device_mesh(device: Any) -> DeviceMesh:
    """A mesh of one device, for programs that are to be compiled for it."""
    return jax.make_mesh((1,) * len(AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=[device])


def rule_axes(path: str) -> tuple[Axes, ...] | None:
    """The axes of the one rule that this path ends in; None for what is no parameter (a counter)."""
    found = [axes for pattern, axes in RULES if re.search(rf"(^|/)({pattern})$", path)]
    assert len(found) <= 1, path
    return found[0] if found else None


def shardings(mesh: AnyMesh | None, tree: Any) -> Any:
    """The sharding of every leaf of a tree of parameters or of a training state; None without a mesh.

    An optimizer may keep less of a parameter than its shape: what has other dimensions than the rule is whole on every
    device.
    """
    if mesh is None:
        return None

    def one(path: tuple, leaf: Any) -> NamedSharding:
        axes = rule_axes(_path(path)) or ()
        spec = fitting_spec(axes if len(axes) == len(leaf.shape) else (), leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def abstract(mesh: AnyMesh | None, tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's leaves, without arrays."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    placed = shardings(mesh, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)


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

    def one(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            return values[np.searchsorted(here, np.arange(rows)[index[0]])]

        return jax.make_array_from_callback((rows, *values.shape[1:]), placed, part)

    return {name: one(values) for name, values in batch.items()}


def constrain_params(params: Any) -> Any:
    """Parameters, or gradients of theirs, as RULES place them on the mesh that is being traced under."""
    if current_mesh() is None:
        return params
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *(rule_axes(_path(path)) or ())), params)


def gathered(layer: Any, cfg: ModelConfig, prefix: str = "") -> Any:
    """One layer's parameters (or those under `prefix`, as "mixer/"), whole over fsdp; matrices in cfg.dtype.

    They are cast before they travel. Their gradients go back to where the parameters lie.
    """
    mesh = current_mesh()
    if mesh is None:
        return layer

    def one(path: tuple, x: jax.Array) -> jax.Array:
        name = prefix + _path(path).removesuffix("/value")
        axes = rule_axes(f"stacks/0/{name}")
        assert axes is not None, name
        stored = fitting_spec(axes[1:], x.shape, mesh)
        by = cfg.num_kv_heads if _BY_KV_HEADS.search(name) else cfg.num_heads
        divides = "mlp/" in name or by % mesh.shape["tensor"] == 0
        dropped = {"fsdp"} if divides and not _USED_WHOLE.search(name) else {"fsdp", "tensor"}
        used = tuple(_without(entry, dropped) for entry in stored)
        x = x.astype(cfg.dtype) if x.ndim > 1 else x
        return moved(x, stored, PartitionSpec(*used))

    return jax.tree_util.tree_map_with_path(one, layer)


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
    """What a mixer or MLP gives, as `residual`; its gradient comes to them with a row's, or a piece's, positions whole.

    Left to itself the gradient stays in its positions, for which every device fetches all widths of the matrices.
    """
    return residual(x)


def _to_residual_forward(x: jax.Array) -> tuple[jax.Array, None]:
    return residual(x), None


def _to_residual_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (constrain(residual(gradient), ROWS, "context"),)


to_residual.defvjp(_to_residual_forward, _to_residual_backward)


def whole_rows(x: jax.Array) -> jax.Array:
    """[B, T, D] of the residual stream with a row's, or a piece's, positions together, as mixers and MLPs read it."""
    if current_mesh() is None:
        return x
    return moved(x, PartitionSpec(ROWS, ("context", "tensor")), PartitionSpec(ROWS, "context"))


def by_heads(x: jax.Array) -> jax.Array:
    """[B, T, H, K] with heads over tensor, positions over context."""
    return constrain(x, ROWS, "context", "tensor")


def _without(entry: Axes, dropped: set[str]) -> Axes:
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return tuple(name for name in names if name not in dropped) or None


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
