"""The parts of layers: gradients of what stands before every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radlads_jax.models import MIXERS, ModelConfig, heads
from radlads_jax.models.layers import RMSNorm, linear
from radlads_jax.models.rad_rwkv6 import _TokenShift

CFG = ModelConfig("qwen3", 97, 64, 48, 4, 2, 16, (("attention", 1),), qk_norm=True)
PARTS = {
    "norm": lambda cfg, rngs: RMSNorm(64, cfg),
    "norm of heads": lambda cfg, rngs: RMSNorm(16, cfg),
    "projection": lambda cfg, rngs: linear(64, 64, cfg, rngs, bias=True),
    "token shift": lambda cfg, rngs: _TokenShift(cfg, rngs=rngs),
}


def test_a_norm_keeps_no_scale_of_every_token():
    """What its backward pass finds stored: an array of the rows' size for the norm itself, and one for the scale."""
    norm = RMSNorm(64, dataclasses.replace(CFG, dtype="bfloat16"), zero_centred=False)
    graph, params = nnx.split(norm)
    x = jnp.ones((4, 128, 64), jnp.bfloat16)

    def kept(params, x):
        return jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)[1]

    wide = [leaf for leaf in jax.tree.leaves(jax.eval_shape(kept, params, x)) if leaf.shape == x.shape]
    assert sum(leaf.dtype == jnp.bfloat16 for leaf in wide) == 1


@pytest.mark.parametrize("name", PARTS)
def test_gradients_are_summed_over_tokens_in_float32(name):
    """16,384 tokens in bfloat16 whose gradients have one sign: sums of that dtype stop growing."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 512, 64)), jnp.bfloat16)
    weights = jnp.asarray(np.abs(rng.normal(size=x.shape)), jnp.bfloat16)

    def gradients(dtype):
        cfg = dataclasses.replace(CFG.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(64)), dtype=dtype)
        part = PARTS[name](cfg, nnx.Rngs(0))

        def loss(part, x):
            if name == "token shift":
                out = sum(part(x, jnp.roll(x, 1, axis=1)))
            elif name == "norm of heads":
                out = heads.normed(x, part) * jnp.sign(x)
            else:
                out = part(x) * (jnp.sign(x) if name == "norm" else 1)
            return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32))

        given = x.astype(dtype)
        return {
            "/".join(map(str, path)): np.asarray(leaf)
            for path, leaf in nnx.to_flat_state(jax.jit(nnx.grad(loss))(part, given))
        }

    got, expected = gradients("bfloat16"), gradients("float32")
    for path, exact in expected.items():
        assert np.linalg.norm(got[path] - exact) <= 0.01 * np.linalg.norm(exact) + 1e-6, path
