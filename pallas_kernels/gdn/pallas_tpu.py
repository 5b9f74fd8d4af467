"""gdn for TPUs (Pallas, Mosaic): one pass over the sequence forward, one backward, several heads a grid step."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import layout
from pallas_kernels.gdn.chunked import two_parts, with_resets
from pallas_kernels.gdn.pallas_tpu_backward import backward_kernel
from pallas_kernels.gdn.pallas_tpu_chunk import Plan
from pallas_kernels.gdn.pallas_tpu_forward import forward_kernel
from pallas_kernels.shared import tpu

DEFAULT_CHUNK_SIZE = 128
MAX_HEADS = 16
MAX_CHANNELS = 1024
_VMEM_LIMIT = 56 * 2**20


class _Inputs(NamedTuple):
    """Sequences [B,T,G*K], v [B,T,H*V]; log_g and beta [B,S,N,heads,C] float32, S groups of heads, N chunks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_g: jax.Array
    beta: jax.Array


def gdn_pallas_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `gdn`. Products are bfloat16 with float32 sums where q, k and v are all bfloat16, else float32.

    Backward keeps the inputs and one state a chunk, in the products' dtype: for K = V = 128 and chunks of 128, the
    default, as many bytes again as v has. `interpret` is pallas_call's; None interprets wherever there is no TPU.
    """
    (batch, length, heads, value_size), (groups, key_size) = v.shape, q.shape[2:]
    tpu.check_sizes("gdn", key_size, value_size, chunk_size)
    if heads // groups > MAX_HEADS:
        raise NotImplementedError(
            f"gdn on TPU got {heads // groups} heads for each key head, expected at most {MAX_HEADS}; take "
            "implementation='chunked'."
        )
    default = max(tpu.CHUNK_SIZES[0], layout.fitting_chunk(length, DEFAULT_CHUNK_SIZE))
    size = min(chunk_size or DEFAULT_CHUNK_SIZE, default)
    dtype = jnp.bfloat16 if jnp.result_type(q, k, v) == jnp.bfloat16 else jnp.float32
    # float32 products are six passes each: fewer heads hide as much and compile in a fraction of the time.
    most = MAX_HEADS if dtype == jnp.bfloat16 else max(MAX_HEADS // 4, heads // groups)
    step_groups, padded = head_groups(groups, heads // groups, key_size, value_size, most)
    more = padded - groups
    plan = Plan(size, step_groups * (heads // groups), step_groups, key_size, value_size, dtype)
    more_heads = more * (heads // groups)

    def rows(x: jax.Array) -> jax.Array:
        x = tpu.filled(x.astype(jnp.float32), size, more_heads)
        return x.reshape(batch, -1, size, x.shape[2] // plan.heads, plan.heads).transpose(0, 3, 1, 4, 2)

    log_g = with_resets(log_g, segment_ids)
    inputs = _Inputs(
        tpu.wide(q, size, more), tpu.wide(k, size, more), tpu.wide(v, size, more_heads), rows(log_g), rows(beta)
    )
    state = jnp.pad(initial_state, ((0, 0), (0, more_heads), (0, 0), (0, 0)))
    out, final_state = recurrence(plan, tpu.interpreted(interpret), inputs, state)
    out = out.reshape(*out.shape[:2], heads + more_heads, value_size)[:, :length, :heads]
    return out, final_state[:, :heads]


def head_groups(
    groups: int, heads_of_one: int, key_size: int, value_size: int, most: int = MAX_HEADS
) -> tuple[int, int]:
    """Key heads of a grid step, and all key heads with those added that fill the last step.

    A step's channels are a whole number of lanes, unless it has all heads; heads are added where nothing else fits.
    """
    if groups * heads_of_one <= most:
        return groups, groups
    # Key heads whose keys and values both fill lanes: one, or two of 64 channels.
    unit = math.lcm(*(tpu.LANES // math.gcd(tpu.LANES, size) for size in (key_size, heads_of_one * value_size)))
    largest = max(most // heads_of_one, unit)
    smallest = max(most // heads_of_one // 2, 1)
    whole = [n for n in range(largest, smallest - 1, -1) if n % unit == 0]
    for count in whole:
        if groups % count == 0:
            return count, groups
    if groups * heads_of_one * max(key_size, value_size) <= MAX_CHANNELS:
        return groups, groups
    # A grid step takes about as long as eight heads even before its first.
    return min(((n, -(-groups // n) * n) for n in whole), key=lambda pair: pair[1] * (1 + 8 / (pair[0] * heads_of_one)))


def _gate_rows(plan: Plan, inputs: _Inputs) -> jax.Array:
    """[B,S,N,(parts+1)*heads,C]: G from each chunk's start, in parts, then beta."""
    parts = two_parts(inputs.log_g) if plan.parts == 2 else inputs.log_g[None]
    lower = jnp.triu(jnp.ones((plan.size, plan.size), jnp.float32))
    sums = [jnp.matmul(part, lower, precision=jax.lax.Precision.HIGHEST) for part in parts]
    return jnp.concatenate([*sums, inputs.beta], axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(plan: Plan, interpret: Any, inputs: _Inputs, initial_state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs of whole chunks; states [B,H,K,V]."""
    out, final_state, _ = _run_forward(plan, interpret, False, inputs, initial_state)
    return out, final_state


def _recurrence_forward(plan: Plan, interpret: Any, inputs: _Inputs, initial_state: jax.Array) -> Any:
    """Keeps the inputs and the state each chunk begins with."""
    out, final_state, states = _run_forward(plan, interpret, True, inputs, initial_state)
    return (out, final_state), (inputs, states)


def _recurrence_backward(plan: Plan, interpret: Any, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The chunks in reverse."""
    inputs, states = kept
    d_out, d_final = cotangents
    specs = _block_specs(plan, inputs, reverse=True)
    names = ("key", "key", "value", "gates", "states", "value", "state")
    d_gates = (*inputs.beta.shape[:3], 3 * plan.heads, plan.size)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs[:3]]
    shapes += [jax.ShapeDtypeStruct(d_gates, jnp.float32), jax.ShapeDtypeStruct(d_final.shape, d_final.dtype)]
    d_q, d_k, d_v, d_gates, d_initial = pl.pallas_call(
        functools.partial(backward_kernel, plan),
        grid=_grid(plan, inputs),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("key", "key", "value", "d_gates", "state")],
        out_shape=shapes,
        compiler_params=tpu.compiler_params(_VMEM_LIMIT),
        interpret=interpret,
        name="gdn_backward",
    )(*inputs[:3], _gate_rows(plan, inputs), states, d_out, d_final)
    d_total, d_rest, d_beta = jnp.split(d_gates, 3, axis=-2)
    later = jnp.tril(jnp.ones((plan.size, plan.size), jnp.float32))
    # A token's decay is in each G from it on and in each G_C - G before it.
    both, sums = jnp.concatenate([d_total, d_rest], axis=-1), jnp.concatenate([later, 1 - later])
    d_log_g = jnp.matmul(both, sums, precision=jax.lax.Precision.HIGHEST)
    return _Inputs(d_q, d_k, d_v, d_log_g, d_beta), d_initial


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _run_forward(
    plan: Plan, interpret: Any, keep_states: bool, inputs: _Inputs, initial_state: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final state and, where asked for, the state before each chunk [B,N,H,K,V]."""
    specs = _block_specs(plan, inputs, reverse=False)
    shapes = [
        jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype),
        jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
    ]
    if keep_states:
        states = (inputs.v.shape[0], inputs.v.shape[1] // plan.size, *initial_state.shape[1:])
        shapes.append(jax.ShapeDtypeStruct(states, plan.dtype))
    out, final_state, *states = pl.pallas_call(
        functools.partial(forward_kernel, plan),
        grid=_grid(plan, inputs),
        in_specs=[specs[name] for name in ("key", "key", "value", "gates", "state")],
        out_specs=[specs[name] for name in ("value", "state", "states")[: len(shapes)]],
        out_shape=shapes,
        compiler_params=tpu.compiler_params(_VMEM_LIMIT),
        interpret=interpret,
        name="gdn_forward",
    )(*inputs[:3], _gate_rows(plan, inputs), initial_state)
    return out, final_state, states[0] if states else None


def _grid(plan: Plan, inputs: _Inputs) -> tuple[int, int, int]:
    batch, length, width = inputs.v.shape
    return batch, width // (plan.heads * plan.value_size), length // plan.size


def _block_specs(plan: Plan, inputs: _Inputs, reverse: bool) -> dict[str, pl.BlockSpec]:
    return tpu.block_specs(
        inputs.v.shape[1],
        size=plan.size,
        key_channels=plan.groups * plan.key_size,
        value_channels=plan.heads * plan.value_size,
        state=(plan.heads, plan.key_size, plan.value_size),
        rows={"gates": (plan.parts + 1) * plan.heads, "d_gates": 3 * plan.heads},
        reverse=reverse,
    )
