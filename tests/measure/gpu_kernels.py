"""The kernels that this machine's backend prefers: errors to float64 and to `chunked`, times beside it and beside fla.

    python tests/measure/gpu_kernels.py errors [--length 200] [--sizes 64,128]
    python tests/measure/gpu_kernels.py times [--shape 1,4096,16,128] [--repeats 10]

errors: RMS ratios of output, final state and the worst gradient of wkv7, wkv6 and gdn to the float64 loop over tokens,
and of linear_loss's and attention's to the plain formulas in float64; above the tests' tolerance they are marked, and
the exit code is 1. times: milliseconds, medians of turns, all in one process, with bfloat16 inputs; what
flash-linear-attention's kernels take stands beside them where torch, a GPU and fla are there. On a CPU the only
implementation is `chunked`: that the commands work.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# torch takes its part of the GPU's memory in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.attention import attention
from pallas_kernels.gdn import gdn
from pallas_kernels.measure import loss_forms
from pallas_kernels.testing import (
    TOLERANCE,
    attention_formula,
    gated_delta_inputs,
    gated_delta_loop,
    recurrence_inputs,
    rms_ratio,
    token_loop,
    value_and_gradients,
)
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7

OPERATIONS: dict[str, Callable[..., Any]] = {"wkv7": wkv7, "wkv6": wkv6, "gdn": gdn}
DTYPES = ("float32", "bfloat16")
# The log decays stay as they are: bfloat16 ones would be another recurrence.
KEPT = ("log_w", "log_g")
LOSSES = ("cross_entropy", "kl")
LOSS_SIZE = loss_forms.Size(tokens=300, vocab=5003, width=256)
# Of sums over a whole vocabulary in float32, and of what bfloat16 hidden states give.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": TOLERANCE["bfloat16"]}


def implementations(kernel: str = "triton_gpu") -> list[str]:
    """What this GPU would choose, and `chunked`."""
    return [kernel, "chunked"] if jax.default_backend() == "gpu" and dispatch.fits(kernel, (64,)) else ["chunked"]


def inputs_of(operation: str, shape: tuple[int, int, int, int], dtype: str) -> dict[str, jax.Array]:
    """Random arguments, shape B,T,H,K, whose values are those of the dtype."""
    batch, length, heads, size = shape
    if operation == "gdn":
        made = gated_delta_inputs(batch, length, heads, heads, size, size, log_g_range=(-3.0, -1e-3))
    else:
        made = recurrence_inputs(operation, batch, length, heads, size, size)
    return {name: jnp.asarray(x, "float32" if name in KEPT else dtype) for name, x in made.items()}


def cotangents(operation: str, inputs: dict[str, jax.Array]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An initial state, and cotangents of output and final state."""
    rng = np.random.default_rng(7)
    batch, _, heads, value_size = inputs["v"].shape
    key_size = inputs["q" if operation == "gdn" else "r"].shape[-1]
    state, d_final = rng.standard_normal((2, batch, heads, key_size, value_size)).astype(np.float32)
    d_out = np.asarray(jnp.asarray(rng.standard_normal(inputs["v"].shape), inputs["v"].dtype), np.float64)
    return state, d_out, d_final


def computed(operation: str, implementation: str, inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Output, final state and all gradients, compiled."""
    state, d_out, d_final = cotangents(operation, inputs)

    def run(inputs: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return value_and_gradients(OPERATIONS[operation], inputs, state, d_out, d_final, implementation=implementation)

    return jax.jit(run)(inputs)


def errors(operation: str, implementation: str, dtype: str, size: int, length: int) -> dict[str, float]:
    """RMS ratios to the float64 loop by name: o, final_state, d_..."""
    inputs = inputs_of(operation, (1, length, 2, size), dtype)
    loop = gated_delta_loop if operation == "gdn" else token_loop
    state, d_out, d_final = cotangents(operation, inputs)
    want = loop({name: np.asarray(x, np.float64) for name, x in inputs.items()}, state, None, d_out, d_final)
    got = computed(operation, implementation, inputs)
    return {name: rms_ratio(got[name], want[name]) for name in want}


def loss_errors(loss: str, dtype: str) -> dict[str, float]:
    """Of value and gradients of the sliced loss, to the plain formula in float64."""
    arguments = loss_forms.arguments(loss, LOSS_SIZE, jnp.dtype(dtype))
    value, (d_hidden, d_kernel) = jax.jit(loss_forms.value_and_gradients(loss, "sliced"))(arguments)
    # The kernels are rounded to the hidden states' dtype before they are multiplied.
    rounded = {name: jnp.asarray(x, dtype) if "kernel" in name else x for name, x in arguments.items()}
    x = {name: np.asarray(array, np.int64 if name == "targets" else np.float64) for name, array in rounded.items()}

    def log_probs(hidden: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        z = hidden @ kernel
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    log_q, weights = log_probs(x["hidden"], x["kernel"]), x["weights"][:, None]
    if loss == "kl":
        log_p = log_probs(x["teacher_hidden"], x["teacher_kernel"])
        p, total = np.exp(log_p), np.sum(weights * np.exp(log_p) * (log_p - log_q))
    else:
        p = np.eye(LOSS_SIZE.vocab)[x["targets"]]
        total = -np.sum(weights * p * log_q)
    d_logits = weights * (np.exp(log_q) - p)
    want = {"value": total, "d_hidden": d_logits @ x["kernel"].T, "d_kernel": x["hidden"].T @ d_logits}
    got = {"value": value, "d_hidden": d_hidden, "d_kernel": d_kernel}
    return {name: rms_ratio(got[name], want[name]) for name in want}


def attention_inputs(shape: tuple[int, int, int, int], documents: int) -> tuple[list[jax.Array], np.ndarray]:
    """bfloat16 q, k, v of a shape B,T,H,K, with half as many heads of keys, and segment_ids."""
    batch, length, heads, size = shape
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal((batch, length, count, size)) for count in (heads, heads // 2, heads // 2))
    segment_ids = 1 + np.arange(length) * documents // length
    return [jnp.asarray(x, jnp.bfloat16) for x in arrays], np.tile(segment_ids.astype(np.int32), (batch, 1))


def attention_program(implementation: str, segment_ids: np.ndarray) -> Callable[..., jax.Array]:
    """q, k, v -> o; rows of one document have no segments to be told."""
    ids = jnp.asarray(segment_ids) if segment_ids.max() > 1 else None
    return lambda q, k, v: attention(q, k, v, segment_ids=ids, implementation=implementation)


def attention_errors(implementation: str, size: int, length: int, documents: int) -> dict[str, float]:
    """Of output and gradients in bfloat16, to the formula in float64."""
    inputs, segment_ids = attention_inputs((2, length, 4, size), documents)
    cotangent = attention_inputs((2, length, 4, size), documents)[0][0][::-1]

    def both(attend: Callable[..., jax.Array], cotangent: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(cotangent)

    got = jax.jit(functools.partial(both, attention_program(implementation, segment_ids)))(cotangent, *inputs)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x, jnp.float64) for x in (cotangent, *inputs)]
        want = both(lambda q, k, v: attention_formula(q, k, v, segment_ids), *exact)
    return {
        name: rms_ratio(ours, right) for name, ours, right in zip(("o", "d_q", "d_k", "d_v"), got, want, strict=True)
    }


def attention_times(
    implementation: str, inputs: list[jax.Array], segment_ids: np.ndarray, repeats: int
) -> tuple[float, float]:
    """As `our_times`."""
    forward = attention_program(implementation, segment_ids)

    def both(*inputs: jax.Array) -> Any:
        out, pull = jax.vjp(forward, *inputs)
        return out, pull(jnp.ones_like(out))

    times = [
        _milliseconds(lambda run=run: run(*inputs), jax.block_until_ready, repeats)
        for run in (jax.jit(forward), jax.jit(both))
    ]
    return times[0], times[1]


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def _error_row(name: str, implementation: str, dtype: str, size: int, errors: dict[str, float], most: float) -> bool:
    gradients = {name: value for name, value in errors.items() if name.startswith("d_")}
    worst = max(gradients, key=lambda name: gradients[name])
    # A NaN is above every tolerance.
    fails = not all(value < most for value in errors.values())
    rest = [f"{value:.1e}" for name, value in errors.items() if name not in gradients]
    said = f"above {most:g}" if fails else f"below {most:g}"
    _row(name, implementation, dtype, size, *rest, *["-"] * (2 - len(rest)), f"{gradients[worst]:.1e} {worst}", said)
    return fails


def print_errors(sizes: list[int], length: int) -> bool:
    """The table; returns whether any is above its tolerance."""
    _row("operation", "implementation", "inputs", "K", "o or value", "final state", "worst gradient", "")
    _row(*["---"] * 8)
    failed = False
    for operation in OPERATIONS:
        for dtype in DTYPES:
            for size in sizes:
                for name in implementations():
                    row = errors(operation, name, dtype, size, length)
                    failed |= _error_row(operation, name, dtype, size, row, TOLERANCE[dtype])
    for size in sizes:
        for name in implementations("cudnn"):
            for documents in (1, 2):
                row = attention_errors(name, size, length, documents)
                failed |= _error_row(
                    f"attention, {documents} a row", name, "bfloat16", size, row, TOLERANCE["bfloat16"]
                )
    for loss in LOSSES:
        for dtype in DTYPES:
            row = loss_errors(loss, dtype)
            failed |= _error_row(loss, "sliced", dtype, LOSS_SIZE.width, row, LOSS_TOLERANCE[dtype])
    return failed


def _milliseconds(run: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    wait(run())
    wait(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def our_times(operation: str, implementation: str, inputs: dict[str, jax.Array], repeats: int) -> tuple[float, float]:
    """Milliseconds forward, and forward and backward."""

    def forward(inputs: dict[str, jax.Array]) -> Any:
        return OPERATIONS[operation](**inputs, implementation=implementation)

    def both(inputs: dict[str, jax.Array]) -> Any:
        (out, state), pull = jax.vjp(forward, inputs)
        return out, pull((jnp.ones_like(out), jnp.ones_like(state)))

    programs = jax.jit(forward), jax.jit(both)
    times = [_milliseconds(lambda run=run: run(inputs), jax.block_until_ready, repeats) for run in programs]
    return times[0], times[1]


def fla_functions() -> dict[str, tuple[str, Callable[[dict[str, Any]], Any]]]:
    """operation -> fla's own name and a call of it with our arguments as torch tensors; empty without fla or a GPU."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "fla")):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.rwkv7 import chunk_rwkv7

    def kda(x: dict[str, Any]) -> Any:
        beta = x["log_w"].new_full(x["log_w"].shape[:3], 0.5).to(x["k"].dtype)
        return chunk_kda(q=x["r"], k=-x["a"], v=x["v"], g=x["log_w"], beta=beta, output_final_state=True)

    return {
        "wkv7": (
            "fla chunk_rwkv7",
            lambda x: chunk_rwkv7(**{"w" if n == "log_w" else n: t for n, t in x.items()}, output_final_state=True),
        ),
        "wkv6": (
            "fla chunk_gla",
            lambda x: chunk_gla(x["r"], x["k"], x["v"], x["log_w"], scale=1.0, output_final_state=True),
        ),
        "gdn": (
            "fla chunk_gated_delta_rule",
            lambda x: chunk_gated_delta_rule(
                x["q"], x["k"], x["v"], x["log_g"], x["beta"], scale=1.0, output_final_state=True
            ),
        ),
        "wkv7 as KDA": ("fla chunk_kda", kda),
    }


def fla_times(call: Callable[[dict[str, Any]], Any], inputs: dict[str, jax.Array], repeats: int) -> tuple[float, float]:
    """As `our_times`, of one of fla's functions; their kernels' own start and end, by torch's synchronisation."""
    import torch

    tensors = {
        name: torch.tensor(np.asarray(x, np.float32), device="cuda", requires_grad=True).to(
            torch.float32 if x.dtype == jnp.float32 else torch.bfloat16
        )
        for name, x in inputs.items()
    }
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}

    def forward() -> Any:
        with torch.no_grad():
            return call(leaves)

    def both() -> Any:
        out, state = call(leaves)
        return torch.autograd.grad([out, state], list(leaves.values()), [torch.ones_like(out), torch.ones_like(state)])

    def wait(result: Any) -> Any:
        torch.cuda.synchronize()
        return result

    return _milliseconds(forward, wait, repeats), _milliseconds(both, wait, repeats)


def print_times(shape: tuple[int, int, int, int], repeats: int) -> None:
    """A row for each implementation; the distance of the first to `chunked` at this shape stands beside it."""
    print("B={}, T={}, H={}, K=V={}, bfloat16 inputs".format(*shape), flush=True)
    print()
    _row("operation", "implementation", "forward, ms", "forward + backward, ms", "o beside chunked's")
    _row(*["---"] * 5)
    others = fla_functions()
    for operation in OPERATIONS:
        inputs = inputs_of(operation, shape, "bfloat16")
        beside = OPERATIONS[operation](**inputs, implementation="chunked")[0]
        for name in implementations():
            out = OPERATIONS[operation](**inputs, implementation=name)[0]
            forward, both = our_times(operation, name, inputs, repeats)
            _row(operation, name, f"{forward:.3f}", f"{both:.3f}", f"{rms_ratio(out, beside):.1e}")
        for key in (operation, f"{operation} as KDA"):
            if key in others:
                label, call = others[key]
                forward, both = fla_times(call, inputs, repeats)
                _row(key, label, f"{forward:.3f}", f"{both:.3f}", "-")
    inputs, segment_ids = attention_inputs(shape, documents=2)
    beside = attention_program("chunked", segment_ids)(*inputs)
    for name in implementations("cudnn"):
        out = attention_program(name, segment_ids)(*inputs)
        forward, both = attention_times(name, inputs, segment_ids, repeats)
        _row("attention, 2 a row", name, f"{forward:.3f}", f"{both:.3f}", f"{rms_ratio(out, beside):.1e}")
    if not others:
        print("\nflash-linear-attention was not there to be timed (torch with CUDA, and fla).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["errors", "times"])
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--sizes", default="64,128")
    parser.add_argument("--shape", default="1,4096,16,128", help="B,T,H,K")
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    if jax.default_backend() == "gpu" and not dispatch.fits("triton_gpu", (64,)):
        raise ValueError("this GPU's kernels need triton and jax_triton, and a compute capability of 8.0 or more.")
    if arguments.what == "times":
        batch, length, heads, size = map(int, arguments.shape.split(","))
        print_times((batch, length, heads, size), arguments.repeats)
    elif print_errors([int(n) for n in arguments.sizes.split(",")], arguments.length):
        sys.exit(1)


if __name__ == "__main__":
    main()
