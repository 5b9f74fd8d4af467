"""The decoder's promises: prefill = decode, packed = apart, hybrids, switches, compile time flat in depth."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untrained import random_params

from radlads_jax.models import MIXERS, ModelConfig, bind, init_params, init_state, layers
from radlads_jax.models.decoder import graphdef
from radlads_jax.models.gdn import GdnOptions
from radlads_jax.models.mixers import mixer_spec
from radlads_jax.models.tree import path_leaves

TEACHER = ModelConfig("qwen2", 64, 48, 96, 4, 2, 12, (("attention", 3),), qkv_bias=True)


def student(mixer: str, attention_layers=(), **switches) -> ModelConfig:
    return TEACHER.as_student(mixer, MIXERS[mixer].choose(48, **switches), attention_layers)


CONFIGS = {
    "teacher": TEACHER,
    "qwen3": dataclasses.replace(TEACHER, family="qwen3", qkv_bias=False, qk_norm=True, head_dim=16),
    "tied": dataclasses.replace(TEACHER, tie_embeddings=True),
    "rwkv6": student("rad_rwkv6"),
    "rwkv6_rope_groupnorm_lowrank": student(
        "rad_rwkv6", use_rope=True, group_norm=True, balance_state=False, gate="low_rank", token_shift=False
    ),
    "rwkv7": student("rad_rwkv7"),
    "rwkv7_groupnorm": student("rad_rwkv7", group_norm=True, balance_state=False),
    "rwkv7_no_gate_no_rope": student("rad_rwkv7", gate="none", use_rope=False),
    "rwkv7_full_gate": student("rad_rwkv7", gate="full"),
    "hybrid7": student("rad_rwkv7", attention_layers=(1,)),
    "gdn_hybrid": student("gdn", attention_layers=(2,)),
    "gdn_of_a_checkpoint": TEACHER.as_student("gdn", GdnOptions(2, 4, 6, 10), (1,)),
    "hybrid6_first": student("rad_rwkv6", attention_layers=(0, 2)),
    "window_hybrid": student("window", attention_layers=(1,), sinks=2, window=3),
    "window_rwkv7": student("window_rwkv7", sinks=2, window=3),
}


# Tests of exports run these switches too (tests/hf/test_modeling.py).
SLOW = ("tied", "rwkv7_no_gate_no_rope", "rwkv7_full_gate", "hybrid6_first")


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CONFIGS], scope="module"
)
def model(request):
    cfg = CONFIGS[request.param]
    return cfg, random_params(cfg)


@functools.partial(jax.jit, static_argnums=0, static_argnames="remat")
def hidden_of(cfg, params, rows, **options):
    return bind(cfg, params).hidden(rows, **options)


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradients_of(cfg, params, rows, remat):
    return jax.grad(lambda params: jnp.square(hidden_of(cfg, params, rows, remat=remat)[0] - 0.3).sum())(params)


def tokens(batch: int, length: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(1, 64, (batch, length)), jnp.int32)


def relative(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def test_prefill_equals_decode(model):
    cfg, params = model
    rows = tokens(2, 12)
    whole, whole_state = hidden_of(cfg, params, rows, state=init_state(cfg, 2, 24))
    plain, _ = hidden_of(cfg, params, rows)
    chunks, state = [], init_state(cfg, 2, 24)
    for chunk in jnp.split(rows, [7, 8, 9, 10, 11], axis=1):
        hidden, state = hidden_of(cfg, params, chunk, state=state)
        chunks.append(hidden)
    assert relative(jnp.concatenate(chunks, axis=1), plain) < 2e-6
    assert relative(whole, plain) < 2e-6
    for name, value in path_leaves(whole_state).items():
        np.testing.assert_allclose(path_leaves(state)[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_packed_rows_equal_documents_apart(model):
    cfg, params = model
    apart = tokens(2, 12)
    packed = jnp.concatenate([apart.reshape(1, 24), jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.asarray([[1] * 12 + [2] * 12 + [0] * 3])
    positions = jnp.asarray([[*range(12), *range(12), 0, 0, 0]])
    hidden, _ = hidden_of(cfg, params, packed, segment_ids=segments, positions=positions)
    assert relative(hidden[:, :24].reshape(2, 12, -1), hidden_of(cfg, params, apart)[0]) < 2e-6


def test_new_segment_clears_a_decoding_state(model):
    cfg, params = model
    second = tokens(2, 12, seed=2)
    _, state = hidden_of(cfg, params, tokens(2, 12, seed=1), state=init_state(cfg, 2, 24))
    options = {"segment_ids": jnp.full((2, 12), 2), "positions": jnp.tile(jnp.arange(12), (2, 1))}
    hidden, _ = hidden_of(cfg, params, second, state=state, **options)
    assert relative(hidden, hidden_of(cfg, params, second)[0]) < 2e-6


def test_left_padding_changes_nothing(model):
    cfg, params = model
    rows = tokens(2, 12)
    padded = jnp.pad(rows, ((0, 0), (5, 0)))
    options = {"positions": jnp.maximum(jnp.arange(17) - 5, 0), "segment_ids": jnp.where(jnp.arange(17) < 5, 0, 1)}
    options = {name: jnp.tile(value, (2, 1)) for name, value in options.items()}
    hidden, _ = hidden_of(cfg, params, padded, state=init_state(cfg, 2, 24), **options)
    assert relative(hidden[:, 5:], hidden_of(cfg, params, rows)[0]) < 2e-6


def test_later_tokens_change_nothing_before_them(model):
    cfg, params = model
    row = np.asarray(tokens(1, 12))
    changed = row.copy()
    changed[0, 8] = (row[0, 8] + 1) % 64
    before, after = hidden_of(cfg, params, jnp.asarray(np.concatenate([row, changed])))[0]
    assert relative(after[:8], before[:8]) < 2e-6
    assert relative(after[8:], before[8:]) > 1e-3


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    cfg = CONFIGS["hybrid7"]
    params, row = random_params(cfg), tokens(1, 10)
    expected, got = gradients_of(cfg, params, row, "none"), gradients_of(cfg, params, row, remat)
    jax.tree.map(lambda e, g: np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-4), expected, got)


def test_long_rows_are_read_in_blocks_of_queries():
    row = tokens(1, 1100)
    params = random_params(TEACHER)
    segments = jnp.asarray([[1] * 700 + [2] * 400])
    whole, _ = hidden_of(TEACHER, params, row, segment_ids=segments, positions=jnp.arange(1100)[None])
    alone, _ = hidden_of(TEACHER, params, row[:, 700:], positions=jnp.arange(700, 1100)[None])
    assert relative(whole[:, 700:], alone) < 2e-6


def test_program_does_not_grow_with_depth():
    def size(layers: int) -> int:
        cfg = dataclasses.replace(CONFIGS["rwkv7"], stacks=(("rad_rwkv7", layers),))
        shapes = jax.eval_shape(lambda: init_params(cfg, 0))
        return len(jax.jit(lambda p: bind(cfg, p).hidden(tokens(1, 16))[0].sum()).lower(shapes).as_text())

    assert size(28) < 1.02 * size(4)


def test_value_residual_starts_at_the_first_recurrent_layer():
    cfg = student("rad_rwkv7", attention_layers=(0,))
    assert cfg.first_recurrent_layer == 1
    params = random_params(cfg)
    base = params["stacks"][1]["mixer"]["value"]["base"]
    row = tokens(1, 6)
    hidden = hidden_of(cfg, params, row)[0]
    params["stacks"][1]["mixer"]["value"]["base"] = base.at[0].add(1.0)  # the first recurrent layer has no residual
    np.testing.assert_array_equal(hidden_of(cfg, params, row)[0], hidden)
    params["stacks"][1]["mixer"]["value"]["base"] = base.at[1].add(1.0)
    assert not np.array_equal(hidden_of(cfg, params, row)[0], hidden)


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
def test_published_initial_values(mixer):
    cfg = student(mixer)
    params = jax.jit(lambda: init_params(cfg, 0))()["stacks"][0]["mixer"]
    n = np.arange(48) / 47
    for layer in range(3):
        depth = layer / 2
        expected = (
            -6 + 5 * n ** (0.7 + 1.3 * depth) if mixer == "rad_rwkv6" else -7 + 5 * n ** (0.85 + depth**0.5) + 0.5
        )
        np.testing.assert_allclose(params["decay"]["base"][layer], expected, rtol=1e-5)
    low_rank = [v for v in params.values() if isinstance(v, dict) and "a" in v]
    assert low_rank and all(np.all(v["a"] == 0) and np.any(v["b"] != 0) for v in low_rank)
    if mixer == "rad_rwkv6":
        assert np.all(params["gate"]["kernel"] == 0) and np.all(params["shift"]["mu_x"] == 1)
        return
    assert np.all(params["value"]["base"] == 1) and np.all(params["iclr"]["base"] == 0)
    for name in ("decay", "iclr", "value"):
        b = np.asarray(params[name]["b"][1], np.float64)
        small = b @ b.T if b.shape[0] <= b.shape[1] else b.T @ b
        gain = 0.1 * max(1.0, np.sqrt(b.shape[0] / b.shape[1]))
        np.testing.assert_allclose(small, gain**2 * np.eye(len(small)), atol=1e-6)


def test_contradicting_switches_are_refused():
    with pytest.raises(ValueError, match=r"config\.student\.balance_state and config\.student\.group_norm"):
        MIXERS["rad_rwkv7"].choose(48, group_norm=True)
    with pytest.raises(ValueError, match=r"student\.gate .*'half'.*low_rank"):
        MIXERS["rad_rwkv7"].choose(48, gate="half")
    with pytest.raises(ValueError, match=r"student\.attention_layers .*\[3\].*\b0 to 2\b"):
        student("rad_rwkv7", attention_layers=(3,))
    with pytest.raises(ValueError, match=r"student\.mixer .*'rwkv8'.*rad_rwkv7"):
        mixer_spec("rwkv8")


def test_structure_is_built_once():
    assert graphdef(TEACHER) is graphdef(dataclasses.replace(TEACHER))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_matmul_has_the_gradients_of_jax_itself(dtype, tolerance):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, 7), (7, 3)))

    def gradients(product):
        return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel))), (0, 1))(x, kernel)

    for ours, theirs in zip(gradients(layers.matmul), gradients(jnp.matmul), strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(gradient, np.float32) for gradient in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
