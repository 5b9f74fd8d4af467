"""Fresh weights: the heads that look back do, the others not, and what has no such heads is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radlads_jax.models import ModelConfig, bind
from radlads_jax.models.decoder import init_params, make_context
from radlads_jax.models.fresh import fresh_params

LOOK_BACK = (1, 2, 7)
LENGTH = 64


@pytest.fixture
def cfg() -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        stacks=(("attention", 2),),
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=1e6,
        qkv_bias=True,
    )


def test_each_head_looks_as_far_back_as_it_is_told(cfg: ModelConfig) -> None:
    layer = next(bind(cfg, fresh_params(cfg, 0, LOOK_BACK)).walk()).layers
    mixer = jax.tree.map(lambda x: x[0], layer).mixer
    x = jax.random.normal(jax.random.key(1), (8, LENGTH, cfg.hidden_size))
    context, _ = make_context(cfg, jnp.zeros((8, LENGTH), int), None, None, None)
    q, k, _, _ = mixer.projected(x, context)
    k = np.repeat(k, cfg.num_heads // cfg.num_kv_heads, axis=2)
    scores = np.einsum("bthk,bshk->bhts", q, k) / cfg.head_dim**0.5
    weights = jax.nn.softmax(jnp.where(np.tri(LENGTH, dtype=bool), scores, -jnp.inf), axis=-1)
    places = np.arange(16, LENGTH)
    for head, back in enumerate(LOOK_BACK):
        mean = [float(weights[:, head, places, places - n].mean()) for n in range(12)]
        assert int(np.argmax(mean)) == back
        assert mean[back] > 0.5
    assert float(weights[:, 3, places, places - 1].mean()) < 0.2


def test_without_them_they_are_what_a_decoder_begins_with(cfg: ModelConfig) -> None:
    for mine, its in zip(jax.tree.leaves(fresh_params(cfg, 3)), jax.tree.leaves(init_params(cfg, 3)), strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize("change", [{"qkv_bias": False}, {"qk_norm": True}, {"num_heads": 2}])
def test_heads_that_can_not_are_refused(cfg: ModelConfig, change: dict) -> None:
    with pytest.raises(ValueError, match=r"look_back is \(1, 2, 7\)"):
        fresh_params(dataclasses.replace(cfg, **change), 0, LOOK_BACK)
