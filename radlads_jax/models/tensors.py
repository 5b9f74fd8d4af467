"""All parameters of a model: the decoder's own and, by its layers' specs, the mixers'."""

import dataclasses
import functools
import itertools

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.spec import Tensor, linear_tensors
from radlads_jax.models.tree import ParamPath, keys_of


def outer_tensors(cfg: ModelConfig) -> list[Tensor]:
    """Those of the model outside its layers."""
    embedding = Tensor(
        "embed/embedding", "model.embed_tokens.weight", (cfg.vocab_size, cfg.hidden_size), axes=("tensor", "fsdp")
    )
    norm = Tensor("norm/scale", "model.norm.weight", (cfg.hidden_size,))
    if cfg.tie_embeddings:
        return [embedding, norm]
    # The head's matrix is a tensor without the suffix that a layer's have.
    return [embedding, norm, *linear_tensors("head", "lm_head", cfg.hidden_size, cfg.vocab_size, split_by="width")]


def layer_tensors(cfg: ModelConfig, mixer: str) -> list[Tensor]:
    """Those of one layer; names on disk without the layer's prefix."""
    width, mlp_width, spec = cfg.hidden_size, cfg.intermediate_size, MIXERS[mixer]
    inside = [
        dataclasses.replace(tensor, path=f"mixer/{tensor.path}", name=f"{spec.disk_prefix}.{tensor.name}")
        for tensor in spec.tensors(cfg)
    ]
    return [
        Tensor("input_norm/scale", "input_layernorm.weight", (width,)),
        Tensor("post_norm/scale", "post_attention_layernorm.weight", (width,)),
        *linear_tensors("mlp/gate", "mlp.gate_proj", width, mlp_width, split_by="width"),
        *linear_tensors("mlp/up", "mlp.up_proj", width, mlp_width, split_by="width"),
        *linear_tensors("mlp/down", "mlp.down_proj", mlp_width, width, out=True, split_by="width", multiplies="inner"),
        *inside,
    ]


def param_shapes(cfg: ModelConfig) -> dict[ParamPath, tuple[int, ...]]:
    """The shape of every parameter, layers of a stack on the leading axis."""
    shapes = {keys_of(tensor.path): tensor.shape for tensor in outer_tensors(cfg)}
    for stack, (mixer, count) in enumerate(cfg.stacks):
        for path, rows in itertools.groupby(layer_tensors(cfg, mixer), key=lambda tensor: tensor.path):
            tensors = list(rows)
            leading = (count,) if tensors[0].row is None else (count, len(tensors))
            shapes["stacks", stack, *keys_of(path)] = (*leading, *tensors[0].shape)
    return shapes


def tensor_of(cfg: ModelConfig, path: str) -> Tensor | None:
    """The tensor of the parameter whose path this is or ends in (as in an optimizer's state); None for anything else.

    Of several rows of one parameter, the first.
    """
    table = _by_path(cfg)
    parts = path.split("/")
    return next((table[end] for i in range(len(parts)) if (end := "/".join(parts[i:])) in table), None)


@functools.lru_cache
def _by_path(cfg: ModelConfig) -> dict[str, Tensor]:
    table = {tensor.path: tensor for tensor in outer_tensors(cfg)}
    for stack, (mixer, _) in enumerate(cfg.stacks):
        for tensor in layer_tensors(cfg, mixer):
            table.setdefault(f"stacks/{stack}/{tensor.path}", tensor)
    return table
