"""Writes the config.json of an export: a softmax model of a family, or a student for the published readers."""

import dataclasses
from pathlib import Path
from typing import Any

from radlads_jax.models.config import ModelConfig, RopeScaling, runs_of
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.spec import PublishedFormat
from radlads_jax.porting.families import FAMILIES, text_config
from radlads_jax.porting.hf_config import ROPE_KEYS, model_config_from_hf, rope_from_hf

# What a student's config.json says of its softmax side; the mixer's own keys are its spec's.
_STUDENT_KEYS = (
    "teacher_model_type",
    "qk_norm",
    "attention_output_bias",
    "num_attention_layers",
    "attention_layers",
    "mixer_qk_norm",
    "attn_use_rope",
    "attn_output_gate",
    "attn_log_scale",
)
# They describe the files and the code that the base config came with, not this export's.
_BASE_ONLY_KEYS = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config")


def hf_config_from_model(cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    """The config.json of an export: base (the teacher's config, may be empty) with everything that cfg says put in.

    A student is of its mixer's type whatever its teacher; `teacher_model_type`, `qk_norm` and, where the softmax layers
    are not the last ones, `attention_layers` are this project's additions to the published keys, and of a student with
    norms of q and k of its own or other softmax layers than its teacher's, `mixer_qk_norm` and `attn_*`.
    Raises ValueError for a model that its family's config cannot describe (for example mistral with biases).
    """
    published, family = _published(cfg), FAMILIES[cfg.family]
    written = {"model_type": cfg.family, "architectures": [family.architecture]}
    if published is not None:
        written = {"model_type": published.model_type, "architectures": [published.architecture]}
    base = text_config(base)
    out = {key: value for key, value in base.items() if key not in (*_BASE_ONLY_KEYS, *_STUDENT_KEYS)}
    out |= written | {
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
    if "head_dim" in base or cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        out["head_dim"] = cfg.head_dim
    # A teacher's list says that all layers are softmax attention.
    if published is not None or len(base.get("layer_types") or ()) != cfg.num_layers:
        out.pop("layer_types", None)
    out |= _rope_keys(cfg, base) | family.keys(cfg)
    if published is not None:
        out |= _student_keys(cfg, published)
    _check_says_the_same(out, cfg)
    return out


def modelling_files(cfg: ModelConfig) -> list[Path]:
    """The torch files that a student's export carries; none for a model that transformers knows."""
    published = _published(cfg)
    return [] if published is None else list(published.files)


def auto_map(cfg: ModelConfig) -> dict[str, str]:
    """config.json's auto_map: which class of those files each of transformers' Auto classes takes."""
    published = _published(cfg)
    if published is None or not published.files:
        return {}
    model_type, causal = published.model_type, published.architecture
    prefix = causal.removesuffix("ForCausalLM")
    return {
        "AutoConfig": f"configuration_{model_type}.{prefix}Config",
        "AutoModel": f"modeling_{model_type}.{prefix}Model",
        "AutoModelForCausalLM": f"modeling_{model_type}.{causal}",
    }


def _published(cfg: ModelConfig) -> PublishedFormat | None:
    """The format of a student; None for a model that transformers knows. Raises ValueError for one without a format."""
    own = FAMILIES[cfg.family].recurrent
    if cfg.recurrent_mixer in (None, own):
        return None
    if own is not None:
        raise ValueError(
            f"a student of {cfg.recurrent_mixer} whose teacher is of the family {cfg.family} has no config.json, for "
            f"no student's has what this family's layers have; expected --config.student.mixer={own}."
        )
    published = MIXERS[cfg.recurrent_mixer].published
    if published is None:
        raise ValueError(
            f"the mixer {cfg.recurrent_mixer} has no config.json of its own; expected a mixer with a published format. "
            "Export with a format that has a place for it."
        )
    return published


def _student_keys(cfg: ModelConfig, published: PublishedFormat) -> dict[str, Any]:
    attention = list(cfg.softmax_layers)
    are_last = attention == list(range(cfg.num_layers - len(attention), cfg.num_layers))
    keys: dict[str, Any] = {
        "teacher_model_type": cfg.family,
        "qk_norm": cfg.qk_norm,
        "attention_bias": cfg.qkv_bias,
        "attention_output_bias": cfg.o_bias,
        "num_attention_layers": len(attention) if are_last else 0,
    }
    if not are_last:
        keys["attention_layers"] = attention
    if (kept := cfg.kept_attention) is not None:
        keys |= {"attn_use_rope": kept.rope, "attn_output_gate": kept.output_gate}
        keys |= {"attn_log_scale": kept.log_scale} if kept.log_scale else {}
    return keys | published.write(cfg.mixer)


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
    wanted = dataclasses.replace(cfg, stacks=runs_of(cfg.layer_mixers), dtype="float32", param_dtype="float32")
    got = model_config_from_hf(out)
    differing = [f.name for f in dataclasses.fields(cfg) if getattr(got, f.name) != getattr(wanted, f.name)]
    if differing:
        shown = "; ".join(f"{name} {getattr(wanted, name)!r} (reads as {getattr(got, name)!r})" for name in differing)
        raise ValueError(
            f"a config.json of type {out['model_type']} cannot say {shown}; expected a model that its family's readers "
            "know. Change the model, or export it under another family."
        )
