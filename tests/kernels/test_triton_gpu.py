"""The Triton kernels of wkv7, wkv6 and gdn without a GPU: their numbers by Triton's interpreter, what they compile to.

Run as a script with TRITON_INTERPRET=1 (Triton reads it on import, so the tests start a process for it), this file
computes the errors of the CASES named and prints them as JSON.
"""

import functools
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton_interpreter import interpret, round_as_tensor_cores_do

from pallas_kernels import dispatch
from pallas_kernels.gdn import gdn
from pallas_kernels.measure import static_cost_gpu
from pallas_kernels.measure.static_profile import FLOAT32
from pallas_kernels.shared import triton_call
from pallas_kernels.testing import (
    TOLERANCE,
    gated_delta_inputs,
    gated_delta_loop,
    recurrence_inputs,
    rms_ratio,
    token_loop,
    value_and_gradients,
)
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7

ROOT = pathlib.Path(__file__).parents[2]
OPERATIONS = {"wkv7": wkv7, "wkv6": wkv6, "gdn": gdn}
STRONGEST = {"wkv7": -0.6066, "wkv6": -5.0, "gdn": -20.0}
WEAKEST = {"wkv7": -1e-6, "wkv6": -1e-6, "gdn": -1e-7}
DOCUMENTED = {"wkv7": -1.8, "wkv6": -10.0, "gdn": -100.0}

# name -> length, key size, value size, tolerance, and what differs from random inputs of float32 in one segment.
CASES: dict[str, tuple[int, int, int, str, dict[str, Any]]] = {
    "whole": (35, 64, 64, "float32", {}),
    "segments": (20, 64, 64, "float32", {"segments": "some", "heads": 2}),
    "several rows": (20, 64, 64, "float32", {"segments": "some", "batch": 2, "heads": 2}),
    "wide heads": (20, 128, 128, "float32", {"segments": "some"}),
    "filled heads": (18, 24, 80, "float32", {"segments": "some"}),
    "one token": (1, 64, 64, "float32", {}),
    "each its own segment": (20, 64, 64, "float32", {"segments": "all"}),
    "zeros": (17, 64, 64, "float32", {"zeros": True}),
    "bfloat16": (70, 64, 64, "bfloat16", {"segments": "some"}),
    "bfloat16, wide heads": (40, 128, 128, "bfloat16", {}),
    "bfloat16, chunks of 16": (31, 64, 64, "bfloat16", {"chunk_size": 16}),
    "strongest decay": (33, 64, 64, "float32_stress", {"log_w": STRONGEST}),
    "documented decay": (33, 64, 64, "float32_stress", {"log_w": DOCUMENTED, "key_scale": 1e3}),
    "documented decay, bfloat16": (40, 64, 64, "bfloat16", {"log_w": DOCUMENTED}),
    "hardly any decay": (65, 64, 64, "float32_stress", {"log_w": WEAKEST}),
    "one key, hardly any decay": (65, 64, 64, "float32_stress", {"log_w": WEAKEST, "iclr": 1.0, "one_key": True}),
    "tiny keys": (18, 64, 64, "float32_stress", {"key_scale": 1e-6}),
    "iclr 0": (18, 64, 64, "float32_stress", {"iclr": 0.0}),
    "iclr 1": (18, 64, 64, "float32_stress", {"iclr": 1.0}),
    "beta 2": (18, 64, 64, "float32_stress", {"iclr": 1.0, "beta": 2.0}),
}

# Dimensions that are full and not, every kind of mask, both precisions: all of the kernels' code. Others are slow.
QUICK = ("segments", "wide heads", "filled heads", "one token", "bfloat16", "strongest decay")
SLOW = tuple(case for case in CASES if case not in QUICK)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_jax_triton = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax_triton", "jax_cuda12_plugin")),
    reason="jax-triton and JAX's CUDA plugin are not installed (extra cuda)",
)
# What the two releases of jax-triton call a kernel in a lowered program.
KERNEL_CALLS = [jax.export.DisabledSafetyCheck.custom_call(f"triton_kernel_call{end}") for end in ("", "_ffi")]
every_operation = pytest.mark.parametrize("operation", OPERATIONS)


def inputs_of(
    operation: str,
    batch: int,
    length: int,
    heads: int,
    key_size: int,
    value_size: int,
    *,
    log_w: float | None = None,
    iclr: float | None = None,
    key_scale: float = 1.0,
) -> dict[str, Any]:
    """Arguments of any operation; gdn has beta where wkv7 has the iclr, and two heads that read one key head."""
    decays = None if log_w is None else (log_w, log_w)
    if operation != "gdn":
        options: dict[str, Any] = {"log_w_range": decays, "key_scale": key_scale, "iclr": iclr}
        return recurrence_inputs(operation, batch, length, heads, key_size, value_size, **options)
    groups, options = 1 if heads == 2 else heads, {"key_scale": min(key_scale, 1.0), "beta": iclr}
    options |= {} if decays is None else {"log_g_range": decays}
    return gated_delta_inputs(batch, length, groups, heads, key_size, value_size, **options)


def errors_of(operation: str, case: str) -> dict[str, float]:
    """RMS ratios of outputs, final state and all gradients to the float64 loop."""
    length, key_size, value_size, tolerance, options = CASES[case]
    inputs = inputs_of(
        operation,
        options.get("batch", 1),
        length,
        options.get("heads", 1),
        key_size,
        value_size,
        log_w=options.get("log_w", {}).get(operation),
        key_scale=options.get("key_scale", 1.0),
        iclr=options.get("beta" if operation == "gdn" and "beta" in options else "iclr"),
    )
    if "one_key" in options and operation == "gdn":
        # Replaced in full by every token.
        inputs["k"] = np.broadcast_to(inputs["k"][:, :1], inputs["k"].shape).copy()
    if "zeros" in options:
        inputs = {name: np.zeros_like(x) for name, x in inputs.items()}
    if tolerance == "bfloat16":
        inputs = {name: x if name in FLOAT32 else jnp.asarray(x, jnp.bfloat16) for name, x in inputs.items()}
    rng = np.random.default_rng(7)
    batch, _, heads, _ = inputs["v"].shape
    state, d_final = rng.standard_normal((2, batch, heads, key_size, value_size)).astype(np.float32)
    d_out = jnp.asarray(rng.standard_normal(inputs["v"].shape), inputs["v"].dtype)
    ids = None
    if "segments" in options:
        often = {"all": 1.0, "some": 0.08}[options["segments"]]
        ids = np.cumsum(np.random.default_rng(3).random((batch, length)) < often, axis=1).astype(np.int32)
    loop = gated_delta_loop if operation == "gdn" else token_loop
    want = loop(inputs, state, ids, np.asarray(d_out, np.float64), d_final)
    got = value_and_gradients(
        OPERATIONS[operation],
        inputs,
        state,
        d_out,
        d_final,
        segment_ids=None if ids is None else jnp.asarray(ids),
        implementation="triton_gpu",
        chunk_size=options.get("chunk_size"),
    )
    assert set(got) == set(want)
    # What decays to less than a float32 is nothing.
    want = {name: np.where(np.abs(x) < np.finfo(np.float32).tiny, 0.0, x) for name, x in want.items()}
    return {name: rms_ratio(got[name], want[name]) for name in want}


def parts(operation: str) -> float:
    """The largest difference between one call and two with the state carried over, cut off a chunk's edge."""
    inputs = {name: jnp.asarray(x) for name, x in inputs_of(operation, 1, 36, 1, 64, 64).items()}
    run = functools.partial(OPERATIONS[operation], implementation="triton_gpu")
    out, state = run(**inputs)
    first, middle = run(**{name: x[:, :21] for name, x in inputs.items()})
    second, last = run(**{name: x[:, 21:] for name, x in inputs.items()}, initial_state=middle)
    return max(rms_ratio(jnp.concatenate([first, second], axis=1), out), rms_ratio(last, state))


def permuted(operation: str) -> bool:
    """Permuting batch and heads permutes the result to the bit."""
    inputs = {name: jnp.asarray(x) for name, x in inputs_of(operation, 2, 9, 3, 64, 64).items()}
    batch, heads = jnp.array([1, 0]), jnp.array([2, 0, 1])
    run = functools.partial(OPERATIONS[operation], implementation="triton_gpu")
    out, state = run(**inputs)
    other_out, other_state = run(**{name: x[batch][:, :, heads] for name, x in inputs.items()})
    return bool((other_out == out[batch][:, :, heads]).all() and (other_state == state[batch][:, heads]).all())


@functools.cache
def interpreted(cases: tuple[str, ...]) -> dict[str, Any]:
    """What the other process found, by operation."""
    variables = {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, __file__, *cases], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_numbers(cases: tuple[str, ...], operation: str, case: str) -> None:
    errors = interpreted(cases)[operation]["errors"][case]
    assert max(errors.values()) < TOLERANCE[CASES[case][3]], errors


@needs_triton
@every_operation
@pytest.mark.parametrize("case", QUICK)
def test_numbers(operation, case):
    check_numbers(QUICK, operation, case)


@needs_triton
@pytest.mark.slow
@every_operation
@pytest.mark.parametrize("case", SLOW)
def test_other_numbers(operation, case):
    check_numbers(SLOW, operation, case)


@needs_triton
@every_operation
def test_whole_equals_parts(operation):
    assert interpreted(QUICK)[operation]["parts"] < TOLERANCE["float32"]


@needs_triton
@every_operation
def test_permuting_batch_and_heads_permutes_the_result(operation):
    assert interpreted(QUICK)[operation]["permuted"]


def check_compiled(operation: str, capability: int, dtype: str, size: int) -> None:
    forward, backward = static_cost_gpu.launches(operation, 1, 8192, 16, size, dtype)
    costs = {
        f"{launch.kernel.fn.__name__} {launch.settings.get('REVERSE', '')}": static_cost_gpu.cost(launch, capability)
        for launch in (*forward, *backward)
    }
    assert all(cost.spills == 0 for cost in costs.values()), costs
    # A program may have 99 KiB of shared memory on the smallest of these GPUs (8.6, 8.9).
    assert all(cost.shared <= 99 * 1024 for cost in costs.values()), costs
    assert all(sum(cost.instructions.values()) > 0 for cost in costs.values()), costs


@needs_triton
@every_operation
def test_no_spills(operation):
    check_compiled(operation, 90, "bfloat16", 128)


@needs_triton
@pytest.mark.slow
@every_operation
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [64, 128])
def test_no_spills_anywhere(operation, capability, dtype, size):
    check_compiled(operation, capability, dtype, size)


@needs_triton
def test_static_cost_table(capsys):
    static_cost_gpu.main("wkv6", "sm_90", 1, 256, 2, 128)
    table = capsys.readouterr().out
    assert "forward" in table and "backward" in table
    assert all(name in table for name in ("prepare", "pass_states", "combine", "key_gradients"))
    with pytest.raises(ValueError, match="sm_80"):
        static_cost_gpu.main("wkv6", "v6e:2x2", 1, 256, 2, 128)


@needs_jax_triton
@pytest.mark.parametrize(("operation", "calls"), [("wkv7", 8), ("wkv6", 7), ("gdn", 8)])
def test_lowers_into_a_jax_program_for_cuda(operation, calls, monkeypatch):
    """Every kernel of forward and backward: with the value asked for too, or the outputs' kernel is left out."""
    jax_triton = importlib.import_module("jax_triton")
    deviceless = functools.partial(jax_triton.triton_call, compute_capability=90)
    monkeypatch.setattr(jax_triton, "triton_call", deviceless)

    @jax.jit
    def gradients(inputs: dict[str, jax.Array]) -> Any:
        def loss(inputs: dict[str, jax.Array]) -> jax.Array:
            out, state = OPERATIONS[operation](**inputs, implementation="triton_gpu")
            return jnp.sum(out.astype(jnp.float32)) + jnp.sum(state)

        return jax.value_and_grad(loss)(inputs)

    inputs = {
        name: jax.ShapeDtypeStruct(x.shape, jnp.float32 if name in FLOAT32 else jnp.bfloat16)
        for name, x in inputs_of(operation, 1, 40, 2, 64, 64).items()
    }
    exported = jax.export.export(gradients, platforms=["cuda"], disabled_checks=KERNEL_CALLS)(inputs)
    assert exported.mlir_module().count("@triton_kernel_call") == calls


@every_operation
@pytest.mark.parametrize("missing", ["triton", "jax_triton"])
def test_without_triton_says_what_to_install(operation, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in (
        "wkv6.triton_kernels",
        "wkv7.triton_kernels",
        "gdn.triton_kernels",
        "shared.triton_chunk",
        "shared.triton_states",
    ):
        monkeypatch.delitem(sys.modules, f"pallas_kernels.{module}", raising=False)
    inputs = {name: jnp.asarray(x) for name, x in inputs_of(operation, 1, 4, 1, 8, 8).items()}
    with pytest.raises(NotImplementedError, match=r"triton.*-e '\.\[cuda\]'"):
        OPERATIONS[operation](**inputs, implementation="triton_gpu")


@needs_triton
@every_operation
@pytest.mark.parametrize(
    ("size", "chunk_size", "says"), [(256, None, r"K=256, V=256\b.*\b128;"), (64, 128, "chunk_size=128")]
)
def test_what_the_kernels_cannot_do_is_refused(operation, size, chunk_size, says):
    inputs = {name: jnp.asarray(x) for name, x in inputs_of(operation, 1, 4, 1, size, size).items()}
    with triton_call.running(interpret), pytest.raises(NotImplementedError, match=says):
        OPERATIONS[operation](**inputs, implementation="triton_gpu", chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("installed", "capability", "chosen"),
    [
        (True, "8.0", "triton_gpu"),
        (True, "12.0", "triton_gpu"),
        (True, "7.5", "chunked"),
        (True, "gfx942", "chunked"),
        (False, "9.0", "chunked"),
    ],
)
def test_dispatch_takes_triton_on_recent_nvidia_gpus(installed, capability, chosen, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    implementations = {name: lambda name=name: name for name in ("triton_gpu", "chunked", "reference")}
    assert dispatch.choose("wkv7", implementations, None)() == chosen
    assert dispatch.choose("wkv7", implementations, "reference")() == "reference"


@pytest.mark.parametrize(
    ("sizes", "chosen"), [((64, 64), "pallas_tpu"), ((128, 64), "pallas_tpu"), ((32, 32), "chunked")]
)
def test_dispatch_takes_a_tpu_kernel_for_its_head_sizes(sizes, chosen, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    implementations = {name: lambda name=name: name for name in ("pallas_tpu", "chunked", "reference")}
    assert dispatch.choose("wkv7", implementations, None, sizes)() == chosen


def test_dispatch_of_an_operation_with_few_implementations():
    """As a stranger's begins: a reference alone, or a kernel for another backend."""
    of_name = {name: lambda name=name: name for name in ("pallas_tpu", "reference")}
    assert dispatch.choose("leaky", of_name, None, (16, 16))() == "reference"
    with pytest.raises(ValueError, match=r"leaky has \['pallas_tpu'\], of which none runs on cpu; expected 'chunked'"):
        dispatch.choose("leaky", {"pallas_tpu": of_name["pallas_tpu"]}, None, (64, 64))


if __name__ == "__main__":
    round_as_tensor_cores_do()
    with triton_call.running(interpret):
        errors = {
            name: {
                "errors": {case: errors_of(name, case) for case in sys.argv[1:]},
                "parts": parts(name),
                "permuted": permuted(name),
            }
            for name in OPERATIONS
        }
    print(json.dumps(errors))
