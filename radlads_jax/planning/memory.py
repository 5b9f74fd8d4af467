"""What a device holds in a training step, counted by hand: what lies there between steps, and what a step needs more.

With `remat` "full" a layer's input is kept, all else is computed again; other ways keep more, which is counted too.
"""

import math
from typing import Any

import jax

from radlads_jax.config import StageConfig
from radlads_jax.distill.mesh import batch_parts
from radlads_jax.models.config import SOFTMAX, ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.sharding import AnyMesh

# Both are of bfloat16; float32 takes twice as many. In an MLP's backward pass: gate, up, their product and the
# gradients of the three.
_MLP_BYTES = 12
# A layer's input and output, the normed rows that mixer and MLP read, and the gradients of the two.
_ROW_BYTES = 12


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    parts = [leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape for leaf in leaves]
    return sum(math.prod(part) * leaf.dtype.itemsize for part, leaf in zip(parts, leaves, strict=True))


def temporary_bytes(
    recipe: StageConfig, student: ModelConfig, gradients: int, mesh: AnyMesh, *, whole_student: bool
) -> dict[str, float]:
    """What a step needs beside its arguments, by what it is for. gradients: bytes of one device's share of them."""
    axes, spec = mesh.shape, MIXERS[student.recurrent_mixer or SOFTMAX]
    rows_split = axes["data"] * axes["fsdp"]
    parts_of_batch = batch_parts(recipe, mesh)
    tokens = recipe.batch_size // parts_of_batch * recipe.seq_len / (rows_split * axes["context"])
    wide = 1 if student.dtype == "bfloat16" else 2
    kept = wide * tokens / axes["tensor"] * 2
    columns = spec.columns(student) / axes["tensor"]
    mixer = spec.bytes_per_column * columns
    mlp = _MLP_BYTES * student.intermediate_size / axes["tensor"]
    stacks = abstract_params(student)["stacks"]
    layer = sum(leaf.size for leaf in jax.tree.leaves(stacks)) / student.num_layers
    parts = {"gradients": float(gradients) * (2 if parts_of_batch > 1 else 1)}
    layers = student.num_layers if whole_student else len(student.aligned_layers)
    parts["layers' inputs"] = kept * layers * student.hidden_size * (1 if whole_student else axes["tensor"])
    if whole_student:
        parts["last hidden states"] = wide * 3 * 2 * tokens * student.hidden_size
    if recipe.remat == "dots":
        # Of a layer's matrix products, about so many numbers a token (docs/PODS.md); an alignment has no MLP's.
        results = 9 * student.hidden_size + 3 * student.intermediate_size * whole_student
        parts["kept results"] = kept * layers * results
    elif recipe.remat == "none":
        everything = mixer + mlp * whole_student + _ROW_BYTES * student.hidden_size
        parts["kept results"] = wide * tokens * layers * everything
    if spec.shares_values:
        # The first layer's values, for all the others, and their gradient.
        parts["value residual"] = wide * 2 * 2 * tokens * columns
    if student.dtype == "bfloat16" and whole_student:
        # The compiler casts whole stacks before it runs the first layer, and holds the copy until the last.
        parts["layers in bfloat16"] = gradients / 2
    # The layer's own as it computes, whole over fsdp, and the gradients of what trains.
    aligned = [stacks[i]["mixer"] for i in range(len(student.stacks)) if student.is_aligned(i)]
    trained = layer if whole_student else sum(leaf.size for leaf in jax.tree.leaves(aligned)) / max(layers, 1)
    parts["one layer's weights"] = wide * 2 * (layer + trained) / axes["tensor"]
    widest = max(mixer, mlp) if whole_student else mixer
    parts["one layer's activations"] = wide * tokens * (widest + _ROW_BYTES * student.hidden_size)
    return parts
