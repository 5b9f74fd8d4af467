"""wkv7 and wkv6, every implementation, against a float64 loop over tokens: outputs, states and all gradients."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from pallas_kernels.shared.triangular import invert_unit_lower
from pallas_kernels.testing import TOLERANCE, recurrence_inputs, rms_ratio, token_loop, value_and_gradients
from pallas_kernels.wkv6 import wkv6, wkv6_step
from pallas_kernels.wkv6.levels import levels
from pallas_kernels.wkv7 import wkv7, wkv7_step

OPERATIONS = {"wkv7": wkv7, "wkv6": wkv6}
STEPS = {"wkv7": wkv7_step, "wkv6": wkv6_step}
STRONGEST = {"wkv7": -0.6066, "wkv6": -5.0}
LOWEST_SUM = {"wkv7": -81.0, "wkv6": -60.0}  # over a chunk of wkv7, half a chunk of wkv6
CASES = [(operation, implementation) for operation in OPERATIONS for implementation in ("reference", "chunked")]

every_case = pytest.mark.parametrize(("operation", "implementation"), CASES)
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def check(
    operation: str,
    inputs: dict[str, Any],
    tolerance: float,
    segment_ids: np.ndarray | None = None,
    **options: Any,
) -> None:
    """Outputs, final state and gradients of one call, with random cotangents and a random initial state."""
    rng = np.random.default_rng(7)
    batch, length, heads, key_size = inputs["r"].shape
    value_size = inputs["v"].shape[-1]
    state, d_final = rng.standard_normal((2, batch, heads, key_size, value_size)).astype(np.float32)
    d_out = rng.standard_normal((batch, length, heads, value_size)).astype(np.float32)
    d_out = np.asarray(jnp.asarray(d_out, inputs["v"].dtype), np.float32)
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    want = token_loop(inputs, state, segment_ids, d_out, d_final)

    @jax.jit
    def run(inputs, state, d_out, d_final):
        return value_and_gradients(OPERATIONS[operation], inputs, state, d_out, d_final, segment_ids=ids, **options)

    got = run(inputs, state, d_out, d_final)
    assert set(got) == set(want)
    errors = {name: rms_ratio(got[name], want[name]) for name in want}
    assert max(errors.values()) < tolerance, errors
    assert got["o"].dtype == inputs["v"].dtype
    assert got["final_state"].dtype == jnp.float32


def random_segments(batch: int, length: int, seed: int = 3) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).random((batch, length)) < 0.06, axis=1)


@every_case
@pytest.mark.parametrize("segments", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize(("length", "key_size", "value_size"), [(1, 8, 8), (31, 16, 24), (65, 64, 64), (40, 128, 128)])
def test_float32(operation, implementation, segments, length, key_size, value_size):
    inputs = recurrence_inputs(operation, 2, length, 2, key_size, value_size)
    ids = random_segments(2, length) if segments else None
    check(operation, inputs, TOLERANCE["float32"], ids, implementation=implementation)


@every_case
def test_bfloat16(operation, implementation):
    """Inputs rounded to bfloat16 for the loop too; log_w stays float32."""
    inputs = recurrence_inputs(operation, 2, 70, 2, 64, 64)
    rounded = {name: jnp.asarray(x, jnp.float32 if name == "log_w" else jnp.bfloat16) for name, x in inputs.items()}
    check(operation, rounded, TOLERANCE["bfloat16"], random_segments(2, 70), implementation=implementation)


@every_operation
@pytest.mark.parametrize("chunk_size", [1, 8, 32])
def test_chunk_sizes(operation, chunk_size):
    # wkv6's strongest decay would go beyond the documented sum in the largest.
    strongest = {"wkv7": STRONGEST["wkv7"], "wkv6": max(STRONGEST["wkv6"], -3.75 * 32 / chunk_size)}[operation]
    inputs = recurrence_inputs(operation, 1, 50, 2, 16, 16, log_w_range=(strongest, -0.001))
    check(operation, inputs, TOLERANCE["float32"], random_segments(1, 50), chunk_size=chunk_size)


@every_operation
@pytest.mark.parametrize("chunk_size", [64, 128])
def test_large_chunks_stay_within_stress_tolerance(operation, chunk_size):
    # For wkv6 the strongest decay that its documentation allows in the larger one.
    strongest = {"wkv7": STRONGEST["wkv7"], "wkv6": -60 / 64}[operation]
    inputs = recurrence_inputs(operation, 1, 200, 1, 16, 16, log_w_range=(strongest, -0.001))
    check(operation, inputs, TOLERANCE["float32_stress"], random_segments(1, 200), chunk_size=chunk_size)


STRESS: dict[str, dict[str, Any]] = {
    "strongest_decay": {},
    "hardly_any_decay": {"log_w_range": (-1e-6, -1e-6)},
    "no_decay": {"log_w_range": (0.0, 0.0)},
    "tiny_keys": {"key_scale": 1e-6},
    "large_keys": {"key_scale": 1e3},
    "iclr_0": {"iclr": 0.0},
    "iclr_1": {"iclr": 1.0},
}


@every_operation
@pytest.mark.parametrize("stress", STRESS)
def test_stress(operation, stress):
    options = dict(STRESS[stress])
    if stress == "strongest_decay":
        options["log_w_range"] = (STRONGEST[operation],) * 2
    inputs = recurrence_inputs(operation, 1, 257, 2, 32, 32, **options)
    check(operation, inputs, TOLERANCE["float32_stress"], implementation="chunked")


@every_operation
@pytest.mark.parametrize("log_w", ["strongest", -1e-6])
def test_16k_tokens(operation, log_w):
    log_w = STRONGEST[operation] if log_w == "strongest" else log_w
    inputs = recurrence_inputs(operation, 1, 16384, 1, 8, 8, log_w_range=(log_w, log_w))
    check(operation, inputs, TOLERANCE["float32_stress"], implementation="chunked")


@pytest.mark.parametrize(("operation", "log_w"), [("wkv7", -1.8), ("wkv6", -7.5)])
def test_documented_range_of_decay(operation, log_w):
    inputs = recurrence_inputs(operation, 1, 70, 2, 32, 32, log_w_range=(log_w, log_w), key_scale=1e3)
    check(operation, inputs, TOLERANCE["float32_stress"], implementation="chunked")


@pytest.mark.parametrize("beyond", [-1.0, 1.0, 5.0, 7.0, 27.0, 219.0])
@every_operation
def test_a_chunk_too_large_for_the_decay_gives_no_wrong_number(operation, beyond):
    """Where float32 exponentials lose digits without a sign of it, and far beyond: each value is right or NaN."""
    size = {"wkv7": 64, "wkv6": 128}[operation]
    total = LOWEST_SUM[operation] - beyond
    inputs = recurrence_inputs(operation, 1, size, 1, 16, 16)
    inputs["log_w"] = np.zeros_like(inputs["log_w"])
    inputs["log_w"][..., 3] = total / 64
    ones, zeros = np.ones((1, size, 1, 16), np.float32), np.zeros((1, 1, 16, 16), np.float32)
    want = token_loop(inputs, zeros, None, ones, zeros)
    run = functools.partial(value_and_gradients, OPERATIONS[operation], chunk_size=size)
    for name, got in jax.jit(run)(inputs, zeros, ones, zeros).items():
        number = ~np.isnan(got)
        np.testing.assert_allclose(got[number], want[name][number], rtol=1e-3, atol=1e-5 * np.abs(want[name]).max())
        assert number.all() == (beyond < 0), name


@every_operation
def test_every_token_its_own_segment(operation):
    inputs = recurrence_inputs(operation, 2, 45, 2, 16, 16)
    check(operation, inputs, TOLERANCE["float32"], np.tile(np.arange(45), (2, 1)), implementation="chunked")


@every_operation
def test_all_zero_inputs(operation):
    inputs = {name: np.zeros_like(x) for name, x in recurrence_inputs(operation, 1, 40, 2, 16, 16).items()}
    check(operation, inputs, TOLERANCE["float32"], implementation="chunked")


def test_the_same_removal_key_over_and_over():
    """One key, removed in full by every token: where powers of AB would grow like binomials."""
    inputs = recurrence_inputs("wkv7", 1, 130, 2, 32, 32, log_w_range=(-1e-6, -1e-6), iclr=1.0)
    for name in ("a", "b"):
        inputs[name] = np.broadcast_to(inputs[name][:, :1], inputs[name].shape).copy()
    check("wkv7", inputs, TOLERANCE["float32_stress"], implementation="chunked")


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_triangular_inverse(size, scale):
    strict = np.tril(np.random.default_rng(0).uniform(-scale, 0.0, (3, size, size)), -1).astype(np.float32)
    want = np.linalg.inv(np.eye(size) - strict.astype(np.float64))
    assert rms_ratio(invert_unit_lower(jnp.asarray(strict)), want) < TOLERANCE["float32"]


@pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
def test_levels_cover_each_pair_once_with_its_own_decay(size):
    """Level by level, a pair's two exponents add up to the decay between its tokens."""
    sums, sign, masks = levels(size)
    np.testing.assert_array_equal(masks.sum(0), np.tril(np.ones((size, size)), -1))
    log_w = -np.random.default_rng(0).random(size)
    total = np.cumsum(log_w)
    for sum_of, sign_of, mask in zip(sums, sign[:, 0, 0], masks, strict=False):
        exponents = sum_of @ log_w
        pairs = exponents[:, None] + sign_of * exponents[None, :]
        np.testing.assert_allclose(pairs * mask, (total[:, None] - total[None, :]) * mask, atol=1e-12)


@every_case
def test_whole_equals_parts(operation, implementation):
    """Two calls with the state carried over, cut at a chunk's edge and off it."""
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs(operation, 2, 80, 2, 16, 16).items()}
    options = {"implementation": implementation}
    run = jax.jit(lambda inputs, state: OPERATIONS[operation](**inputs, initial_state=state, **options))
    zero = jnp.zeros((2, 2, 16, 16))
    out, state = run(inputs, zero)
    for cut in (48, 37):
        first, middle = run({n: x[:, :cut] for n, x in inputs.items()}, zero)
        second, last = run({n: x[:, cut:] for n, x in inputs.items()}, middle)
        assert rms_ratio(jnp.concatenate([first, second], axis=1), out) < TOLERANCE["float32"]
        assert rms_ratio(last, state) < TOLERANCE["float32"]


@every_operation
def test_segments_equal_separate_sequences(operation):
    """Two documents in a row give what each gives alone."""
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs(operation, 1, 70, 2, 16, 16).items()}
    ids = jnp.where(jnp.arange(70) < 41, 5, 2)[None]
    out, state = OPERATIONS[operation](**inputs, segment_ids=ids)
    first, _ = OPERATIONS[operation](**{n: x[:, :41] for n, x in inputs.items()})
    second, last = OPERATIONS[operation](**{n: x[:, 41:] for n, x in inputs.items()})
    assert rms_ratio(out, jnp.concatenate([first, second], axis=1)) < TOLERANCE["float32"]
    assert rms_ratio(state, last) < TOLERANCE["float32"]


@every_case
def test_permuting_batch_and_heads_permutes_the_result(operation, implementation):
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs(operation, 3, 40, 4, 16, 16).items()}
    batch, heads = jnp.array([2, 0, 1]), jnp.array([3, 1, 0, 2])
    run = jax.jit(lambda inputs: OPERATIONS[operation](**inputs, implementation=implementation))
    out, state = run(inputs)
    out_permuted, state_permuted = run({n: x[batch][:, :, heads] for n, x in inputs.items()})
    np.testing.assert_array_equal(out_permuted, out[batch][:, :, heads])
    np.testing.assert_array_equal(state_permuted, state[batch][:, heads])


@every_operation
def test_backward_keeps_no_per_token_states(operation):
    """What forward hands to backward: the inputs and one state a chunk."""
    length, size = 512, 16
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs(operation, 1, length, 1, 64, 64).items()}
    _, pull = jax.vjp(lambda inputs: OPERATIONS[operation](**inputs, chunk_size=size), inputs)
    kept = sum(x.size for x in jax.tree.leaves(pull) if hasattr(x, "size"))
    inputs_size = sum(x.size for x in inputs.values())
    assert 0 < kept <= inputs_size + (length // size + 2) * 64 * 64


@every_operation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_the_whole(operation, dtype):
    """Token by token, decays beyond any chunk's: outputs and states of the float64 loop."""
    inputs = recurrence_inputs(operation, 3, 29, 2, 16, 24, log_w_range=(-20.0, 0.0))
    arrays = {n: jnp.asarray(x, jnp.float32 if n == "log_w" else dtype) for n, x in inputs.items()}
    start = np.random.default_rng(7).standard_normal((3, 2, 16, 24)).astype(np.float32)
    want = token_loop({n: np.asarray(x, np.float64) for n, x in arrays.items()}, start)
    step = jax.jit(STEPS[operation])
    state, outs = jnp.asarray(start), []
    for t in range(29):
        out, state = step(*(x[:, t] for x in arrays.values()), state)
        assert out.dtype == dtype and state.dtype == jnp.float32
        outs.append(out)
    assert rms_ratio(jnp.stack(outs, axis=1), want["o"]) < TOLERANCE[dtype]
    assert rms_ratio(state, want["final_state"]) < TOLERANCE["float32"]


@every_operation
def test_a_step_continues_a_prefill(operation):
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs(operation, 2, 34, 2, 16, 16).items()}
    want, last = OPERATIONS[operation](**inputs)
    _, state = OPERATIONS[operation](**{n: x[:, :33] for n, x in inputs.items()})
    out, state = STEPS[operation](*(x[:, 33] for x in inputs.values()), state)
    assert rms_ratio(out, want[:, 33]) < TOLERANCE["float32"]
    assert rms_ratio(state, last) < TOLERANCE["float32"]


@pytest.fixture
def no_shape_annotations() -> Iterator[None]:
    """Turns the annotations' checks off, so that the function's own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@every_operation
def test_bad_arguments_are_refused(operation, no_shape_annotations):
    inputs = {n: jnp.asarray(x) for n, x in recurrence_inputs(operation, 1, 8, 2, 16, 16).items()}
    run = OPERATIONS[operation]
    with pytest.raises(ValueError, match=r"'chunked'.*'reference'"):
        run(**inputs, implementation="fastest")
    with pytest.raises(ValueError, match=r"chunk_size=12\b.*\b16, 32 or 64\b"):
        run(**inputs, chunk_size=12)
    with pytest.raises(ValueError, match=r"\bk\b.*\(1, 5, 2, 16\).*\(1, 8, 2, 16\)"):
        run(**(inputs | {"k": inputs["k"][:, :5]}))
    with pytest.raises(ValueError, match=r"initial_state\b.*\(1, 2, 16, 8\).*\(1, 2, 16, 16\)"):
        run(**inputs, initial_state=jnp.zeros((1, 2, 16, 8)))
    with pytest.raises(ValueError, match=r"\(1, 0, 2, 16\).*\bT >= 1"):
        run(**{n: x[:, :0] for n, x in inputs.items()})
    tokens = {n: x[:, 0] for n, x in inputs.items()}
    with pytest.raises(ValueError, match=r"\(1, 8, 2, 16\).*\[B,H,K\]"):
        STEPS[operation](**inputs, state=jnp.zeros((1, 2, 16, 16)))
    with pytest.raises(ValueError, match=r"\bstate\b.*\(1, 2, 16, 8\).*\(1, 2, 16, 16\)"):
        STEPS[operation](**tokens, state=jnp.zeros((1, 2, 16, 8)))
