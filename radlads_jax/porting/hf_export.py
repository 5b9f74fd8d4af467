"""Writes the config.json of an export: a softmax model of the four families, or a student for the published readers."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from radlads_jax.models.config import ModelConfig, RopeScaling
from radlads_jax.porting.hf_config import (
    GATE_TYPES,
    RANK_KEYS,
    ROPE_KEYS,
    STUDENT_MIXERS,
    model_config_from_hf,
    rope_from_hf,
)

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "rwkv6qwen2": "RWKV6Qwen2ForCausalLM",
    "rwkv7qwen2": "RWKV7Qwen2ForCausalLM",
}

# Torch files for transformers' remote code: they are copied into an export, and never imported here.
MODELLING_DIR = Path(__file__).parent.parent / "hf"

_MODEL_TYPES = {mixer: model_type for model_type, mixer in STUDENT_MIXERS.items()}
_GATE_RANK_TYPES = {gate: number for number, gate in GATE_TYPES.items()}
_STUDENT_KEYS = (
    "teacher_model_type",
    "qk_norm",
    "attention_output_bias",
    "use_rope",
    "gate_rank_type",
    "balance_state",
    "groupnorm_att",
    "use_tokenshift",
    "num_attention_layers",
    "attention_layers",
    *RANK_KEYS.values(),
)
# They describe the files and the code that the base config came with, not this export's.
_BASE_ONLY_KEYS = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config")


def hf_config_from_model(cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an export: base (the teacher's config, may be empty) with everything that cfg says put in.

    A student is of type rwkv6qwen2 or rwkv7qwen2 whatever its teacher; `teacher_model_type`, `qk_norm` and, where the
    softmax layers are not the last ones, `attention_layers` are this project's additions to the published keys.
    Raises ValueError for a model that its family's config cannot describe (for example mistral with biases).
    """
    is_student = cfg.recurrent_mixer is not None
    out = {key: value for key, value in base.items() if key not in (*_BASE_ONLY_KEYS, *_STUDENT_KEYS)}
    model_type = _MODEL_TYPES[cfg.recurrent_mixer] if cfg.recurrent_mixer else cfg.family
    out |= {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        "max_position_embeddings": cfg.max_position_embeddings,
        "tie_word_embeddings": cfg.tie_embeddings,
        "hidden_act": "silu",
    }
    if "head_dim" in base or cfg.family == "qwen3" or cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        out["head_dim"] = cfg.head_dim
    if cfg.family == "mistral":
        out["sliding_window"] = None
    if cfg.family in ("llama", "qwen3"):
        out["attention_bias"] = cfg.qkv_bias
    # A teacher's list says that all layers are softmax attention.
    if is_student or len(base.get("layer_types") or ()) != cfg.num_layers:
        out.pop("layer_types", None)
    out |= _rope_keys(cfg, base)
    if is_student:
        out |= _student_keys(cfg)
    _check_says_the_same(out, cfg)
    return out


def modelling_files(cfg: ModelConfig) -> list[Path]:
    """The torch files that a student's export carries; none for a model that transformers knows."""
    if cfg.recurrent_mixer is None:
        return []
    own = _MODEL_TYPES[cfg.recurrent_mixer]
    names = ("configuration_student", "layers_student", "modeling_student", f"configuration_{own}", f"modeling_{own}")
    return [MODELLING_DIR / f"{name}.py" for name in names]


def auto_map(cfg: ModelConfig) -> dict[str, str]:
    """config.json's auto_map: which class of those files each of transformers' Auto classes takes."""
    if cfg.recurrent_mixer is None:
        return {}
    model_type = _MODEL_TYPES[cfg.recurrent_mixer]
    causal = ARCHITECTURES[model_type]
    prefix = causal.removesuffix("ForCausalLM")
    return {
        "AutoConfig": f"configuration_{model_type}.{prefix}Config",
        "AutoModel": f"modeling_{model_type}.{prefix}Model",
        "AutoModelForCausalLM": f"modeling_{model_type}.{causal}",
    }


def _student_keys(cfg: ModelConfig) -> dict[str, Any]:
    mixer = cfg.mixer
    assert mixer is not None
    attention = [i for i, name in enumerate(cfg.layer_mixers) if name == "attention"]
    are_last = attention == list(range(cfg.num_layers - len(attention), cfg.num_layers))
    keys: dict[str, Any] = {
        "teacher_model_type": cfg.family,
        "qk_norm": cfg.qk_norm,
        "attention_bias": cfg.qkv_bias,
        "attention_output_bias": cfg.o_bias,
        "use_rope": mixer.use_rope,
        "gate_rank_type": _GATE_RANK_TYPES[mixer.gate],
        "balance_state": mixer.balance_state,
        "groupnorm_att": mixer.group_norm,
        "use_tokenshift": mixer.token_shift,
        "num_attention_layers": len(attention) if are_last else 0,
    }
    if not are_last:
        keys["attention_layers"] = attention
    return keys | {key: getattr(mixer, field) for field, key in RANK_KEYS.items()}


def _rope_keys(cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    """Nothing where base already says it; otherwise top-level keys, and `rope_parameters` where base has that style.

    A student always gets the top-level keys: the published readers know no others.
    """
    rope = (cfg.rope_theta, cfg.rope_scaling)
    has_rope = any(base.get(key) is not None for key in ROPE_KEYS)
    if cfg.recurrent_mixer is None and has_rope and rope_from_hf(base, cfg.max_position_embeddings) == rope:
        return {}
    scaling = _scaling_keys(cfg.rope_scaling) if cfg.rope_scaling else None
    keys: dict[str, Any] = {"rope_theta": cfg.rope_theta, "rope_scaling": scaling}
    if base.get("rope_parameters") is not None:
        keys["rope_parameters"] = {"rope_theta": cfg.rope_theta, **(scaling or {"rope_type": "default"})}
    if "original_max_position_embeddings" in base and cfg.rope_scaling:
        keys["original_max_position_embeddings"] = cfg.rope_scaling.original_max_position_embeddings
    return keys


def _scaling_keys(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    values = dataclasses.asdict(scaling)
    return {"rope_type": values.pop("kind"), **values}


def _check_says_the_same(out: dict[str, Any], cfg: ModelConfig) -> None:
    runs = itertools.groupby(cfg.layer_mixers)
    stacks = tuple((name, len(list(run))) for name, run in runs)
    wanted = dataclasses.replace(cfg, stacks=stacks, dtype="float32", param_dtype="float32")
    got = model_config_from_hf(out)
    differing = [f.name for f in dataclasses.fields(cfg) if getattr(got, f.name) != getattr(wanted, f.name)]
    if differing:
        shown = "; ".join(f"{name} {getattr(wanted, name)!r} (reads as {getattr(got, name)!r})" for name in differing)
        raise ValueError(
            f"a config.json of type {out['model_type']} cannot say {shown}; expected a model that its family's readers "
            "know. Change the model, or export it under another family."
        )
