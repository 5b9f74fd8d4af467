"""wkv7's TPU kernels in interpret mode against a float64 loop over tokens, and what reads the TPU compiler's output."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bench, static_cost
from pallas_kernels.measure import static_cost_tpu, static_profile
from pallas_kernels.testing import TOLERANCE, recurrence_inputs, rms_ratio, token_loop, value_and_gradients
from pallas_kernels.wkv7 import pallas_tpu, wkv7
from pallas_kernels.wkv7.api import IMPLEMENTATIONS


@functools.partial(jax.jit, static_argnames=("chunk_size", "interpret"))
def run(inputs, state, d_out, d_final, segment_ids, chunk_size=None, interpret=None):
    """One compilation for each shape: tests that differ in numbers alone share it."""

    def operation(r, log_w, k, v, a, b, initial_state):
        return pallas_tpu.wkv7_pallas_tpu(
            r, log_w, k, v, a, b, initial_state, segment_ids, chunk_size, interpret=interpret
        )

    return value_and_gradients(operation, inputs, state, d_out, d_final)


def check(
    inputs: dict[str, Any],
    tolerance: float,
    segment_ids: np.ndarray | None = None,
    state_scale: float = 1.0,
    **options: Any,
) -> dict[str, jax.Array]:
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
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in inputs.items())
    return got


def random_segments(batch: int, length: int, seed: int = 3) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).random((batch, length)) < 0.06, axis=1)


# One shape for all that only needs other numbers: two heads, two chunks of 64 paired, the second half full.
LENGTH, KEY_SIZE, VALUE_SIZE = 100, 64, 128


def usual_inputs(**options: Any) -> dict[str, np.ndarray]:
    return recurrence_inputs("wkv7", 1, LENGTH, 2, KEY_SIZE, VALUE_SIZE, **options)


def test_float32():
    check(usual_inputs(), TOLERANCE["float32"])


def test_float32_segments():
    check(usual_inputs(), TOLERANCE["float32"], random_segments(1, LENGTH))


def test_every_token_its_own_segment():
    check(usual_inputs(), TOLERANCE["float32"], np.arange(LENGTH)[None])


BFLOAT16: dict[str, dict[str, Any]] = {
    "usual_decay": {},
    "strongest_decay": {"log_w_range": (-0.6066, -0.6066)},
    "documented_range_of_decay": {"log_w_range": (-1.8, -1.8)},
    "hardly_any_decay": {"log_w_range": (-1e-3, -1e-3)},
}


@pytest.mark.parametrize("decay", BFLOAT16)
def test_bfloat16(decay):
    """Inputs rounded to bfloat16 for the loop too; log_w stays float32."""
    inputs = recurrence_inputs("wkv7", 1, 200, 1, 128, 64, **BFLOAT16[decay])
    rounded = {name: jnp.asarray(x, jnp.float32 if name == "log_w" else jnp.bfloat16) for name, x in inputs.items()}
    check(rounded, TOLERANCE["bfloat16"], random_segments(1, 200))


@pytest.mark.parametrize(("length", "chunk_size"), [(1, None), (17, 16), (63, 64), (130, 128)])
def test_lengths_and_chunk_sizes(length, chunk_size):
    inputs = recurrence_inputs("wkv7", 2 if length == 1 else 1, length, 1, 64, 64)
    tolerance = TOLERANCE["float32" if chunk_size != 128 else "float32_stress"]
    check(inputs, tolerance, random_segments(inputs["r"].shape[0], length), chunk_size=chunk_size)


STRESS: dict[str, dict[str, Any]] = {
    "strongest_decay": {"log_w_range": (-0.6066, -0.6066)},
    "documented_range_of_decay": {"log_w_range": (-1.8, -1.8), "key_scale": 1e3},
    "hardly_any_decay": {"log_w_range": (-1e-6, -1e-6)},
    "no_decay": {"log_w_range": (0.0, 0.0)},
    "tiny_keys": {"key_scale": 1e-6},
    "large_keys": {"key_scale": 1e3},
    "iclr_0": {"iclr": 0.0},
    "iclr_1": {"iclr": 1.0},
}


@pytest.mark.parametrize("stress", STRESS)
def test_stress(stress):
    check(usual_inputs(**STRESS[stress]), TOLERANCE["float32_stress"])


@pytest.mark.slow
@pytest.mark.parametrize("log_w", [-0.6066, -1e-6])
def test_16k_tokens(log_w):
    """Where a rounding error of the same sign in every chunk would add up."""
    check(recurrence_inputs("wkv7", 1, 16384, 1, 64, 64, log_w_range=(log_w, log_w)), TOLERANCE["float32_stress"])


def test_the_same_removal_key_over_and_over():
    """One key, removed in full by every token: where powers of AB would grow like binomials."""
    inputs = usual_inputs(log_w_range=(-1e-6, -1e-6), iclr=1.0)
    for name in ("a", "b"):
        inputs[name] = np.broadcast_to(inputs[name][:, :1], inputs[name].shape).copy()
    check(inputs, TOLERANCE["float32_stress"])


def test_all_zero_inputs():
    check({name: np.zeros_like(x) for name, x in usual_inputs().items()}, TOLERANCE["float32"], state_scale=0.0)


def test_several_groups_of_heads(monkeypatch):
    """Three heads in groups of two: the last group is filled up."""
    monkeypatch.setattr(pallas_tpu, "MAX_HEADS", 8)
    monkeypatch.setattr(pallas_tpu, "MAX_CHANNELS", 64)
    assert pallas_tpu.head_groups(3, 64, 64, 2) == (2, 4)
    check(recurrence_inputs("wkv7", 2, 30, 3, 64, 64), TOLERANCE["float32"], chunk_size=16)


@pytest.mark.parametrize(
    ("heads", "size", "groups"),
    [
        (1, 64, (1, 1)),
        (9, 64, (9, 9)),
        (16, 128, (16, 16)),
        (28, 128, (14, 28)),
        (40, 128, (10, 40)),
        (25, 64, (14, 28)),
    ],
)
def test_head_groups(heads, size, groups):
    assert pallas_tpu.head_groups(heads, size, size) == groups


def test_whole_equals_parts_and_segments_equal_sequences():
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv7", 1, 128, 1, 64, 64).items()}
    zero = jnp.zeros((1, 1, 64, 64))
    operation = jax.jit(functools.partial(wkv7, implementation="pallas_tpu", chunk_size=32))
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
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv7", 3, 20, 3, 64, 64).items()}
    batch, heads = jnp.array([2, 0, 1]), jnp.array([1, 2, 0])
    operation = jax.jit(functools.partial(wkv7, implementation="pallas_tpu", chunk_size=16))
    out, state = operation(**inputs)
    out_permuted, state_permuted = operation(**{n: x[batch][:, :, heads] for n, x in inputs.items()})
    np.testing.assert_array_equal(out_permuted, out[batch][:, :, heads])
    np.testing.assert_array_equal(state_permuted, state[batch][:, heads])


def test_backward_keeps_no_per_token_states():
    """What forward hands to backward: the inputs and one state a chunk."""
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv7", 1, 512, 1, 64, 64).items()}
    shapes = jax.eval_shape(lambda inputs: jax.vjp(lambda x: wkv7(**x, implementation="pallas_tpu"), inputs)[1], inputs)
    kept = sum(x.size for x in jax.tree.leaves(shapes))
    inputs_size = sum(x.size for x in inputs.values())
    assert inputs_size < kept <= inputs_size + (512 // pallas_tpu.DEFAULT_CHUNK_SIZE + 2) * 64 * 64


@pytest.mark.parametrize("races", [False, True], ids=["bounds", "races"])
def test_memory(races, capfd):
    """Reads out of bounds raise, memory nobody wrote is NaN; with two threads for the parallel axes, no races."""
    options = {"detect_races": True, "num_cores_or_threads": 2} if races else {"out_of_bounds_reads": "raise"}
    params = pltpu.InterpretParams(uninitialized_memory="nan", **options)
    inputs = recurrence_inputs("wkv7", 2, 40, 1, 64, 64)
    check(inputs, TOLERANCE["float32"], random_segments(2, 40), chunk_size=16, interpret=params)
    printed = capfd.readouterr()
    assert "RACE DETECTED" not in printed.out + printed.err


def test_what_the_kernels_cannot_do_is_refused():
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv7", 1, 8, 2, 16, 16).items()}
    with pytest.raises(NotImplementedError, match="64 or 128"):
        wkv7(**inputs, implementation="pallas_tpu")
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs("wkv7", 1, 8, 2, 64, 64).items()}
    with pytest.raises(NotImplementedError, match="chunk_size=256"):
        wkv7(**inputs, implementation="pallas_tpu", chunk_size=256)


def test_operations_counts_grids_loops_and_passes():
    high = jax.lax.Precision.HIGHEST

    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.dot(c, x, precision=high), None), x, length=3)[0]

    jaxpr = jax.make_jaxpr(lambda x: loop(x) + x @ x)(jnp.zeros((8, 8))).jaxpr
    assert static_profile.operations(jaxpr) == (3 * 6 + 1) * 2 * 8**3


def test_operations_of_the_kernel_grow_with_the_sequence():
    def count(length):
        inputs = recurrence_inputs("wkv7", 1, length, 1, 64, 64)
        state = np.zeros((1, 1, 64, 64), np.float32)
        call = functools.partial(IMPLEMENTATIONS["pallas_tpu"], segment_ids=None, chunk_size=None)
        return static_profile.operations(jax.make_jaxpr(call)(**inputs, initial_state=state).jaxpr)

    assert count(256) == 2 * count(128) > 0


PROGRAM = """HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, backend_config={"estimated_cycles":"100"}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %constant.1 = s32[]{:T(128)} constant(7)
  ROOT %less = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"30"}
  %while.1 = (s32[], f32[8]) while(%copy.1), condition=%condition, body=%body
  %kernel.1 = f32[8]{0} custom-call(%while.1), custom_call_target="tpu_custom_call", KERNEL_CONFIG
}
""".replace(
    "KERNEL_CONFIG",
    'backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}],'
    '"estimated_cycles":"9000"}',
)


def test_a_programs_cycles():
    assert static_profile.xla_cycles(PROGRAM) == 7 * 100 + 30
    assert static_profile.kernels(PROGRAM) == {"kernel.1": {"cycles": 9000, "vmem": 4096}}


def test_code_size(tmp_path):
    text = "== CAPACITY:\nMXU, VLOAD:FILL, VSTORE:SPILL\n 2 3 2\n== UTILIZATION:\n1 0 1\n0 2 1\n0 1 0\n"
    (tmp_path / "17-kernel.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(text)
    assert static_profile.code_size(tmp_path, "kernel.1") == {"bundles": 3, "spills": 2, "fills": 3}
    assert static_profile.code_size(tmp_path, "kernel.2") == {"bundles": 0, "spills": 0, "fills": 0}


def test_cycles_go_on_along_the_slope():
    first, second = static_cost_tpu.PROFILED_LENGTHS
    shape = static_cost_tpu.Shape(2, 8192, 16, 128, "bfloat16")
    short = [{"kernels": {"one": {"cycles": 50 + 3 * length}}} for length in (first, second)]
    assert static_cost_tpu.extrapolated(short, shape) == 2 * (50 + 3 * 8192)
    assert static_cost_tpu.extrapolated([None, None], shape) is None


def test_an_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="v9"):
        static_cost_tpu.chip_of("v9:2x2")


@pytest.mark.parametrize(
    ("door", "words", "said"),
    [
        (static_cost, ["linear_loss", "--target=sm_90"], "it has no GPU kernel"),
        (static_cost, ["wkv7", "--topology=v9:2x2"], "'v9:2x2', expected one of"),
        (static_cost, ["wkv7", "--target=sm_70"], "'sm_70', expected sm_80 or newer"),
        (bench, ["wkv8", "wkv7"], "got wkv8, expected some of wkv7"),
        (bench, ["--shape=2,512,9"], "'2,512,9', expected B,T,H,K"),
    ],
)
def test_what_a_command_does_not_know_is_told_without_a_traceback(door, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["door", *words])
    with pytest.raises(SystemExit) as left:
        door.main()
    assert left.value.code == 2 and said in " ".join(capsys.readouterr().err.split())
