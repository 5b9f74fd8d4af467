"""Exports of small students of every kind, as transformers loads them."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untrained import save_tokenizer, student_of

from radlads_jax.models import ModelConfig
from radlads_jax.models.config import KeptAttention, RopeScaling
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import nest
from radlads_jax.porting.save import save_params

TEACHER = ModelConfig(
    "qwen2", 259, 32, 48, 4, 2, 8, (("attention", 3),), qkv_bias=True, rope_theta=1e4, max_position_embeddings=256
)
QWEN3 = dataclasses.replace(TEACHER, family="qwen3", qkv_bias=False, qk_norm=True, head_dim=12)
LLAMA = dataclasses.replace(
    TEACHER, family="llama", o_bias=True, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), rope_theta=500.0
)


def student(mixer: str, layers: tuple[int, ...] = (), base: ModelConfig = TEACHER, **switches) -> ModelConfig:
    ranks = {"rank_decay": 3, "rank_iclr": 5, "rank_value": 7, "rank_shift": 2, "rank_gate": 11}
    return student_of(base, mixer, layers, **(ranks | switches))


def other_softmax(cfg: ModelConfig, kept: KeptAttention) -> ModelConfig:
    return dataclasses.replace(cfg, kept_attention=kept)


GROUP_NORM = {"balance_state": False, "group_norm": True}
MODELS = {
    "rwkv6": student("rad_rwkv6"),
    "rwkv6 RoPE, no token shift, no gate": student("rad_rwkv6", use_rope=True, token_shift=False, gate="none"),
    "rwkv6 low-rank gate, GroupNorm": student("rad_rwkv6", gate="low_rank", **GROUP_NORM),
    "rwkv6 unbounded": student("rad_rwkv6", balance_state=False),
    "rwkv6 hybrid": student("rad_rwkv6", (1,)),
    "rwkv7": student("rad_rwkv7"),
    "rwkv7 no RoPE, full gate": student("rad_rwkv7", use_rope=False, gate="full"),
    "rwkv7 GroupNorm": student("rad_rwkv7", **GROUP_NORM),
    "rwkv7 hybrid, first": student("rad_rwkv7", (0,)),
    "rwkv7 hybrid, last": student("rad_rwkv7", (1, 2)),
    "rwkv7 of qwen3": student("rad_rwkv7", (2,), QWEN3),
    "rwkv7 of llama": student("rad_rwkv7", (), LLAMA),
    "window": student("window", sinks=3, window=5),
    "window rwkv7": student("window_rwkv7"),
    "window rwkv7 hybrid": student("window_rwkv7", (1,), sinks=2, window=8),
    "rwkv6 hybrid, norms, no RoPE": other_softmax(
        student("rad_rwkv6", (0, 2), qk_norm=True), KeptAttention(rope=False, log_scale=16.0)
    ),
    "rwkv7 hybrid, norms, no RoPE, gates": other_softmax(
        student("rad_rwkv7", (1, 2), qk_norm=True), KeptAttention(rope=False, log_scale=8.0, output_gate=True)
    ),
}
SOME = ("rwkv6", "rwkv6 hybrid", "rwkv7", "rwkv7 hybrid, last", "window", "window rwkv7 hybrid")
OTHER_SOFTMAX = "rwkv7 hybrid, norms, no RoPE, gates"


@dataclasses.dataclass(eq=False, frozen=True)
class Exported:
    directory: Path
    cfg: ModelConfig
    params: dict

    def model(self, **options):
        import torch
        import transformers

        options = {"dtype": torch.float32} | options
        model = transformers.AutoModelForCausalLM.from_pretrained(self.directory, trust_remote_code=True, **options)
        return model.eval()


@pytest.fixture(scope="session", autouse=True)
def code_cache(tmp_path_factory):
    """Where transformers puts the code of a directory before it imports it."""
    directory = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", directory)
        patch.setattr(sys, "path", [directory, *sys.path])
        yield


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 259)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    return directory


def random_params(cfg: ModelConfig) -> dict:
    """Parameters that are all away from their neutral values, decays from very slow to the bound."""
    rng = np.random.default_rng(0)

    def value(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        if path[-2:] == ("decay", "base"):
            return jnp.asarray(rng.uniform(-6, 2, shape), jnp.float32)
        return jnp.asarray((path[-1] == "scale") + 0.3 * rng.standard_normal(shape), jnp.float32)

    return nest({path: value(path, shape) for path, shape in param_shapes(cfg).items()})


@pytest.fixture(scope="session")
def export(tmp_path_factory, tokenizer_dir):
    """A function from a name in MODELS to its export."""
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            cfg, params = MODELS[name], random_params(MODELS[name])
            directory = tmp_path_factory.mktemp("export") / "model"
            base = {"eos_token_id": 258, "pad_token_id": 258}
            save_params(params, cfg, directory, base_config=base, tokenizer_from=tokenizer_dir)
            made[name] = Exported(directory, cfg, params)
        return made[name]

    return make


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 250, shape)


def relative_rms(got, expected) -> float:
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
