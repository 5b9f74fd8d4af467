"""The tables of names describe exactly the parameters that the Decoder has."""

import dataclasses

import pytest

from radlads_jax.models import MIXERS, ModelConfig, abstract_params
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import flatten

TEACHER = ModelConfig("qwen2", 50, 32, 64, 4, 2, 8, (("attention", 3),), qkv_bias=True)


def student(mixer: str, attention_layers=(), **switches) -> ModelConfig:
    return TEACHER.as_student(mixer, MIXERS[mixer].choose(32, **switches), attention_layers)


CONFIGS = {
    "qwen2": TEACHER,
    "tied": dataclasses.replace(TEACHER, tie_embeddings=True),
    "qwen3": dataclasses.replace(TEACHER, qkv_bias=False, qk_norm=True, head_dim=16),
    "llama_biased": dataclasses.replace(TEACHER, o_bias=True),
    "rwkv6": student("rad_rwkv6"),
    "rwkv6_other": student("rad_rwkv6", token_shift=False, gate="low_rank", group_norm=True, balance_state=False),
    "rwkv7": student("rad_rwkv7"),
    "rwkv7_other": student("rad_rwkv7", gate="full", group_norm=True, balance_state=False),
    "no_gate": student("rad_rwkv7", gate="none"),
    "hybrid": student("rad_rwkv6", attention_layers=(1,)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_paths_and_shapes(name):
    ours = {path: leaf.shape for path, leaf in flatten(abstract_params(CONFIGS[name])).items()}
    assert ours == param_shapes(CONFIGS[name])
