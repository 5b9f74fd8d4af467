"""Sliding-window attention with sinks: a dense masked softmax in float64, decoding, gradients, eight devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from untrained import TEACHER, random_params, student_of

from pallas_kernels.testing import rms_ratio
from radlads_jax.decoding.loaded import state_bytes
from radlads_jax.models import MIXERS, bind, init_state, sharding
from radlads_jax.models.attention import Context
from radlads_jax.models.decoder import make_context
from radlads_jax.models.window import WindowOptions
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.model_card import tags, write_model_card
from radlads_jax.porting.student import init_mixers
from radlads_jax.porting.writers import writer_for

BASE = dataclasses.replace(TEACHER, stacks=(("attention", 1),), tie_embeddings=False)
SHAPES = [(4, 64), (0, 7), (6, 2)]


def of_window(sinks: int, window: int):
    return student_of(BASE, "window", sinks=sinks, window=window)


def packed(length: int, rows: int = 3, seed: int = 0):
    """Tokens, segments (the first row is one, the others change where they like), positions that begin anew."""
    rng = np.random.default_rng(seed)
    changes = rng.random((rows, length)) < 0.03
    changes[0] = False
    segments = 1 + np.cumsum(changes, axis=1)
    begun = np.maximum.accumulate(np.where(changes, np.arange(length), 0), axis=1)
    return rng.integers(1, 300, (rows, length)), segments, np.arange(length) - begun


def dense(q, k, v, segments, sinks: int, window: int):
    """softmax(q k^T K^-1/2) v [B,T,H,K], float64, over pairs that are listed one by one."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    out = np.zeros_like(q)
    for b, t in np.ndindex(q.shape[:2]):
        begin = int(np.argmax(segments[b] == segments[b, t]))
        seen = [j for j in range(begin, t + 1) if j - begin < sinks or t - j < window]
        scores = np.einsum("hk,shk->hs", q[b, t], k[b, seen]) * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[b, t] = np.einsum("hs,shk->hk", weights / weights.sum(1, keepdims=True), v[b, seen])
    return out


def mixer_and_input(cfg, length):
    ids, segments, positions = packed(length)
    decoder = bind(cfg, random_params(cfg))
    layer = next(decoder.walk()).first()
    context, _ = make_context(cfg, jnp.asarray(ids), jnp.asarray(segments), jnp.asarray(positions), None)
    return layer, decoder.embed(jnp.asarray(ids)), context, segments


# Longer than two blocks and no multiple of them; and one block.
@pytest.mark.parametrize(("sinks", "window", "length"), [*((*shape, 300) for shape in SHAPES), (3, 5, 33)])
def test_it_is_a_dense_masked_softmax(sinks, window, length):
    layer, x, context, segments = mixer_and_input(of_window(sinks, window), length)
    got, _ = jax.jit(lambda x: layer.mixer(x, context, 0, None))(x)
    q, k, v, _ = layer.mixer.projected(x, context)
    seen = dense(q, k, v, segments, sinks, window).reshape(*x.shape[:2], -1)
    kernel = np.asarray(layer.mixer.o.kernel[...], np.float64)
    assert rms_ratio(got, seen @ kernel) < 1e-6


def test_a_window_as_long_as_the_row_is_the_teachers_attention():
    teacher, cfg = BASE, of_window(4, 33)
    params = random_params(teacher)
    ids, segments, positions = (jnp.asarray(x) for x in packed(33))
    hidden = [bind(c, params).hidden(ids, segment_ids=segments, positions=positions)[0] for c in (teacher, cfg)]
    assert rms_ratio(hidden[1], hidden[0]) < 1e-6
    narrow, _ = bind(of_window(4, 8), params).hidden(ids, segment_ids=segments, positions=positions)
    assert rms_ratio(narrow, hidden[0]) > 1e-3


@pytest.mark.parametrize(("sinks", "window"), [(4, 64), (6, 2)])
def test_decoding_in_chunks_is_the_prefill(sinks, window):
    """Chunks of one token, of some, and of more than a block; sequences whose segments end within them and between."""
    cfg = student_of(TEACHER, "window", (1,), sinks=sinks, window=window)
    params = random_params(cfg)
    read = jax.jit(lambda *a: bind(cfg, params).hidden(a[0], segment_ids=a[1], positions=a[2], state=a[3]))
    rows = [jnp.asarray(x) for x in packed(210, seed=1)]
    whole, _ = read(*rows, None)
    state, parts = init_state(cfg, 3, 210), []
    for chunk in zip(*(jnp.split(x, [1, 2, 3, 139], axis=1) for x in rows), strict=True):
        part, state = read(*chunk, state)
        parts.append(part)
    assert rms_ratio(jnp.concatenate(parts, axis=1), whole) < 1e-6
    kept = state["stacks"][0]
    assert kept["k"].shape == (1, 3, window, 2, 8) and kept["sink_v"].shape == (1, 3, sinks, 2, 8)


def test_gradients_are_those_of_a_dense_mask():
    layer, x, context, segments = mixer_and_input(of_window(3, 40), 300)
    begun = np.maximum.accumulate(np.where(np.diff(segments, axis=1, prepend=1), np.arange(300), 0), axis=1)
    t, j = np.arange(300)[:, None], np.arange(300)
    mask = (j <= t) & (segments[:, :, None] == segments[:, None]) & ((t - j < 40) | ((j - begun)[:, None] < 3))

    def by_mask(x):
        q, k, v, _ = layer.mixer.projected(x, context)
        out = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[:, None])
        return layer.mixer.o(out.reshape(*x.shape[:2], -1))

    losses = (lambda x: jnp.sum(jnp.sin(layer.mixer(x, context, 0, None)[0])), lambda x: jnp.sum(jnp.sin(by_mask(x))))
    got, expected = (jax.jit(jax.grad(loss))(x) for loss in losses)
    assert rms_ratio(got, expected) < 2e-6


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"window is 0; expected at least 1"):
        of_window(4, 0)
    with pytest.raises(ValueError, match=r"sinks is -1; expected at least 0"):
        of_window(-1, 8)
    with pytest.raises(ValueError, match=r"gate.*window"):
        MIXERS["window"].choose(32, gate="full")
    assert student_of(BASE, "window").mixer == WindowOptions(4, 64)


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "context": 2}])
def test_eight_devices_see_what_one_does(axes):
    """Also with fewer kv heads than devices of the axis tensor."""
    layer, x, context, _ = mixer_and_input(of_window(3, 20), 160)
    x = jnp.concatenate([x, x[:1]])
    context = Context(*(None if y is None else jnp.concatenate([y, y[:1]]) for y in context))

    def loss(x):
        out = layer.mixer(x, context, 0, None)[0]
        return jnp.sum(jnp.sin(out)), out

    alone = jax.jit(jax.grad(loss, has_aux=True))(x)
    mesh = jax.make_mesh(
        tuple(axes.get(axis, 1) for axis in sharding.AXES), sharding.AXES, axis_types=(AxisType.Auto,) * 4
    )
    with sharding.traced_over(mesh):
        everywhere = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        together = jax.jit(jax.grad(loss, has_aux=True))(everywhere)
    for got, expected in zip(together, alone, strict=True):
        assert rms_ratio(got, expected) < 2e-6


def test_a_student_is_written_and_read_back():
    cfg = student_of(BASE, "window", sinks=2, window=9)
    config = hf_config_from_model(cfg, {})
    assert (config["attention_sinks"], config["attention_window"]) == (2, 9)
    assert model_config_from_hf(config) == cfg
    card = write_model_card(cfg, use=writer_for(cfg).use(cfg))
    assert "AutoModelForCausalLM" in card and "rwkv" not in tags(card)
    # Nothing in a state grows with the length, and all of the mixer is the teacher's.
    assert state_bytes(cfg, 10) == state_bytes(cfg, 10_000) == 4 * (2 * (2 + 9) * 2 * 8 + 1)
    teacher = random_params(BASE)
    started = init_mixers(cfg, teacher, 0)["stacks"][0]["mixer"]
    jax.tree.map(np.testing.assert_array_equal, started, teacher["stacks"][0]["mixer"])
