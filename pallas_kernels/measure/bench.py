"""The recurrences and losses of this machine's backend timed, every implementation in one run, as ratios."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import layout
from pallas_kernels.gdn import gdn
from pallas_kernels.measure import gdn_forms, loss_forms
from pallas_kernels.shared.triangular import invert_unit_lower
from pallas_kernels.testing import gated_delta_inputs, recurrence_inputs
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7

OPERATIONS: dict[str, Callable[..., Any]] = {"wkv7": wkv7, "wkv6": wkv6, "gdn": gdn}
SHAPES = ["2,512,9,64", "1,8192,28,128"]
# The forms that autodiff makes keep far more than the inputs: they run on a shorter sequence, and their time is
# scaled up to the full one (they are linear in T).
_COMPARISON_ELEMENTS = 2**21
# 32 is what published pairwise code takes unless told otherwise; the smaller ones are the fastest on a CPU.
_PAIRWISE_CHUNKS = (8, 16, 32)
_PLAIN_CHUNKS = (16, 32, 64)  # the last is transformers' own

_Gradient = Callable[..., Any]


def _pairwise(size, *, r, log_w, k, v, a=None, b=None):
    """The usual chunked form, chunks of `size`: decays for each pair of tokens in [C,C,K] arrays, JAX's own gradient.

    Serves wkv7 and, without a and b, wkv6; T is a whole number of chunks.
    """
    lower = jnp.tril(jnp.ones((size, size), bool))[..., None]
    strict = jnp.tril(lower[..., 0], -1)[..., None]

    def decays(from_total, to_total, mask):
        gap = from_total[..., :, None, :] - to_total[..., None, :, :]
        # Without the barrier XLA's CPU backend computes each decay anew for every use of it, many times slower.
        return jax.lax.optimization_barrier(jnp.exp(jnp.where(mask, gap, -jnp.inf)))

    def products(left, right, decay):
        return jnp.einsum("bhijk,bhjk->bhij", left[..., :, None, :] * decay, right)

    @jax.checkpoint
    def step(state, chunk):
        r, log_w, k, v = chunk[:4]
        total = layout.prefix_sums(log_w)
        last = total[..., -1:, :]
        inclusive = decays(total, total, lower)
        out = (r * jnp.exp(total)) @ state + products(r, k, inclusive) @ v
        new = jnp.exp(layout.transpose(last)) * state + layout.transpose(k * jnp.exp(last - total)) @ v
        if len(chunk) > 4:
            a, b = chunk[4:]
            before = total - log_w
            exclusive = decays(before, total, strict)
            known = (a * jnp.exp(before)) @ state + products(a, k, exclusive) @ v
            u = invert_unit_lower(products(a, b, exclusive)) @ known
            out = out + products(r, b, inclusive) @ u
            new = new + layout.transpose(b * jnp.exp(last - total)) @ u
        return new, out

    arrays = [r, log_w, k, v] + ([] if a is None else [a, b])
    batch, length, heads, key_size = r.shape
    state = jnp.zeros((batch, heads, key_size, v.shape[-1]), jnp.float32)
    chunks = tuple(x.reshape(batch, length // size, size, heads, -1).transpose(1, 0, 3, 2, 4) for x in arrays)
    state, out = jax.lax.scan(step, state, chunks)
    return out.transpose(1, 0, 3, 2, 4).reshape(v.shape), state


def _others(operation: str) -> dict[str, Callable[..., Any]]:
    """The usual chunked forms of an operation, for which JAX finds the gradient."""
    if operation == "gdn":
        return {f"plain {size}": functools.partial(gdn_forms.plain_chunked, chunk_size=size) for size in _PLAIN_CHUNKS}
    return {f"pairwise {size}": functools.partial(_pairwise, size) for size in _PAIRWISE_CHUNKS}


def _runs(operation: str, backward: bool, chunk_size: int | None) -> dict[str, _Gradient]:
    """name -> jitted function of the inputs' dict, for every form compared."""
    public = OPERATIONS[operation]
    forms: dict[str, Callable[..., Any]] = {
        "chunked": lambda **x: public(**x, implementation="chunked", chunk_size=chunk_size),
        **_others(operation),
        "reference": lambda **x: public(**x, implementation="reference"),
    }

    def loss(form: Callable[..., Any]) -> Callable[..., Any]:
        def run(inputs: dict[str, jax.Array]) -> jax.Array:
            out, state = form(**inputs)
            return jnp.sum(out * out) + jnp.sum(state)

        return jax.jit(jax.grad(run) if backward else lambda inputs: form(**inputs))

    return {name: loss(form) for name, form in forms.items()}


def _medians(
    functions: dict[str, _Gradient], arguments: dict[str, Any], repeats: int, untimed: bool = True
) -> dict[str, float]:
    """Seconds per call, the functions taking turns so that a busy moment meets all of them.

    untimed: a turn begins with a call that does not count. What the others left in caches and allocator is not this
    one's cost; where a call takes many seconds, it is none that shows.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            if untimed:
                jax.block_until_ready(function(arguments[name]))
            start = time.perf_counter()
            jax.block_until_ready(function(arguments[name]))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _inputs_of(operation: str, batch: int, length: int, heads: int, size: int) -> dict[str, jax.Array]:
    """Random arguments, for gdn as many key heads as heads."""
    if operation == "gdn":
        made = gated_delta_inputs(batch, length, heads, heads, size, size, log_g_range=(-3.0, -1e-3))
    else:
        made = recurrence_inputs(operation, batch, length, heads, size, size)
    return {name: jnp.asarray(x) for name, x in made.items()}


def compare(operation: str, shape: tuple[int, int, int, int], repeats: int, chunk_size: int | None) -> None:
    """Prints forward and forward+backward of one operation at one shape."""
    batch, length, heads, size = shape
    short = max(64, _COMPARISON_ELEMENTS // (batch * heads * size) // 64 * 64)
    forms = _runs(operation, False, chunk_size)
    lengths = {name: length if name == "chunked" else min(length, short) for name in forms}
    arguments = {name: _inputs_of(operation, batch, t, heads, size) for name, t in lengths.items()}
    for backward in (False, True):
        seconds = _medians(_runs(operation, backward, chunk_size), arguments, repeats)
        seconds = {name: value * length / lengths[name] for name, value in seconds.items()}
        label = f"{operation} B={batch} T={length} H={heads} K=V={size}"
        for name, value in seconds.items():
            scaled = "" if lengths[name] == length else f"  (from T={lengths[name]})"
            print(
                f"{label:36s} {'forward+backward' if backward else 'forward':17s} {name:12s} "
                f"{value * 1e3:10.1f} ms {value / seconds['chunked']:7.2f}x{scaled}",
                flush=True,
            )


def compare_losses(size: loss_forms.Size, repeats: int) -> None:
    """Prints time and the compiler's memory of every loss with its gradients, sliced and plain, in float32."""
    for loss in loss_forms.LOSSES:
        arrays = loss_forms.arguments(loss, size, jnp.float32)
        programs: dict[str, Any] = {
            form: jax.jit(loss_forms.value_and_gradients(loss, form)).lower(arrays).compile()
            for form in loss_forms.FORMS
        }
        seconds = _medians(programs, dict.fromkeys(programs, arrays), repeats, untimed=False)
        for form, program in programs.items():
            temporary = program.memory_analysis().temp_size_in_bytes
            print(
                f"{loss:14s} N={size.tokens} vocab={size.vocab} D={size.width} value+gradients {form:7s} "
                f"{seconds[form]:8.2f} s {seconds[form] / seconds['sliced']:6.2f}x {temporary / 2**20:9.0f} MiB",
                flush=True,
            )
