"""Dense Qwen3.5's language model: Gated DeltaNet beside softmax layers with an output gate (Qwen3_5TextConfig)."""

import dataclasses
from typing import Any

from radlads_jax.models.config import SOFTMAX, ModelConfig, runs_of
from radlads_jax.models.gdn import CONV_WIDTH, GdnOptions
from radlads_jax.porting.config_keys import ConfigKeys
from radlads_jax.porting.families.family import Family, attention_bias

NAME = "qwen3_5_text"
# A model with images, and what some engines know the language model by.
_NESTED = "qwen3_5"
MIXER = "gdn"
_LAYER_TYPES = {"linear_attention": MIXER, "full_attention": SOFTMAX}
_DEFAULT_INTERVAL = 4
_DEFAULT_PARTIAL = 0.25


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a model with images, without them, that holds this one of a language model."""
    outer = ("architectures", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in outer if name in config} | {"model_type": _NESTED, "text_config": config}


def _biases(keys: ConfigKeys) -> tuple[bool, bool]:
    """All four or none, but for an export that leaves o's out, which are 0."""
    qkv, o = attention_bias(keys)
    return qkv, keys.flag("attention_output_bias", o)


def _complete(keys: ConfigKeys, model: ModelConfig) -> ModelConfig:
    """The softmax model with its recurrent layers, output gate, zero-centred norms and partial RoPE."""
    if (width := keys.integer("linear_conv_kernel_dim", CONV_WIDTH)) != CONV_WIDTH:
        raise ValueError(
            f"{keys.where}: linear_conv_kernel_dim is {width}; expected {CONV_WIDTH}, which the mixer gdn has. "
            "Choose a model with that convolution."
        )
    mixers = _mixers(keys, model.num_layers)
    options = GdnOptions(
        key_heads=keys.integer("linear_num_key_heads", 16),
        value_heads=keys.integer("linear_num_value_heads", 32),
        key_size=keys.integer("linear_key_head_dim", 128),
        value_size=keys.integer("linear_value_head_dim", 128),
    )
    return dataclasses.replace(
        model,
        stacks=runs_of(mixers),
        mixer=options if MIXER in mixers else None,
        zero_centred_norms=True,
        output_gate=True,
        rotary_size=_rotary_size(keys, model.head_dim),
    )


def _mixers(keys: ConfigKeys, layers: int) -> list[str]:
    types = keys.values.get("layer_types")
    if types is None:
        every = keys.integer("full_attention_interval", _DEFAULT_INTERVAL)
        return [MIXER if (i + 1) % every else SOFTMAX for i in range(layers)]
    if len(types) != layers:
        raise ValueError(
            f"{keys.where}: layer_types has {len(types)} entries and num_hidden_layers is {layers}; expected one for "
            "each layer. Correct the wrong one."
        )
    return [_LAYER_TYPES[kind] for kind in types]


def _rotary_size(keys: ConfigKeys, head_dim: int) -> int | None:
    """The channels that RoPE turns; None for all."""
    rope = ConfigKeys(keys.mapping("rope_parameters"), f"{keys.where}, rope_parameters")
    share = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", _DEFAULT_PARTIAL), high=1.0)
    size = int(head_dim * share + 1e-6)  # a quotient such as 64 / 96 comes back a bit too small
    if size % 2 or not size:
        raise ValueError(
            f"{keys.where}: partial_rotary_factor {share:g} of head_dim {head_dim} is {size} channels; expected an "
            "even number above 0, because RoPE turns pairs of channels. Correct either key."
        )
    return None if size == head_dim else size


def _keys(cfg: ModelConfig) -> dict[str, Any]:
    """Everything at both places that engines look for it."""
    share = (cfg.rotary_size or cfg.head_dim) / cfg.head_dim
    types = {mixer: kind for kind, mixer in _LAYER_TYPES.items()}
    options = cfg.mixer or GdnOptions(cfg.num_heads, cfg.num_heads, cfg.head_dim, cfg.head_dim)
    keys: dict[str, Any] = {
        "head_dim": cfg.head_dim,
        "attention_bias": cfg.qkv_bias,
        **({"attention_output_bias": cfg.o_bias} if cfg.o_bias != cfg.qkv_bias else {}),
        "layer_types": [types[mixer] for mixer in cfg.layer_mixers],
        "partial_rotary_factor": share,
        "linear_num_key_heads": options.key_heads,
        "linear_num_value_heads": options.value_heads,
        "linear_key_head_dim": options.key_size,
        "linear_value_head_dim": options.value_size,
        "linear_conv_kernel_dim": CONV_WIDTH,
        "full_attention_interval": interval(cfg) or 1,
    }
    scaling = {"rope_type": "default"}
    if cfg.rope_scaling is not None:
        values = dataclasses.asdict(cfg.rope_scaling)
        kind = values.pop("kind")
        scaling = {"rope_type": kind} | (values if kind == "llama3" else {"factor": values["factor"]})
    return keys | {"rope_parameters": scaling | {"rope_theta": cfg.rope_theta, "partial_rotary_factor": share}}


def interval(cfg: ModelConfig) -> int | None:
    """N where exactly the layers with (i + 1) % N == 0 are softmax attention; None for another placement."""
    kept = cfg.softmax_layers
    every = kept[0] + 1 if kept else cfg.num_layers + 1
    return every if kept == tuple(range(every - 1, cfg.num_layers, every)) else None


FAMILY = Family(
    NAME,
    "Qwen3_5ForCausalLM",
    nested_in=_NESTED,
    max_positions=32768,
    kv_heads=4,
    head_dim=256,
    qk_norm=True,
    biases=_biases,
    keys=_keys,
    layer_types=tuple(_LAYER_TYPES),
    partial_rotary=True,
    recurrent=MIXER,
    # Of published models: the part that sees, and the prediction of further tokens. transformers passes over both.
    left_out=r"(mtp|model\.visual)\.",
    complete=_complete,
)
