"""gdn, every implementation that runs on a CPU, against a float64 loop over tokens: outputs, states, all gradients."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from transformers.models.qwen3_5 import modeling_qwen3_5

from pallas_kernels.context_parallel import over_shards
from pallas_kernels.gdn import gdn, gdn_step
from pallas_kernels.sharded import per_shard
from pallas_kernels.testing import (
    TOLERANCE,
    gated_delta_inputs,
    gated_delta_loop,
    rms_ratio,
    value_and_gradients,
)

every_implementation = pytest.mark.parametrize("implementation", ["reference", "chunked"])


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def run(inputs, state, d_out, d_final, ids, implementation="chunked", chunk_size=None):
    """One compilation for each shape: tests that differ in numbers alone share it."""
    options = {"implementation": implementation, "chunk_size": chunk_size}
    return value_and_gradients(gdn, inputs, state, d_out, d_final, segment_ids=ids, **options)


def check(inputs: dict[str, Any], tolerance: float, segment_ids: np.ndarray | None = None, **options: Any) -> None:
    """Outputs, final state and gradients of one call, with random cotangents and a random initial state."""
    rng = np.random.default_rng(7)
    batch, _, heads, value_size = inputs["v"].shape
    shape = (batch, heads, inputs["q"].shape[-1], value_size)
    state, d_final = rng.standard_normal((2, *shape)).astype(np.float32)
    d_out = jnp.asarray(rng.standard_normal(inputs["v"].shape), inputs["v"].dtype)
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    want = gated_delta_loop(inputs, state, segment_ids, np.asarray(d_out, np.float64), d_final)
    got = run(inputs, state, d_out, d_final, ids, **options)
    assert set(got) == set(want)
    # What decays to less than a float32 is nothing.
    want = {name: np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0, x) for name, x in want.items()}
    errors = {name: rms_ratio(got[name], want[name]) for name in want}
    assert max(errors.values()) < tolerance, errors
    assert got["o"].dtype == inputs["v"].dtype
    assert got["final_state"].dtype == jnp.float32
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in inputs.items())


def random_segments(batch: int, length: int, seed: int = 3) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).random((batch, length)) < 0.06, axis=1)


def rounded(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """q, k, v in bfloat16; decays and beta stay float32."""
    return {name: jnp.asarray(x, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, x in inputs.items()}


@every_implementation
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
def test_float32(implementation, segments):
    """A length that no chunk divides, two heads for each of two key heads."""
    inputs = gated_delta_inputs(2, 70, 2, 4, 16, 24)
    ids = random_segments(2, 70) if segments else None
    check(inputs, TOLERANCE["float32"], ids, implementation=implementation)


def test_one_token():
    check(gated_delta_inputs(2, 1, 1, 2, 8, 8), TOLERANCE["float32"])


def test_bfloat16():
    """Inputs rounded to bfloat16 for the loop too."""
    check(rounded(gated_delta_inputs(1, 70, 1, 2, 128, 128)), TOLERANCE["bfloat16"], random_segments(1, 70))


@pytest.mark.parametrize("chunk_size", [1, 128])
def test_chunk_sizes(chunk_size):
    inputs = gated_delta_inputs(1, 150, 1, 2, 16, 16)
    check(inputs, TOLERANCE["float32"], random_segments(1, 150), chunk_size=chunk_size)


STRESS: dict[str, dict[str, Any]] = {
    "strongest_decay": {"log_g_range": (-100.0, -100.0)},
    "strong_decay": {"log_g_range": (-20.0, -20.0)},
    "usual_decay": {"log_g_range": (-1.0, -1e-3)},
    "hardly_any_decay": {"log_g_range": (-1e-7, -1e-7)},
    "no_decay": {"log_g_range": (0.0, 0.0)},
    "tiny_keys": {"key_scale": 1e-6},
    "beta_0": {"beta": 0.0},
    "beta_1": {"beta": 1.0},
    "beta_2": {"beta": 2.0},
}


def stress_inputs(**options: Any) -> dict[str, np.ndarray]:
    return gated_delta_inputs(1, 257, 1, 2, 32, 32, **options)


@pytest.mark.parametrize("stress", STRESS)
def test_stress(stress):
    check(stress_inputs(**STRESS[stress]), TOLERANCE["float32_stress"])


def test_a_weak_decay_after_strong_ones():
    """Sums that reach -3,000 in a chunk lose nothing of the decays of a thousandth that follow in it."""
    inputs = stress_inputs(log_g_range=(-1e-2, -1e-3))
    inputs["log_g"][:, np.arange(257) % 32 < 30] -= 97.3
    check(inputs, TOLERANCE["float32"])


def test_the_same_key_over_and_over():
    """One key, replaced in full by every token: where powers of A would grow like binomials."""
    inputs = stress_inputs(log_g_range=(-1e-6, -1e-6), beta=1.0)
    inputs["k"] = np.broadcast_to(inputs["k"][:, :1], inputs["k"].shape).copy()
    check(inputs, TOLERANCE["float32_stress"])


def test_all_zero_inputs():
    check({name: np.zeros_like(x) for name, x in stress_inputs().items()}, TOLERANCE["float32"])


def test_every_token_its_own_segment():
    check(gated_delta_inputs(2, 70, 2, 4, 16, 24), TOLERANCE["float32"], np.tile(np.arange(70), (2, 1)))


@pytest.mark.parametrize("log_g", [-0.6066, -1e-7])
def test_16k_tokens(log_g):
    """Where a rounding error of the same sign in every chunk would add up."""
    inputs = gated_delta_inputs(1, 16384, 1, 1, 8, 8, log_g_range=(log_g, log_g))
    check(inputs, TOLERANCE["float32_stress"])


@pytest.mark.parametrize("function", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_equals_transformers(function):
    inputs = gated_delta_inputs(2, 100, 2, 4, 32, 32, log_g_range=(-3.0, -1e-3))
    state = np.random.default_rng(1).standard_normal((2, 4, 32, 32)).astype(np.float32)
    # transformers scales the queries itself.
    scaled = inputs | {"q": inputs["q"] * np.float32(32**0.5)}
    arguments = (torch.from_numpy(scaled[name]) for name in ("q", "k", "v", "log_g", "beta"))
    reference = getattr(modeling_qwen3_5, function)
    want, last = reference(*arguments, initial_state=torch.from_numpy(state), output_final_state=True)
    out, final = jax.jit(gdn)(**inputs, initial_state=jnp.asarray(state))
    assert rms_ratio(out, want.numpy()) < TOLERANCE["float32"]
    assert rms_ratio(final, last.numpy()) < TOLERANCE["float32"]


def test_whole_equals_parts():
    """Two calls with the state carried over, cut off a chunk's edge."""
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(2, 80, 1, 2, 16, 16).items()}
    op = jax.jit(lambda inputs, state: gdn(**inputs, initial_state=state))
    zero = jnp.zeros((2, 2, 16, 16))
    out, state = op(inputs, zero)
    first, middle = op({n: x[:, :40] for n, x in inputs.items()}, zero)
    second, last = op({n: x[:, 40:] for n, x in inputs.items()}, middle)
    assert rms_ratio(jnp.concatenate([first, second], axis=1), out) < TOLERANCE["float32"]
    assert rms_ratio(last, state) < TOLERANCE["float32"]


def test_permuting_batch_and_heads_permutes_the_result():
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(3, 15, 4, 4, 16, 16).items()}
    batch, heads = jnp.array([2, 0, 1]), jnp.array([3, 1, 0, 2])
    op = jax.jit(lambda inputs: gdn(**inputs))
    out, state = op(inputs)
    out_permuted, state_permuted = op({n: x[batch][:, :, heads] for n, x in inputs.items()})
    np.testing.assert_array_equal(out_permuted, out[batch][:, :, heads])
    np.testing.assert_array_equal(state_permuted, state[batch][:, heads])


def test_backward_keeps_no_per_token_states_and_no_copies_of_keys():
    """What forward hands to backward: the inputs as they came and one state a chunk."""
    length, size = 512, 16
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(1, length, 1, 4, 64, 64).items()}
    shapes = jax.eval_shape(lambda inputs: jax.vjp(lambda x: gdn(**x, chunk_size=size), inputs)[1], inputs)
    kept = sum(x.size for x in jax.tree.leaves(shapes))
    inputs_size = sum(x.size for x in inputs.values())
    assert inputs_size < kept <= inputs_size + (length // size + 2) * 4 * 64 * 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_the_whole(dtype):
    """Token by token: outputs and states of the float64 loop."""
    inputs = gated_delta_inputs(3, 29, 2, 4, 16, 24)
    arrays = {n: jnp.asarray(x, dtype if n in "qkv" else jnp.float32) for n, x in inputs.items()}
    start = np.random.default_rng(7).standard_normal((3, 4, 16, 24)).astype(np.float32)
    want = gated_delta_loop({n: np.asarray(x, np.float64) for n, x in arrays.items()}, start)
    step = jax.jit(gdn_step)
    state, outs = jnp.asarray(start), []
    for t in range(29):
        out, state = step(*(x[:, t] for x in arrays.values()), state)
        assert out.dtype == dtype and state.dtype == jnp.float32
        outs.append(out)
    assert rms_ratio(jnp.stack(outs, axis=1), want["o"]) < TOLERANCE[dtype]
    assert rms_ratio(state, want["final_state"]) < TOLERANCE["float32"]


def test_shards_over_devices_are_the_whole():
    """Heads over the tensor axis, shards of the sequence over the context axis; shards are no whole chunks.

    In one row the second segment begins inside a shard and ends in another, in the other there is none.
    """
    length = 20
    ids = np.ones((2, length), np.int32)
    ids[0, 7:], ids[0, length - 2 :] = 2, 3
    segments = jnp.asarray(ids)
    inputs = gated_delta_inputs(2, length, 2, 4, 8, 16, log_g_range=(-3.0, -1e-3))
    rng = np.random.default_rng(1)
    state, weights = (jnp.asarray(rng.standard_normal((2, 4, 8, 16)), jnp.float32) for _ in range(2))

    def op(q, k, v, log_g, beta, state, ids, implementation="chunked"):
        return gdn(q, k, v, log_g, beta, initial_state=state, segment_ids=ids, implementation=implementation)

    def loss(op, *arrays):
        out, final = op(*arrays, segments)
        return jnp.sum(out * jnp.cos(out)) + jnp.sum(final * weights), (out, final)

    arrays = (*(jnp.asarray(x) for x in inputs.values()), state)
    whole = functools.partial(op, implementation="reference")
    expected = jax.jit(jax.grad(functools.partial(loss, whole), tuple(range(6)), has_aux=True))(*arrays)
    split = per_shard(op, ("sequence",) * 5 + ("state", "rows"), ("sequence", "state"), over_shards(values=2))
    devices = np.array(jax.devices()[:8]).reshape(1, 1, 2, 4)
    mesh = Mesh(devices, ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradients = jax.jit(jax.grad(functools.partial(loss, split), tuple(range(6)), has_aux=True))(
            *jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
        )
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert rms_ratio(got, want) < 2e-6


@pytest.fixture
def no_shape_annotations() -> Iterator[None]:
    """Turns the annotations' checks off, so that the function's own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_bad_arguments_are_refused(no_shape_annotations):
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(1, 8, 2, 4, 16, 16).items()}
    with pytest.raises(ValueError, match=r"'chunked'.*'reference'"):
        gdn(**inputs, implementation="fastest")
    with pytest.raises(ValueError, match=r"chunk_size=12\b.*\b16, 32 or 64\b"):
        gdn(**inputs, chunk_size=12)
    with pytest.raises(ValueError, match=r"k of shape \(1, 5, 2, 16\)"):
        gdn(**(inputs | {"k": inputs["k"][:, :5]}))
    with pytest.raises(ValueError, match=r"\bv\b.*\(1, 8, 3, 16\).*\b2 key heads\b"):
        gdn(**(inputs | {"v": inputs["v"][:, :, :3]}))
    with pytest.raises(ValueError, match=r"\blog_g\b.*\(1, 8, 4, 1\).*\(1, 8, 4\)"):
        gdn(**(inputs | {"log_g": inputs["log_g"][..., None]}))
    with pytest.raises(ValueError, match=r"initial_state\b.*\(1, 2, 16, 16\).*\(1, 4, 16, 16\)"):
        gdn(**inputs, initial_state=jnp.zeros((1, 2, 16, 16)))
    with pytest.raises(ValueError, match=r"\(1, 0, 2, 16\).*\bT >= 1"):
        gdn(**{n: x[:, :0] for n, x in inputs.items()})
    tokens = {n: x[:, 0] for n, x in inputs.items()}
    with pytest.raises(ValueError, match=r"\(1, 8, 2, 16\).*\[B,G,K\]"):
        gdn_step(**inputs, state=jnp.zeros((1, 4, 16, 16)))
    with pytest.raises(ValueError, match=r"\bstate\b.*\(1, 2, 16, 16\).*\(1, 4, 16, 16\)"):
        gdn_step(**tokens, state=jnp.zeros((1, 2, 16, 16)))
