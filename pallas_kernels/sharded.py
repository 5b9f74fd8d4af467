"""Arrays and operations split over the mesh that a program is traced under; without one, nothing happens.

Rows of a batch lie over `data` and `fsdp`, heads and widths over `tensor`, positions in shards over `context`. The
mesh is the one that jax.sharding.use_abstract_mesh or jax.set_mesh has put in place.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

ROWS = ("data", "fsdp")
_HEADS = ("tensor",)
CONTEXT = ("context",)
TOKENS = (*ROWS, *CONTEXT)
WHOLE_HEADS = (*_HEADS, *CONTEXT)  # of heads that need their whole sequences
# A head's vocabulary, and a slice of its logits, over every device. A kernel that lies as [D/fsdp, vocab/tensor] comes
# there by an exchange within fsdp, then by a cut over the rest; its gradient goes back the same way.
VOCAB = ("tensor", "fsdp", "data", "context")
VOCAB_OF_ONE = ("tensor", "fsdp")

Axes = str | Sequence[str] | None


def current_mesh() -> AbstractMesh | None:
    """The mesh in place, None where there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shards(axes: Axes) -> int:
    """Into how many parts these axes of the mesh in place split a dimension."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in _names(axes))


def parts(axes: Axes, size: int) -> int:
    """Into how many parts those of these axes that fit split a dimension of this size."""
    mesh = current_mesh()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in fitting(axes, size, mesh))


def fitting(axes: Axes, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Those of the axes, in their order, that together split a dimension of this size evenly; none of size 1."""
    kept: tuple[str, ...] = ()
    parts = 1
    for axis in _names(axes):
        if mesh.shape[axis] > 1 and size % (parts * mesh.shape[axis]) == 0:
            kept, parts = (*kept, axis), parts * mesh.shape[axis]
    return kept


def fitting_spec(spec: Sequence[Axes], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec without the axes that do not divide their dimension, one entry for each dimension."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    fits = [fitting(axes, size, mesh) for axes, size in zip(entries, shape, strict=True)]
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in fits))


def constrain(x: jax.Array, *spec: Axes) -> jax.Array:
    """x, its dimensions split over these axes as far as they divide them; its gradient likewise."""
    mesh = current_mesh()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, fitting_spec(spec, x.shape, mesh))


def split_vocab(x: jax.Array, axis: int, axes: Axes = VOCAB) -> jax.Array:
    """x with its vocabulary over every device (or these axes), evenly or not, and every other dimension whole."""
    if current_mesh() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, axes))


def per_shard(
    op: Callable[..., Any],
    kinds: Sequence[str],
    out_kinds: str | tuple[str, ...],
    over_shards: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    heads: int | None = None,
) -> Callable[..., Any]:
    """op on every device's own rows and heads, with no communication in it; op itself without a mesh.

    kinds: for each argument "sequence" [B,T,H,K], "state" [B,H,K,V] or "rows" [B,T], "window" [B,W,H] or "taps" [W,H];
    the first is a sequence. All are cut by its heads, which may be channels [B,T,C]; a sequence with a multiple of them
    is cut into as many parts. An argument may be None. out_kinds: the same for the result, or for the tuple of results.
    Heads that the tensor axis does not divide are computed by all of its devices. heads: how many there are, where
    sequences have them and their channels in one dimension [B,T,H K].

    Over a context axis, over_shards turns op into what runs on a device's shard of every sequence (with communication);
    without it, the axis takes its share of the heads, and every device has whole sequences.
    """

    def run(*arguments: Any) -> Any:
        mesh = current_mesh()
        if mesh is None:
            return op(*arguments)
        batch, tokens, count = arguments[0].shape[:3]
        count = heads or count
        shards = fitting(CONTEXT, tokens, mesh) if over_shards else ()
        rows, split = fitting(ROWS, batch, mesh), fitting(_HEADS if over_shards else WHOLE_HEADS, count, mesh)
        specs = {
            "sequence": PartitionSpec(rows, shards, split),
            "state": PartitionSpec(rows, split),
            "rows": PartitionSpec(rows, shards),
            "window": PartitionSpec(rows, None, split),
            "taps": PartitionSpec(None, split),
        }
        of_one = over_shards(op) if over_shards and shards else op
        present = [i for i, argument in enumerate(arguments) if argument is not None]

        def local(*parts: Any) -> Any:
            whole = dict(zip(present, parts, strict=True))
            return of_one(*(whole.get(i) for i in range(len(arguments))))

        mapped = jax.shard_map(
            local,
            in_specs=tuple(specs[kinds[i]] for i in present),
            out_specs=jax.tree.map(specs.__getitem__, out_kinds),
            # A kernel's results carry no record of the axes over which they differ.
            check_vma=False,
        )
        return mapped(*(arguments[i] for i in present))

    return run


def _names(axes: Axes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
