"""Mistral without a sliding window (transformers' MistralConfig)."""

from collections.abc import Mapping
from typing import Any

from radlads_jax.porting.families.family import Family, no_biases
from radlads_jax.system.untrusted import brief


def _refused(values: Mapping[str, Any]) -> list[str]:
    # MistralConfig's default for an absent key is a window of 4096, null means none.
    window = values.get("sliding_window", 4096)
    return [] if window is None else [f"sliding_window {brief(window)} (in use, also where the key is absent)"]


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    max_positions=131072,
    kv_heads=8,
    biases=no_biases,
    refused=_refused,
    keys=lambda cfg: {"sliding_window": None},
)
