"""The TPU kernels of gdn, interpreted on a CPU, against the float64 loop over tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gdn import gdn, pallas_tpu
from pallas_kernels.shared import tpu
from pallas_kernels.testing import TOLERANCE, gated_delta_inputs, gated_delta_loop, rms_ratio, value_and_gradients


@functools.partial(jax.jit, static_argnames=("chunk_size", "interpret"))
def run(inputs, state, d_out, d_final, segment_ids, chunk_size=None, interpret=None):
    """One compilation for each shape: tests that differ in numbers alone share it."""

    def operation(q, k, v, log_g, beta, initial_state):
        return pallas_tpu.gdn_pallas_tpu(
            q, k, v, log_g, beta, initial_state, segment_ids, chunk_size, interpret=interpret
        )

    return value_and_gradients(operation, inputs, state, d_out, d_final)


def check(inputs: dict[str, Any], tolerance: float, segment_ids: np.ndarray | None = None, **options: Any) -> None:
    """Outputs, final state and all gradients, with random cotangents and a random initial state."""
    rng = np.random.default_rng(7)
    batch, _, heads, value_size = inputs["v"].shape
    state, d_final = rng.standard_normal((2, batch, heads, inputs["q"].shape[-1], value_size)).astype(np.float32)
    d_out = jnp.asarray(rng.standard_normal(inputs["v"].shape), inputs["v"].dtype)
    want = gated_delta_loop(inputs, state, segment_ids, np.asarray(d_out, np.float64), d_final)
    inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    got = run(inputs, state, d_out, d_final, ids, **options)
    assert set(got) == set(want)
    # What decays to less than a float32 is nothing.
    want = {name: np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0, x) for name, x in want.items()}
    errors = {name: rms_ratio(got[name], want[name]) for name in want}
    assert max(errors.values()) < tolerance, errors
    assert got["o"].dtype == inputs["v"].dtype
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in inputs.items())


def random_segments(batch: int, length: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(3).random((batch, length)) < 0.06, axis=1)


def usual_inputs(**options: Any) -> dict[str, np.ndarray]:
    """One shape for all that only needs other numbers: two heads on one key head, two chunks, the second half full."""
    return gated_delta_inputs(1, 50, 1, 2, 64, 128, **options)


usual = functools.partial(check, chunk_size=32)


@pytest.mark.parametrize("segments", ["random", "each"])
def test_float32(segments):
    """Where every token is its own segment too."""
    usual(usual_inputs(), TOLERANCE["float32"], random_segments(1, 50) if segments == "random" else np.arange(50)[None])


BFLOAT16: dict[str, dict[str, Any]] = {
    "usual_decay": {"log_g_range": (-1.0, -1e-3)},
    "any_decay": {},
    "strong_decay": {"log_g_range": (-20.0, -20.0)},
    "hardly_any_decay": {"log_g_range": (-1e-7, -1e-7)},
}


@pytest.mark.parametrize("decay", BFLOAT16)
def test_bfloat16(decay):
    """Inputs rounded to bfloat16 for the loop too, chunks of the default size."""
    inputs = gated_delta_inputs(1, 200, 1, 1, 128, 64, **BFLOAT16[decay])
    rounded = {name: jnp.asarray(x, jnp.bfloat16 if name in "qkv" else jnp.float32) for name, x in inputs.items()}
    check(rounded, TOLERANCE["bfloat16"], random_segments(1, 200))


STRESS: dict[str, dict[str, Any]] = {
    "strongest_decay": {"log_g_range": (-100.0, -100.0)},
    "strong_decay": {"log_g_range": (-20.0, -20.0)},
    "hardly_any_decay": {"log_g_range": (-1e-7, -1e-7)},
    "no_decay": {"log_g_range": (0.0, 0.0)},
    "tiny_keys": {"key_scale": 1e-6},
    "beta_0": {"beta": 0.0},
    "beta_1": {"beta": 1.0},
    "beta_2": {"beta": 2.0},
}


@pytest.mark.parametrize("stress", STRESS)
def test_stress(stress):
    usual(usual_inputs(**STRESS[stress]), TOLERANCE["float32_stress"], np.zeros((1, 50), int))


def test_the_same_key_over_and_over():
    """One key, replaced in full by every token: where powers of N would grow like binomials."""
    inputs = usual_inputs(log_g_range=(-1e-6, -1e-6), beta=1.0)
    inputs["k"] = np.broadcast_to(inputs["k"][:, :1], inputs["k"].shape).copy()
    usual(inputs, TOLERANCE["float32_stress"], np.zeros((1, 50), int))


@pytest.mark.slow
@pytest.mark.parametrize("log_g", [-0.6066, -1e-7])
def test_16k_tokens(log_g):
    """Where a rounding error of the same sign in every chunk would add up."""
    inputs = gated_delta_inputs(1, 16384, 1, 1, 64, 64, log_g_range=(log_g, log_g))
    check(inputs, TOLERANCE["float32_stress"])


def test_several_groups_of_heads(monkeypatch):
    """Three heads, two a step: the last step is filled up."""
    monkeypatch.setattr(pallas_tpu, "MAX_HEADS", 8)
    monkeypatch.setattr(pallas_tpu, "MAX_CHANNELS", 64)
    assert pallas_tpu.head_groups(3, 1, 64, 64, 2) == (2, 4)
    check(gated_delta_inputs(1, 20, 3, 3, 64, 64), TOLERANCE["float32"], chunk_size=16)


@pytest.mark.parametrize(
    ("groups", "heads_of_one", "size", "chosen"),
    [
        (1, 1, 64, (1, 1)),
        (16, 1, 128, (16, 16)),
        (28, 1, 128, (14, 28)),
        (25, 1, 64, (14, 28)),
        (16, 2, 128, (8, 16)),
        (16, 3, 128, (4, 16)),
    ],
)
def test_head_groups(groups, heads_of_one, size, chosen):
    assert pallas_tpu.head_groups(groups, heads_of_one, size, size) == chosen


@pytest.mark.parametrize(("key_size", "value_size"), [(64, 64), (128, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("heads_of_one", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("most", [4, pallas_tpu.MAX_HEADS])
def test_a_step_fills_lanes_or_has_all_heads(key_size, value_size, heads_of_one, most):
    """Few heads a step, as in float32, and head counts that no power of two divides."""
    for groups in (1, 5, 24, 25, 40):
        step, padded = pallas_tpu.head_groups(groups, heads_of_one, key_size, value_size, max(most, heads_of_one))
        assert padded >= groups and padded % step == 0
        if step < padded or padded > groups:
            assert step * key_size % tpu.LANES == step * heads_of_one * value_size % tpu.LANES == 0
            assert step * heads_of_one <= max(most, 2 * heads_of_one)
        else:
            few = groups * heads_of_one * max(key_size, value_size) <= pallas_tpu.MAX_CHANNELS
            assert few or groups * heads_of_one <= max(most, 2 * heads_of_one)


def test_backward_keeps_no_per_token_states():
    """What forward hands to backward: the inputs and one state a chunk."""
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(1, 512, 1, 2, 64, 64).items()}
    shapes = jax.eval_shape(lambda inputs: jax.vjp(lambda x: gdn(**x, implementation="pallas_tpu"), inputs)[1], inputs)
    kept = sum(x.size for x in jax.tree.leaves(shapes))
    inputs_size = sum(x.size for x in inputs.values())
    assert inputs_size < kept <= inputs_size + (512 // pallas_tpu.DEFAULT_CHUNK_SIZE + 1) * 2 * 64 * 64


def test_memory(capfd):
    """Reads out of bounds raise, memory nobody wrote is NaN; with two threads for the parallel axes, no races."""
    params = pltpu.InterpretParams(
        uninitialized_memory="nan", out_of_bounds_reads="raise", detect_races=True, num_cores_or_threads=2
    )
    inputs = gated_delta_inputs(2, 20, 1, 1, 64, 64)
    check(inputs, TOLERANCE["float32"], random_segments(2, 20), chunk_size=16, interpret=params)
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err


def test_what_the_kernels_cannot_do_is_refused():
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(1, 8, 1, 2, 16, 16).items()}
    with pytest.raises(NotImplementedError, match="64 or 128"):
        gdn(**inputs, implementation="pallas_tpu")
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(1, 8, 1, 2, 64, 64).items()}
    with pytest.raises(NotImplementedError, match="chunk_size=256"):
        gdn(**inputs, implementation="pallas_tpu", chunk_size=256)
    inputs = {n: jnp.asarray(x) for n, x in gated_delta_inputs(1, 8, 1, 17, 64, 64).items()}
    with pytest.raises(NotImplementedError, match=r"\b17 heads\b.*\b16;"):
        gdn(**inputs, implementation="pallas_tpu")
