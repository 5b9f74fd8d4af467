"""Reads a Hugging Face config.json into a ModelConfig, and refuses by name what the Decoder does not implement.

Sources: transformers' configuration classes (porting/families), and the published students (the mixers' specs).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from radlads_jax.models.config import LEAST_LOG_SCALE, SOFTMAX, KeptAttention, ModelConfig, RopeScaling
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.spec import MixerSpec
from radlads_jax.porting.config_keys import ConfigKeys
from radlads_jax.porting.families import FAMILIES, Family, text_config
from radlads_jax.system.untrusted import brief, listed

ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters")

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def model_config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """The ModelConfig a config.json describes: one of FAMILIES, or a published or exported student.

    Raises ValueError naming the key for anything missing, wrong-typed or absurd, and for every feature that the Decoder
    lacks (sliding windows in use, yarn, experts, quantised weights, ...). The activations' dtype is not read: it
    is a choice of the run.
    """
    keys = ConfigKeys(text_config(config))
    model_type = keys.text("model_type")
    students = _student_types()
    mixer = students.get(model_type)
    name = keys.text("teacher_model_type", "qwen2") if mixer else model_type
    if name not in FAMILIES:
        raise ValueError(
            f"config.json: model_type is {brief(repr(name))}; expected one of "
            f"{', '.join((*FAMILIES, *students))}. Choose a model of one of these (dense, text-only) families."
        )
    family = FAMILIES[name]
    _refuse_unsupported(keys, family)
    model = _softmax_model(keys, family, is_student=mixer is not None)
    if mixer is None or mixer.published is None:
        return family.complete(keys, model)
    options = mixer.published.read(keys, model.hidden_size)
    student = model.as_student(mixer.name, options, _attention_layers(keys, model))
    return dataclasses.replace(student, tie_embeddings=model.tie_embeddings, kept_attention=_kept_attention(keys))


def _student_types() -> dict[str, MixerSpec]:
    """The mixers whose students have a model_type of their own, by it."""
    return {spec.published.model_type: spec for spec in MIXERS.values() if spec.published is not None}


def rope_from_hf(config: dict[str, Any], max_position_embeddings: int) -> tuple[float, RopeScaling | None]:
    """The base and scaling of RoPE, from top-level keys, from `rope_parameters`, or from both where they agree."""
    keys = ConfigKeys(config)
    default_theta = keys.number("rope_theta", 10000.0)
    ropes = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = _full_attention_rope(keys.mapping(name))
        if rope:
            ropes[name] = _one_rope(
                ConfigKeys(rope, f"config.json, {name}"), keys, default_theta, max_position_embeddings
            )
    if len(set(ropes.values())) > 1:
        raise ValueError(
            f"config.json: rope_scaling {brief(config['rope_scaling'])} and rope_parameters "
            f"{brief(config['rope_parameters'])} say "
            "different things; expected one of them, or the same in both. Remove the wrong one."
        )
    rope_parameters = keys.mapping("rope_parameters")
    inner = _full_attention_rope(rope_parameters).get("rope_theta")
    if inner is not None and config.get("rope_theta") not in (None, inner):
        raise ValueError(
            f"config.json: rope_theta is {brief(repr(config['rope_theta']))} but "
            f"{brief(repr(inner))} inside rope_parameters; expected "
            "the same in both. Remove the wrong one."
        )
    return next(iter(ropes.values()), (default_theta, None))


def _softmax_model(keys: ConfigKeys, family: Family, is_student: bool) -> ModelConfig:
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    absent = num_heads if "num_key_value_heads" in keys.values else family.kv_heads or num_heads
    num_kv_heads = keys.integer("num_key_value_heads", absent)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads is {num_heads} and num_key_value_heads {num_kv_heads}; expected a "
            "multiple. Correct the keys in the model's config."
        )
    max_positions = keys.integer("max_position_embeddings", family.max_positions, high=1 << 31)
    rope_theta, rope_scaling = rope_from_hf(dict(keys.values), max_positions)
    qkv_bias, o_bias = family.biases(keys)
    if is_student:
        qkv_bias, o_bias = keys.flag("attention_bias", True), keys.flag("attention_output_bias", False)
    return ModelConfig(
        family=family.name,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(keys, family, hidden_size, num_heads),
        stacks=((SOFTMAX, keys.integer("num_hidden_layers", high=10_000)),),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6, high=1.0),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=max_positions,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=keys.flag("qk_norm", family.qk_norm) if is_student else family.qk_norm,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
    )


def _head_dim(keys: ConfigKeys, family: Family, hidden_size: int, num_heads: int) -> int:
    if family.head_dim is not None and "head_dim" not in keys.values:
        head_dim = family.head_dim
    else:
        head_dim = keys.integer("head_dim", 0, low=0, high=1 << 16) or hidden_size // num_heads
        if keys.values.get("head_dim") is None and hidden_size % num_heads:
            raise ValueError(
                f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads} and there "
                "is no head_dim; expected either. Add head_dim."
            )
    if head_dim % 2:
        raise ValueError(
            f"config.json: head_dim is {head_dim}; expected an even number, because RoPE turns pairs of channels. "
            "Correct head_dim, hidden_size or num_attention_heads."
        )
    return head_dim


def _attention_layers(keys: ConfigKeys, model: ModelConfig) -> tuple[int, ...]:
    """The layers that stay softmax: the last num_attention_layers, or any given in attention_layers."""
    count = keys.integer("num_attention_layers", 0, low=0, high=model.num_layers)
    last = tuple(range(model.num_layers - count, model.num_layers))
    layers = keys.values.get("attention_layers")
    if layers is None:
        return last
    is_layers = isinstance(layers, list) and all(type(i) is int and 0 <= i < model.num_layers for i in layers)
    if not is_layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"config.json: 'attention_layers' is {brief(layers)}; expected a list of different layer numbers from 0 to "
            f"{model.num_layers - 1}. Correct the key in the model's config."
        )
    if count and set(layers) != set(last):
        raise ValueError(
            f"config.json: attention_layers is {brief(layers)} but num_attention_layers {count} means {list(last)}; "
            "expected the same in both. Remove the wrong one."
        )
    return tuple(sorted(layers))


def _kept_attention(keys: ConfigKeys) -> KeptAttention | None:
    """What a student's softmax layers have other than its teacher's."""
    has_scale = keys.values.get("attn_log_scale") is not None
    kept = KeptAttention(
        rope=keys.flag("attn_use_rope", True),
        log_scale=keys.number("attn_log_scale", low=LEAST_LOG_SCALE) if has_scale else 0.0,
        output_gate=keys.flag("attn_output_gate", False),
    )
    return None if kept == KeptAttention() else kept


def _full_attention_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The parameters of full-attention layers where they are given per type of layer."""
    return rope["full_attention"] if isinstance(rope.get("full_attention"), dict) else rope


def _one_rope(
    rope: ConfigKeys, config: ConfigKeys, default_theta: float, max_positions: int
) -> tuple[float, RopeScaling | None]:
    theta = rope.number("rope_theta", default_theta)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind, rope.number("factor", low=1.0))
    if kind != "llama3":
        raise ValueError(
            f"{rope.where}: rope_type is {brief(repr(kind))}; expected default, linear or llama3. Choose a model "
            "without this scaling, or remove the scaling to work within the original context."
        )
    # The same order of precedence as transformers': the top-level key, this object's, the context.
    original = config.integer(
        "original_max_position_embeddings",
        rope.integer("original_max_position_embeddings", max_positions, high=1 << 31),
        high=1 << 31,
    )
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise ValueError(
            f"{rope.where}: low_freq_factor is {low:g} and high_freq_factor {high:g}; expected low < high. "
            "Correct the keys in the model's config."
        )
    return theta, RopeScaling(kind, rope.number("factor", low=1.0), low, high, original)


def _refuse_partial_rotary(keys: ConfigKeys) -> None:
    if keys.number("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{keys.where}: partial_rotary_factor is {brief(keys.values['partial_rotary_factor'])}; expected 1, RoPE "
            "on whole heads. Choose a model that rotates whole heads."
        )


def _refuse_unsupported(keys: ConfigKeys, family: Family) -> None:
    values = keys.values
    other_layers = [t for t in _layer_types(values) if t not in family.layer_types]
    experts = [key for key in _EXPERT_KEYS if keys.integer(key, 0, low=0)]
    problems = {
        "use_sliding_window true": keys.flag("use_sliding_window", False),
        f"layer_types with {listed(sorted(set(other_layers)))}": bool(other_layers),
        f"a mixture of experts ({', '.join(experts)})": bool(experts),
        "mlp_bias true": keys.flag("mlp_bias", False),
        f"hidden_act {brief(repr(values.get('hidden_act')))}": values.get("hidden_act", "silu") != "silu",
        "quantization_config (quantised weights)": values.get("quantization_config") is not None,
    }
    asked = family.refused(values) + [problem for problem, present in problems.items() if present]
    if asked:
        raise ValueError(
            f"config.json ({family.name}) asks for {'; '.join(asked)}; expected full attention in every layer, dense "
            "SiLU MLPs without biases and unquantised weights. Choose a model without these, or, where a window is "
            "longer than every sequence you train on, set sliding_window to null and use_sliding_window to false."
        )
    if not family.partial_rotary:
        _refuse_partial_rotary(keys)
        for name in ("rope_scaling", "rope_parameters"):
            _refuse_partial_rotary(ConfigKeys(_full_attention_rope(keys.mapping(name)), f"config.json, {name}"))


def _layer_types(values: Mapping[str, Any]) -> list[str]:
    types = values.get("layer_types")
    if types is None:
        return []
    if not isinstance(types, list) or not all(isinstance(t, str) for t in types):
        raise ValueError(
            f"config.json: 'layer_types' is {brief(types)}; expected a list of strings or null. Correct the config."
        )
    return types
