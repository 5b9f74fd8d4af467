"""Untrained models that many test files share.

Drawn with numpy: to compile the draws of `init_params`, shape by shape, takes longer than many a test.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from radlads_jax.data import synthetic
from radlads_jax.models import MIXERS, ModelConfig, abstract_params
from radlads_jax.models.gdn import GdnOptions
from radlads_jax.porting.save import save_params

TEACHER = ModelConfig(
    "qwen2", 300, 32, 64, 4, 2, 8, (("attention", 2),), qkv_bias=True, tie_embeddings=True, max_position_embeddings=512
)

# With layers of gdn itself. Sizes in the proportions of the published ones: a softmax head makes two value heads, RoPE
# turns a part of it.
TEACHER_WITH_GDN = ModelConfig(
    "qwen3_5_text",
    300,
    32,
    48,
    2,
    1,
    16,
    (("gdn", 1), ("attention", 2)),
    qk_norm=True,
    zero_centred_norms=True,
    output_gate=True,
    rotary_size=8,
    tie_embeddings=True,
    max_position_embeddings=512,
    mixer=GdnOptions(2, 4, 8, 8),
)


def student_of(teacher: ModelConfig, mixer: str, attention_layers: tuple[int, ...] = (), **chosen) -> ModelConfig:
    """The student; of what is chosen, what is no option of this mixer is left out."""
    spec = MIXERS[mixer]
    names = {field.name for field in dataclasses.fields(spec.options)}
    options = spec.choose(teacher.hidden_size, **{name: value for name, value in chosen.items() if name in names})
    return teacher.as_student(mixer, options, attention_layers)


def random_params(cfg: ModelConfig, scale: float = 0.2, seed: int = 0):
    """No branch silent, no two tokens nearly as likely, the decays those of a student's start.

    Else of standard deviation `scale`, around 1 for a norm's scale and around 0 for all others.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("decay/base"):
            return jnp.asarray(rng.uniform(-6, 0, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(name.endswith("scale"), scale, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(cfg))


def random_mixers(cfg: ModelConfig, scale: float = 0.2, seed: int = 0):
    """`random_params` of the mixers that are not the teacher's alone, as `init_mixers` has them."""
    stacks = random_params(cfg, scale, seed)["stacks"]
    return {"stacks": {i: {"mixer": stacks[i]["mixer"]} for i in range(len(cfg.stacks)) if cfg.is_changed(i)}}


def save_tokenizer(directory: pathlib.Path, vocab_size: int = 300) -> pathlib.Path:
    """The synthetic language's, of few words."""
    synthetic.save_tokenizer(synthetic.train_tokenizer(vocab_size, count=200), directory)
    return directory


def save_teacher(parent: pathlib.Path, cfg: ModelConfig = TEACHER) -> pathlib.Path:
    """parent/model, a teacher of random weights with a tokenizer."""
    tokenizer = save_tokenizer(parent / "tokenizer", cfg.vocab_size)
    base = {"model_type": cfg.family, "eos_token_id": 0, "bos_token_id": 0}
    return save_params(random_params(cfg, 0.08), cfg, parent / "model", base_config=base, tokenizer_from=tokenizer)
