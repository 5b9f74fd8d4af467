"""The students' mixers against outputs of outside implementations (tests/data/*.npz) and a float64 token loop."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radlads_jax.models import MIXERS, ModelConfig
from radlads_jax.models.attention import Context
from radlads_jax.models.rope import rope_tables

DATA = pathlib.Path(__file__).parent.parent / "data"
CASES = {"rad_rwkv6": "rad_rwkv6", "rad_rwkv7_balanced": "rad_rwkv7", "rad_rwkv7_groupnorm": "rad_rwkv7"}


@pytest.fixture(params=CASES)
def golden(request):
    return request.param, {k.removeprefix("self_attn."): v for k, v in np.load(DATA / f"{request.param}.npz").items()}


def our_params(g: dict) -> dict:
    """The tensors under our names; written out here so that the test does not lean on the porting tables."""
    flat = {k: v.reshape(v.shape[2:]) if v.shape[:2] == (1, 1) else v for k, v in g.items()}
    params = {p: {"kernel": flat[f"{p}_proj.weight"].T} for p in "qkvo"}
    for p in "qkv":
        params[p]["bias"] = flat[f"{p}_proj.bias"]
    if "time_decay" in flat:
        mu = np.stack([flat[f"time_maa_{i}"] for i in "rkvwg"])
        params["shift"] = {"mu_x": flat["time_maa_x"], "mu": mu, "a": flat["time_maa_w1"], "b": flat["time_maa_w2"]}
        params["decay"] = {"base": flat["time_decay"], "a": flat["time_decay_w1"], "b": flat["time_decay_w2"]}
        params["gate"] = {"kernel": flat["gate.weight"].T}
        return params
    for name, letter in (("decay", "w"), ("iclr", "a"), ("value", "v")):
        params[name] = {"base": flat[f"{letter}0"], "a": flat[f"{letter}1"], "b": flat[f"{letter}2"]}
    params["gate"] = {"a": flat["g1"], "b": flat["g2"]}
    params |= {k: flat[k] for k in ("k_k", "k_a", "r_k")}
    if "ln_x.weight" in flat:
        params["ln_x"] = {"scale": flat["ln_x.weight"], "bias": flat["ln_x.bias"]}
    return params


def config_of(name: str, g: dict) -> ModelConfig:
    width, heads = g["x"].shape[1], int(g["heads"])
    group_norm = name.endswith("groupnorm")
    mixer = MIXERS[CASES[name]].choose(width, group_norm=group_norm, balance_state=not group_norm)
    return ModelConfig(
        "qwen2", 10, width, 2 * width, heads, int(g["kv_heads"]), g["q_proj.weight"].shape[0] // heads,
        ((CASES[name], 2),), rope_theta=float(g.get("rope_theta", 10000.0)), qkv_bias=True, mixer=mixer,
    )  # fmt: skip


def run_mixer(name: str, g: dict, dtype) -> np.ndarray:
    cfg = config_of(name, g)
    structure, template = nnx.split(MIXERS[CASES[name]].module(cfg, jnp.zeros((), jnp.int32), rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), our_params(g))
    assert set(params) == set(nnx.to_pure_dict(template))
    x = jnp.asarray(g["x"], dtype)[None]
    context = Context(*rope_tables(cfg, jnp.arange(x.shape[1])[None]))
    v_first = jnp.zeros((1, x.shape[1], cfg.num_heads * cfg.head_dim), dtype)
    if "v_first" in g:
        v_first = jnp.asarray(g["v_first"], dtype).reshape(v_first.shape)
    context = context._replace(v_first=v_first)
    out, _ = nnx.merge(structure, params)(x, context, jnp.asarray(g["layer"]), None)
    return np.asarray(out[0], np.float64)


def relative_rms(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def test_mixer_equals_golden(golden):
    name, g = golden
    assert relative_rms(run_mixer(name, g, jnp.float32), g["out"]) < 2e-6


def test_float64_loop_equals_golden(golden):
    name, g = golden
    loop = loop_rwkv6 if name == "rad_rwkv6" else loop_rwkv7
    assert relative_rms(loop(g), g["out"]) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_mixer_equals_float64_loop_on_longer_input(golden, seed):
    name, g = golden
    rng = np.random.default_rng(seed)
    g = dict(g) | {"x": rng.standard_normal((75, g["x"].shape[1]))}
    if "v_first" in g:
        g["v_first"] = rng.standard_normal((75, g["v_first"].shape[1]))
    loop = loop_rwkv6 if name == "rad_rwkv6" else loop_rwkv7
    assert relative_rms(run_mixer(name, g, jnp.float32), loop(g)) < 5e-6


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def heads_of(x, g, count):
    return x.reshape(x.shape[0], count, -1)


def project(g, letter, x):
    return x @ g[f"{letter}_proj.weight"].T + g[f"{letter}_proj.bias"]


def loop_rwkv6(g: dict) -> np.ndarray:
    x, heads, groups = g["x"], int(g["heads"]), int(g["kv_heads"])
    s = np.vstack([np.zeros_like(x[:1]), x[:-1]]) - x
    inner = np.tanh((x + s * g["time_maa_x"][0, 0]) @ g["time_maa_w1"]).reshape(len(x), 5, -1)
    mixed = {i: x + s * (g[f"time_maa_{i}"][0, 0] + inner[:, n] @ g["time_maa_w2"][n]) for n, i in enumerate("rkvwg")}
    r = heads_of(project(g, "q", mixed["r"]), g, heads)
    k = np.repeat(heads_of(project(g, "k", mixed["k"]), g, groups), heads // groups, axis=1)
    v = np.repeat(heads_of(project(g, "v", mixed["v"]), g, groups), heads // groups, axis=1)
    gate = sigmoid(mixed["g"] @ g["gate.weight"].T)
    ww = g["time_decay"][0, 0] + np.tanh(mixed["w"] @ g["time_decay_w1"]) @ g["time_decay_w2"]
    w = np.exp(heads_of(np.maximum(-np.exp(ww), -5), g, heads))
    k = k * (1 - w)
    state, out = np.zeros((heads, k.shape[2], v.shape[2])), []
    for t in range(len(x)):
        state = w[t][:, :, None] * state + k[t][:, :, None] * v[t][:, None, :]
        out.append(k.shape[2] ** -0.5 * np.einsum("hkv,hk->hv", state, r[t]))
    return (gate * np.stack(out).reshape(len(x), -1)) @ g["o_proj.weight"].T


def loop_rwkv7(g: dict) -> np.ndarray:
    x, heads, groups = g["x"], int(g["heads"]), int(g["kv_heads"])

    def rope(y):
        half = y.shape[2] // 2
        angle = np.arange(len(y))[:, None, None] * float(g["rope_theta"]) ** (-np.arange(half) / half)
        first, second = y[..., :half], y[..., half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], -1
        )

    r = rope(heads_of(project(g, "q", x), g, heads))
    k = np.repeat(rope(heads_of(project(g, "k", x), g, groups)), heads // groups, axis=1)
    v = np.repeat(heads_of(project(g, "v", x), g, groups), heads // groups, axis=1)
    iclr = heads_of(sigmoid(g["a0"][0, 0] + x @ g["a1"] @ g["a2"]), g, heads)
    w = np.exp(-math.exp(-0.5) * heads_of(sigmoid(g["w0"][0, 0] + np.tanh(x @ g["w1"]) @ g["w2"]), g, heads))
    residual = heads_of(sigmoid(g["v0"][0, 0] + x @ g["v1"] @ g["v2"]), g, heads)
    v = v + (heads_of(g["v_first"], g, heads) - v) * residual
    gate = sigmoid(x @ g["g1"]) @ g["g2"]
    if "ln_x.weight" in g:
        kk = k * g["k_k"][0, 0].reshape(k.shape[1:])
        k_in = k * (1 + (iclr - 1) * g["k_a"][0, 0].reshape(k.shape[1:]))
    else:
        kk, k_in = k, k * (1 - w + iclr)
    kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
    size, state, out = k.shape[2], np.zeros((heads, k.shape[2], v.shape[2])), []
    for t in range(len(x)):
        removed = np.einsum("hkv,hk->hv", state, kk[t])
        state = w[t][:, :, None] * state - (kk[t] * iclr[t])[:, :, None] * removed[:, None, :]
        state = state + k_in[t][:, :, None] * v[t][:, None, :]
        out.append(np.einsum("hkv,hk->hv", state, r[t]))
    p = np.stack(out)
    if "ln_x.weight" in g:
        p = (p - p.mean(-1, keepdims=True)) / np.sqrt(p.var(-1, keepdims=True) + size * 1e-5)
        p = p.reshape(len(x), -1) * g["ln_x.weight"] + g["ln_x.bias"]
    else:
        p = p.reshape(len(x), -1) * size**-0.5
    return (gate * p) @ g["o_proj.weight"].T
