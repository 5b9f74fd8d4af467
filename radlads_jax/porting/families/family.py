"""What porting asks of a teacher family: one Family a family, in a file of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.config_keys import ConfigKeys


def no_biases(keys: ConfigKeys) -> tuple[bool, bool]:
    """Neither q, k, v nor o."""
    del keys
    return False, False


def attention_bias(keys: ConfigKeys) -> tuple[bool, bool]:
    """All four or none, by the key attention_bias."""
    all_four = keys.flag("attention_bias", False)
    return all_four, all_four


@dataclasses.dataclass(frozen=True)
class Family:
    """A dense decoder with RoPE, RMSNorm and a SiLU MLP, whose config.json transformers reads.

    name: its model_type. architecture: the class of its causal language model.
    nested_in: the model_type of a model with images that holds it as its text_config.
    max_positions, kv_heads, head_dim: what transformers takes for an absent key (None: the number of heads; the width
    by the number of heads). biases(keys): whether q, k, v have them, and whether o has. qk_norm: RMSNorm of every
    head's query and key. refused(values): what of a config.json the Decoder lacks, by how it is told, beside what holds
    for all families. keys(cfg): what its config.json says beside the keys of all families.
    disk_name: a tensor's name on disk from Hugging Face's usual one ("model.layers.0.self_attn.q_proj.weight").
    layer_types: what its config.json may call a layer. partial_rotary: RoPE may turn a part of a head. recurrent: the
    mixer of its own recurrent layers, where it has any. left_out: a pattern of tensors' names in files, of parts of a
    larger model that are passed over. complete(keys, model): the model of softmax layers with what else its config.json
    says.
    """

    name: str
    architecture: str
    max_positions: int
    biases: Callable[[ConfigKeys], tuple[bool, bool]]
    nested_in: str | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    refused: Callable[[Mapping[str, Any]], list[str]] = lambda values: []
    keys: Callable[[ModelConfig], dict[str, Any]] = lambda cfg: {}
    disk_name: Callable[[str], str] = lambda name: name
    layer_types: tuple[str, ...] = ("full_attention",)
    partial_rotary: bool = False
    recurrent: str | None = None
    left_out: str | None = None
    complete: Callable[[ConfigKeys, ModelConfig], ModelConfig] = lambda keys, model: model
