"""Every teacher family there is, by its model_type. A new one is its file and its line here."""

from typing import Any

from radlads_jax.porting.config_keys import ConfigKeys
from radlads_jax.porting.families import llama, mistral, qwen2, qwen3, qwen3_5
from radlads_jax.porting.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, mistral.FAMILY, qwen3_5.FAMILY)
}


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model, where it lies in one of a model with images; else config itself."""
    outer = config.get("model_type")
    family = next((family for family in FAMILIES.values() if family.nested_in and family.nested_in == outer), None)
    if family is None:
        return config
    # The outer object says how both are tied, unless the inner one does.
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", False)}
    inner = config if config.get("text_config") is None else tied | ConfigKeys(config).mapping("text_config")
    return inner | {"model_type": family.name}
