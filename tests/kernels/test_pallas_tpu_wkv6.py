"""wkv6's TPU kernels in interpret mode against a float64 loop over tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.testing import TOLERANCE, recurrence_inputs, rms_ratio, token_loop, value_and_gradients
from pallas_kernels.wkv6 import pallas_tpu, wkv6


@functools.partial(jax.jit, static_argnames=("chunk_size", "interpret"))
def run(inputs, state, d_out, d_final, segment_ids, chunk_size=None, interpret=None):
    """One compilation for each shape: tests that differ in numbers alone share it."""

    def operation(r, log_w, k, v, initial_state):
        return pallas_tpu.wkv6_pallas_tpu(r, log_w, k, v, initial_state, segment_ids, chunk_size, interpret=interpret)

    return value_and_gradients(operation, inputs, state, d_out, d_final)


def check(
    inputs: dict[str, Any],
    tolerance: float,
    segment_ids: np.ndarray | None = None,
    state_scale: float = 1.0,
    **options: Any,
) -> None:
    """Outputs, final state and all gradients, with random cotangents and a random initial state."""
    rng = np.random.default_rng(7)
    batch, length, heads, key_size = inputs["r"].shape
    value_size = inputs["v"].shape[-1]
    state, d_final = rng.standard_normal((2, batch, heads, key_size, value_size)).astype(np.float32)
    state = state * np.float32(state_scale)
    d_out = jnp.asarray(rng.standard_normal((batch, length, heads, value_size)), inputs["v"].dtype)
    want = token_loop(inputs, state, segment_ids, np.asarray(d_out, np.float64), d_final)
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    got = run(inputs, state, d_out, d_final, ids, **options)
    assert set(got) == set(want)
    errors = {name: rms_ratio(got[name], want[name]) for name in want}
    assert max(errors.values()) < tolerance, errors
    assert got["o"].dtype == inputs["v"].dtype
    assert got["final_state"].dtype == jnp.float32
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in inputs.items())


def random_segments(batch: int, length: int, seed: int = 3) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).random((batch, length)) < 0.06, axis=1)


# One shape for all that only needs other numbers: two heads, four chunks of 32, the last with four tokens.
LENGTH, KEY_SIZE, VALUE_SIZE, CHUNK_SIZE = 100, 64, 128, 32


def usual_inputs(**options: Any) -> dict[str, np.ndarray]:
    return recurrence_inputs("wkv6", 1, LENGTH, 2, KEY_SIZE, VALUE_SIZE, **options)


def rounded(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """In bfloat16 for the loop too; log_w stays float32."""
    return {name: jnp.asarray(x, jnp.float32 if name == "log_w" else jnp.bfloat16) for name, x in inputs.items()}


def test_float32():
    check(usual_inputs(), TOLERANCE["float32"], chunk_size=CHUNK_SIZE)


SEGMENTS = {"random": random_segments(1, LENGTH), "every_token": np.arange(LENGTH)[None]}


@pytest.mark.parametrize("segments", SEGMENTS)
def test_float32_segments(segments):
    check(usual_inputs(), TOLERANCE["float32"], SEGMENTS[segments], chunk_size=CHUNK_SIZE)


BFLOAT16: dict[str, dict[str, Any]] = {
    "usual_decay": {},
    "strongest_decay": {"log_w_range": (-5.0, -5.0)},
    "documented_range_of_decay": {"log_w_range": (-10.0, -10.0)},
    "hardly_any_decay": {"log_w_range": (-1e-3, -1e-3)},
}


@pytest.mark.parametrize("decay", BFLOAT16)
def test_bfloat16(decay):
    """Two chunks of the default size, with segments."""
    inputs = rounded(recurrence_inputs("wkv6", 1, 200, 1, 128, 64, **BFLOAT16[decay]))
    check(inputs, TOLERANCE["bfloat16"], random_segments(1, 200))


@pytest.mark.parametrize(("length", "chunk_size"), [(1, None), (17, 16), (31, 32), (65, 64), (130, 128)])
def test_lengths_and_chunk_sizes(length, chunk_size):
    inputs = recurrence_inputs("wkv6", 2 if length == 1 else 1, length, 1, 64, 64)
    check(inputs, TOLERANCE["float32"], random_segments(inputs["r"].shape[0], length), chunk_size=chunk_size)


STRESS: dict[str, dict[str, Any]] = {
    "strongest_decay": {"log_w_range": (-5.0, -5.0)},
    "documented_range_of_decay": {"log_w_range": (-10.0, -10.0), "key_scale": 1e3},
    "documented_range_with_tiny_keys": {"log_w_range": (-10.0, -10.0), "key_scale": 1e-6},
    "strong_and_weak_decays": {"log_w_range": (-10.0, 0.0)},
    "hardly_any_decay": {"log_w_range": (-1e-6, -1e-6)},
    "no_decay": {"log_w_range": (0.0, 0.0)},
    "tiny_keys": {"key_scale": 1e-6},
    "large_keys": {"key_scale": 1e3},
}


@pytest.mark.parametrize("stress", STRESS)
def test_stress(stress):
    check(usual_inputs(**STRESS[stress]), TOLERANCE["float32_stress"], chunk_size=CHUNK_SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("log_w", [-5.0, -1e-6])
def test_16k_tokens(log_w):
    """Where a rounding error of the same sign in every chunk would add up."""
    inputs = recurrence_inputs("wkv6", 1, 16384, 1, 64, 64, log_w_range=(log_w, log_w))
    check(inputs, TOLERANCE["float32_stress"])


def test_all_zero_inputs():
    inputs = {name: np.zeros_like(x) for name, x in usual_inputs().items()}
    check(inputs, TOLERANCE["float32"], state_scale=0.0, chunk_size=CHUNK_SIZE)


def test_several_groups_of_heads(monkeypatch):
    """Three heads in groups of two: the last group is filled up."""
    monkeypatch.setattr(pallas_tpu, "MAX_HEADS", 2)
    assert pallas_tpu.head_groups(3, 64, 64) == (2, 4)
    check(recurrence_inputs("wkv6", 2, 30, 3, 64, 64), TOLERANCE["float32"], chunk_size=16)


@pytest.mark.parametrize(
    ("heads", "size", "groups"),
    [(1, 64, (1, 1)), (7, 64, (7, 7)), (9, 64, (6, 12)), (9, 128, (5, 10)), (16, 128, (8, 16)), (28, 128, (7, 28))],
)
def test_head_groups(heads, size, groups):
    assert pallas_tpu.head_groups(heads, size, size) == groups


def test_whole_equals_parts_and_segments_equal_sequences():
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv6", 1, 128, 1, 64, 64).items()}
    zero = jnp.zeros((1, 1, 64, 64))
    operation = jax.jit(functools.partial(wkv6, implementation="pallas_tpu", chunk_size=32))
    out, state = operation(**inputs, initial_state=zero)
    parts = [{n: x[:, part] for n, x in inputs.items()} for part in (slice(64), slice(64, None))]
    first, middle = operation(**parts[0], initial_state=zero)
    second, last = operation(**parts[1], initial_state=middle)
    assert rms_ratio(jnp.concatenate([first, second], axis=1), out) < TOLERANCE["float32"]
    assert rms_ratio(last, state) < TOLERANCE["float32"]
    ids = jnp.where(jnp.arange(128) < 64, 5, 2)[None]
    out, state = operation(**inputs, initial_state=zero, segment_ids=ids)
    alone, last = operation(**parts[1], initial_state=zero)
    assert rms_ratio(out, jnp.concatenate([first, alone], axis=1)) < TOLERANCE["float32"]
    assert rms_ratio(state, last) < TOLERANCE["float32"]


def test_permuting_batch_and_heads_permutes_the_result():
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv6", 3, 20, 4, 64, 64).items()}
    batch, heads = jnp.array([2, 0, 1]), jnp.array([3, 1, 0, 2])
    operation = jax.jit(functools.partial(wkv6, implementation="pallas_tpu", chunk_size=16))
    out, state = operation(**inputs)
    out_permuted, state_permuted = operation(**{n: x[batch][:, :, heads] for n, x in inputs.items()})
    np.testing.assert_array_equal(out_permuted, out[batch][:, :, heads])
    np.testing.assert_array_equal(state_permuted, state[batch][:, heads])


def test_backward_keeps_no_per_token_states():
    """What forward hands to backward: the inputs and one state a chunk."""
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv6", 1, 512, 1, 64, 64).items()}
    shapes = jax.eval_shape(lambda inputs: jax.vjp(lambda x: wkv6(**x, implementation="pallas_tpu"), inputs)[1], inputs)
    kept = sum(x.size for x in jax.tree.leaves(shapes))
    inputs_size = sum(x.size for x in inputs.values())
    assert inputs_size < kept <= inputs_size + (512 // pallas_tpu.DEFAULT_CHUNK_SIZE + 2) * 64 * 64


@pytest.mark.parametrize("races", [False, True], ids=["bounds", "races"])
def test_memory(races, capfd):
    """Reads out of bounds raise, memory nobody wrote is NaN; with two threads for the parallel axes, no races."""
    options = {"detect_races": True, "num_cores_or_threads": 2} if races else {"out_of_bounds_reads": "raise"}
    params = pltpu.InterpretParams(uninitialized_memory="nan", **options)
    inputs = recurrence_inputs("wkv6", 2, 40, 1, 64, 64)
    check(inputs, TOLERANCE["float32"], random_segments(2, 40), chunk_size=16, interpret=params)
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err


def test_what_the_kernels_cannot_do_is_refused():
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv6", 1, 8, 2, 16, 16).items()}
    with pytest.raises(NotImplementedError, match="64 or 128"):
        wkv6(**inputs, implementation="pallas_tpu")
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv6", 1, 8, 2, 64, 64).items()}
    with pytest.raises(NotImplementedError, match="chunk_size=256"):
        wkv6(**inputs, implementation="pallas_tpu", chunk_size=256)
