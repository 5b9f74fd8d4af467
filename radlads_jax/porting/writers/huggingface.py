"""Hugging Face's directory, with the torch code of a student for AutoModelForCausalLM."""

import dataclasses
from typing import Any

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.mixers import MIXERS
from radlads_jax.porting.families import FAMILIES
from radlads_jax.porting.hf_export import auto_map, hf_config_from_model, modelling_files
from radlads_jax.porting.writers.fetching import planned_tensors
from radlads_jax.porting.writers.writer import Writer
from radlads_jax.system.storage import AnyPath


def config_with_code(cfg: ModelConfig, base: dict[str, Any]) -> dict[str, Any]:
    """config.json, with the auto_map that finds the torch code."""
    config = hf_config_from_model(cfg, base)
    classes = auto_map(cfg)
    return config | ({"auto_map": classes} if classes else {})


def _lacks_code(cfg: ModelConfig) -> bool:
    """Whether the student's mixer has a config.json of its own, but no torch code."""
    published = MIXERS[cfg.recurrent_mixer].published if cfg.recurrent_mixer else None
    return published is not None and not published.files


def _obstacles(cfg: ModelConfig, directory: AnyPath | None) -> list[str]:
    """A mixer that has no config.json of its own, and is none of its family's."""
    del directory
    mixer = cfg.recurrent_mixer
    if mixer is None or mixer == FAMILIES[cfg.family].recurrent or MIXERS[mixer].published:
        return []
    return [f"the mixer {mixer}"]


def _readers(cfg: ModelConfig) -> dict[str, list[str]]:
    reason = f"the mixer {cfg.recurrent_mixer} has no torch code"
    return {"radlads_jax": [], "transformers": [reason]} if _lacks_code(cfg) else {}


def _use(cfg: ModelConfig) -> str:
    if not _lacks_code(cfg):
        return ""
    return (
        f"## Use\n\nThe mixer {cfg.recurrent_mixer} has no torch code, so that transformers can not load it:\n\n"
        '    python -m radlads_jax.generate --model PATH --prompt "Once upon a time"'
    )


_WRITER = Writer(
    "huggingface",
    planned_tensors,
    config_with_code,
    modelling_files,
    obstacles=_obstacles,
    expected="a mixer with a config.json of its own",
    use=_use,
    readers=_readers,
)
WRITER = dataclasses.replace(_WRITER, forms={"transformers": _WRITER})
