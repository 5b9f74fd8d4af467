"""Every teacher family there is, by its model_type. A new one is its file and its line here."""

from radlads_jax.porting.families import llama, mistral, qwen2, qwen3, qwen3_5
from radlads_jax.porting.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY, mistral.FAMILY, qwen3_5.FAMILY)
}
