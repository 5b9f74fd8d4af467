"""What the tests of every implementation share: inputs, a float64 token loop with its gradients, an error measure."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_Arrays = dict[str, np.ndarray]

# RMS ratios to the float64 loop; never loosened.
TOLERANCE = {"float32": 1e-6, "float32_stress": 1e-5, "bfloat16": 8e-3}


def rms_ratio(got: Any, want: Any) -> float:
    """||got - want|| / ||want|| in float64; the plain norm of got where want is all zeros."""
    got64, want64 = np.asarray(got, np.float64), np.asarray(want, np.float64)
    scale = float(np.linalg.norm(want64))
    error = float(np.linalg.norm(got64 - want64))
    return error / scale if scale > 0 else error


def recurrence_inputs(
    operation: str,
    batch: int,
    length: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    seed: int = 0,
    log_w_range: tuple[float, float] | None = None,
    key_scale: float = 1.0,
    iclr: float | None = None,
) -> _Arrays:
    """Random float32 arguments as a mixer would make them: unit removal keys, decays over the student's whole range."""
    rng = np.random.default_rng(seed)
    shape = (batch, length, heads, key_size)
    low, high = log_w_range or {"wkv7": (-0.6065, -0.001), "wkv6": (-5.0, -0.001)}[operation]
    inputs = {
        "r": rng.standard_normal(shape),
        "log_w": rng.uniform(low, high, shape) if low < high else np.full(shape, low),
        "k": rng.standard_normal(shape) * key_scale,
        "v": rng.standard_normal((batch, length, heads, value_size)),
    }
    if operation == "wkv7":
        removal = rng.standard_normal(shape)
        removal /= np.linalg.norm(removal, axis=-1, keepdims=True)
        inputs["a"] = -removal
        inputs["b"] = removal * (rng.uniform(0.0, 1.0, shape) if iclr is None else iclr)
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def token_loop(
    inputs: dict[str, Any],
    initial_state: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
    d_out: np.ndarray | None = None,
    d_final: np.ndarray | None = None,
) -> _Arrays:
    """The recurrence and its adjoint in float64, one token after the other.

    Takes r, log_w, k, v and, for wkv7, a and b; returns o, final_state and, where d_out is given, the gradients of
    sum(o * d_out) + sum(final_state * d_final) by the inputs' names.
    """
    x = {name: np.moveaxis(np.asarray(value, np.float64), 1, 0) for name, value in inputs.items()}
    length, batch, heads, key_size = x["r"].shape
    zero = np.zeros((batch, heads, key_size, x["v"].shape[-1]))
    x.setdefault("a", np.zeros_like(x["r"]))
    x.setdefault("b", np.zeros_like(x["r"]))
    keep = np.ones((length, batch))
    if segment_ids is not None:
        keep[1:] = (segment_ids[:, 1:] == segment_ids[:, :-1]).T
    states = [zero if initial_state is None else np.asarray(initial_state, np.float64)]
    out = np.empty(x["v"].shape)
    for t in range(length):
        before = states[-1] * keep[t][:, None, None, None]
        removed = np.einsum("bhk,bhkv->bhv", x["a"][t], before)
        state = np.exp(x["log_w"][t])[..., None] * before
        state = state + x["b"][t][..., None] * removed[..., None, :] + x["k"][t][..., None] * x["v"][t][..., None, :]
        out[t] = np.einsum("bhk,bhkv->bhv", x["r"][t], state)
        states.append(state)
    result = {"o": np.moveaxis(out, 0, 1), "final_state": states[-1]}
    if d_out is None:
        return result
    d_out = np.moveaxis(np.asarray(d_out, np.float64), 1, 0)
    d_state = zero.copy() if d_final is None else np.asarray(d_final, np.float64)
    grads = {name: np.zeros_like(value) for name, value in x.items()}
    for t in reversed(range(length)):
        before = states[t] * keep[t][:, None, None, None]
        decay = np.exp(x["log_w"][t])[..., None]
        grads["r"][t] = np.einsum("bhkv,bhv->bhk", states[t + 1], d_out[t])
        d_state = d_state + x["r"][t][..., None] * d_out[t][..., None, :]
        removed = np.einsum("bhk,bhkv->bhv", x["a"][t], before)
        d_removed = np.einsum("bhk,bhkv->bhv", x["b"][t], d_state)
        grads["k"][t] = np.einsum("bhkv,bhv->bhk", d_state, x["v"][t])
        grads["v"][t] = np.einsum("bhkv,bhk->bhv", d_state, x["k"][t])
        grads["b"][t] = np.einsum("bhkv,bhv->bhk", d_state, removed)
        grads["a"][t] = np.einsum("bhkv,bhv->bhk", before, d_removed)
        grads["log_w"][t] = np.sum(d_state * decay * before, axis=-1)
        d_state = (decay * d_state + x["a"][t][..., None] * d_removed[..., None, :]) * keep[t][:, None, None, None]
    result.update({f"d_{name}": np.moveaxis(grads[name], 0, 1) for name in inputs})
    result["d_initial_state"] = d_state
    return result


def value_and_gradients(
    operation: Callable[..., Any],
    inputs: dict[str, Any],
    initial_state: Any,
    d_out: Any,
    d_final: Any,
    **options: Any,
) -> dict[str, jax.Array]:
    """What `token_loop` returns, from a public recurrence and JAX's differentiation."""

    def run(inputs: dict[str, Any], state: Any) -> tuple[jax.Array, jax.Array]:
        return operation(**inputs, initial_state=state, **options)

    (out, final_state), pull = jax.vjp(run, {n: jnp.asarray(x) for n, x in inputs.items()}, jnp.asarray(initial_state))
    grads, d_initial = pull((jnp.asarray(d_out, out.dtype), jnp.asarray(d_final, final_state.dtype)))
    result = {"o": out, "final_state": final_state, "d_initial_state": d_initial}
    return result | {f"d_{name}": grad for name, grad in grads.items()}


def gated_delta_inputs(
    batch: int,
    length: int,
    groups: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    seed: int = 0,
    log_g_range: tuple[float, float] = (-100.0, -1e-7),
    key_scale: float = 1.0,
    beta: float | None = None,
) -> _Arrays:
    """Random float32 arguments of `gdn`: unit keys times key_scale, queries times K^-0.5, decays even in their log."""
    rng = np.random.default_rng(seed)

    def unit(shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    low, high = (-np.log(-x) if x < 0 else np.inf for x in log_g_range)
    shape = (batch, length, heads)
    inputs = {
        "q": unit((batch, length, groups, key_size)) * key_size**-0.5,
        "k": unit((batch, length, groups, key_size)) * key_scale,
        "v": rng.standard_normal((*shape, value_size)),
        "log_g": -np.exp(-rng.uniform(low, high, shape)) if low < high else np.full(shape, log_g_range[0]),
        "beta": rng.uniform(0.0, 1.0, shape) if beta is None else np.full(shape, beta),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def gated_delta_loop(
    inputs: dict[str, Any],
    initial_state: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
    d_out: np.ndarray | None = None,
    d_final: np.ndarray | None = None,
) -> _Arrays:
    """`gdn` and its adjoint in float64, one token after the other; takes and returns what `token_loop` does."""
    x = {name: np.moveaxis(np.asarray(value, np.float64), 1, 0) for name, value in inputs.items()}
    length, batch, heads, value_size = x["v"].shape
    groups, key_size = x["q"].shape[2:]
    q, k = (np.repeat(x[name], heads // groups, axis=2) for name in ("q", "k"))
    beta, decay = x["beta"][..., None], np.exp(x["log_g"])[..., None, None]
    zero = np.zeros((batch, heads, key_size, value_size))
    keep = np.ones((length, batch, 1, 1, 1))
    if segment_ids is not None:
        keep[1:, :, 0, 0, 0] = (segment_ids[:, 1:] == segment_ids[:, :-1]).T
    states = [zero if initial_state is None else np.asarray(initial_state, np.float64)]
    out, missing = np.empty(x["v"].shape), np.empty(x["v"].shape)
    for t in range(length):
        state = states[-1] * keep[t] * decay[t]
        missing[t] = x["v"][t] - np.einsum("bhk,bhkv->bhv", k[t], state)
        state = state + k[t][..., None] * (beta[t] * missing[t])[..., None, :]
        out[t] = np.einsum("bhk,bhkv->bhv", q[t], state)
        states.append(state)
    result = {"o": np.moveaxis(out, 0, 1), "final_state": states[-1]}
    if d_out is None:
        return result
    d_out = np.moveaxis(np.asarray(d_out, np.float64), 1, 0)
    d_state = zero.copy() if d_final is None else np.asarray(d_final, np.float64)
    d_q, d_k, grads = np.zeros_like(q), np.zeros_like(k), {n: np.zeros_like(x[n]) for n in ("v", "log_g", "beta")}
    for t in reversed(range(length)):
        decayed = states[t] * keep[t] * decay[t]
        d_q[t] = np.einsum("bhkv,bhv->bhk", states[t + 1], d_out[t])
        d_state = d_state + q[t][..., None] * d_out[t][..., None, :]
        d_written = np.einsum("bhkv,bhk->bhv", d_state, k[t])
        d_missing = beta[t] * d_written
        grads["v"][t], grads["beta"][t] = d_missing, np.sum(d_written * missing[t], axis=-1)
        d_k[t] = np.einsum("bhkv,bhv->bhk", d_state, beta[t] * missing[t])
        d_k[t] -= np.einsum("bhkv,bhv->bhk", decayed, d_missing)
        d_decayed = d_state - k[t][..., None] * d_missing[..., None, :]
        grads["log_g"][t] = np.sum(d_decayed * decayed, axis=(-2, -1))
        d_state = d_decayed * decay[t] * keep[t]
    grads["q"], grads["k"] = (g.reshape(length, batch, groups, heads // groups, key_size).sum(3) for g in (d_q, d_k))
    result.update({f"d_{name}": np.moveaxis(grads[name], 0, 1) for name in inputs})
    result["d_initial_state"] = d_state
    return result


def attention_formula(q: Any, k: Any, v: Any, segment_ids: np.ndarray) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v of q [B, T, H, K], a key head for every query head, all scores at once."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    seen = np.tril(np.ones((q.shape[1],) * 2, bool)) & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)
