"""Small models of every kind for the porting tests, and their random checkpoints."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from untrained import student_of

from radlads_jax.models import ModelConfig
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.names import disk_tensors

SMALL = ModelConfig(
    family="qwen2",
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    stacks=(("attention", 3),),
    rope_theta=1e6,
    max_position_embeddings=128,
    qkv_bias=True,
)
RANKS = {"rank_decay": 3, "rank_iclr": 5, "rank_value": 7, "rank_shift": 2, "rank_gate": 11}


def student(mixer: str, attention_layers: tuple[int, ...] = (), base: ModelConfig = SMALL, **switches) -> ModelConfig:
    return student_of(base, mixer, attention_layers, **(RANKS | switches))


MODELS = {
    "qwen2": SMALL,
    "qwen2 tied": dataclasses.replace(SMALL, tie_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, family="qwen3", qkv_bias=False, qk_norm=True, head_dim=10),
    "llama": dataclasses.replace(SMALL, family="llama", qkv_bias=False),
    "llama biases": dataclasses.replace(SMALL, family="llama", qkv_bias=True, o_bias=True),
    "mistral": dataclasses.replace(SMALL, family="mistral", qkv_bias=False),
    "rad_rwkv6": student("rad_rwkv6"),
    "rad_rwkv6 bare": student("rad_rwkv6", token_shift=False, gate="none", balance_state=False),
    "rad_rwkv6 low-rank gate, group norm": student("rad_rwkv6", gate="low_rank", balance_state=False, group_norm=True),
    "rad_rwkv7": student("rad_rwkv7"),
    "rad_rwkv7 group norm": student("rad_rwkv7", balance_state=False, group_norm=True),
    "rad_rwkv7 full gate": student("rad_rwkv7", gate="full"),
    "window_rwkv7": student("window_rwkv7", (1,), sinks=3, window=9),
    "hybrid, last layer": student("rad_rwkv7", (2,)),
    "hybrid, middle layer": student("rad_rwkv6", (1,)),
    "hybrid, first layer": student("rad_rwkv7", (0,)),
    "student of qwen3": student(
        "rad_rwkv7", base=dataclasses.replace(SMALL, family="qwen3", qkv_bias=False, qk_norm=True)
    ),
    "student of llama": student("rad_rwkv6", (0,), base=dataclasses.replace(SMALL, family="llama", qkv_bias=False)),
    "student of biased llama": student("rad_rwkv7", base=dataclasses.replace(SMALL, family="llama", o_bias=True)),
}


@pytest.fixture(params=MODELS, ids=lambda name: name.replace(" ", "-"))
def model(request) -> ModelConfig:
    return MODELS[request.param]


@pytest.fixture(scope="session")
def models() -> dict[str, ModelConfig]:
    return MODELS


@pytest.fixture(scope="session")
def random_checkpoint():
    return _random_checkpoint


def _random_checkpoint(
    directory: Path, cfg: ModelConfig, dtype: str = "float32", files: int = 1
) -> dict[str, np.ndarray]:
    """Random tensors of every name the model has on disk, written with its config.json; returns them."""
    rng = np.random.default_rng(0)
    numpy_dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    tensors = {
        name: rng.standard_normal(location.disk_shape, dtype=np.float32).astype(numpy_dtype)
        for name, location in disk_tensors(cfg).items()
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config_from_model(cfg, {})))
    if files == 1:
        save_file(tensors, directory / "model.safetensors")
        return tensors
    weight_map = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors
