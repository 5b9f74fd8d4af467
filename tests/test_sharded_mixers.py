"""Mixers over devices' rows, heads and parts of a row: the gradients and outputs of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_sharding import TEACHER, eight, over, relative_error
from untrained import random_mixers, random_params, student_of

from radlads_jax.distill.align import mixer_structure
from radlads_jax.models import bind
from radlads_jax.models.attention import Context
from radlads_jax.models.placement import gathered
from radlads_jax.models.rope import rope_tables

MIXERS = {
    "gdn": student_of(TEACHER, "gdn"),
    # Of 16 tokens most see keys of other shards, and none sees all.
    "window_rwkv7": student_of(TEACHER, "window_rwkv7", sinks=2, window=5),
}


@pytest.mark.parametrize("cfg", MIXERS.values(), ids=MIXERS)
def test_a_mixers_gradients_over_a_mesh_are_those_of_one_device(cfg):
    """Shards of 8 tokens: a segment begins inside of one and at the seam of two."""
    gradients, inputs = functools.partial(mixers_gradients, cfg), mixers_inputs(cfg)
    split = over(eight(fsdp=2, tensor=2, context=2), gradients, *inputs)
    errors = jax.tree.map(relative_error, split, jax.jit(gradients)(*inputs))
    assert max(jax.tree.leaves(errors)) < 3e-6, errors


def mixers_inputs(cfg):
    """(a mixer's parameters, [4, 16, D] twice)."""
    layer = jax.tree.map(lambda x: x[0], random_mixers(cfg, 0.2)["stacks"][0]["mixer"])
    rng = np.random.default_rng(1)
    return layer, *(jnp.asarray(rng.standard_normal((4, 16, 32)), jnp.float32) for _ in range(2))


def mixers_gradients(cfg, layer, x, weights):
    segments = jnp.asarray([[1] * 8 + [2] * 8, [1] * 5 + [2] * 11, [1] * 16, [1] * 15 + [0]], jnp.int32)
    starts = jnp.diff(segments, prepend=0) != 0
    context = Context(*rope_tables(cfg, jnp.arange(16)[None].repeat(4, 0)), segments, starts, v_first=x)
    name = cfg.recurrent_mixer

    def loss(layer, x):
        mixer = nnx.merge(mixer_structure(cfg, name), gathered(layer, cfg, name, "mixer/"))
        out, _ = mixer(x, context, 0, None)
        return jnp.sum(out * weights)

    return jax.grad(loss, (0, 1))(layer, x)


def test_gdn_with_fewer_kv_heads_than_tensor():
    mesh = eight(fsdp=2, tensor=4)
    cfg = student_of(TEACHER, "gdn", (1,))
    params, tokens = random_params(cfg), jnp.asarray(np.random.default_rng(0).integers(1, 64, (2, 16)), jnp.int32)
    segments = jnp.asarray([[1] * 5 + [2] * 11, [1] * 16], jnp.int32)

    def hidden(params, tokens, segments):
        return bind(cfg, params).hidden(tokens, segment_ids=segments)[0]

    assert (
        relative_error(over(mesh, hidden, params, tokens, segments), jax.jit(hidden)(params, tokens, segments)) < 2e-6
    )
