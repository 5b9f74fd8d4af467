"""Hugging Face's directory, with the torch code of a student for AutoModelForCausalLM."""

import dataclasses
from typing import Any

from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.hf_export import auto_map, hf_config_from_model, modelling_files
from radlads_jax.porting.writers.fetching import planned_tensors
from radlads_jax.porting.writers.writer import Writer


def config_with_code(cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    """config.json, with the auto_map that finds the torch code."""
    config = hf_config_from_model(cfg, base)
    classes = auto_map(cfg)
    return config | ({"auto_map": classes} if classes else {})


_WRITER = Writer("huggingface", planned_tensors, config_with_code, modelling_files)
WRITER = dataclasses.replace(_WRITER, forms={"transformers": _WRITER})
