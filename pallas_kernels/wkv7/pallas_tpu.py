"""wkv7 for TPUs (Pallas, Mosaic): one pass over the sequence forward, one backward, several heads a grid step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import layout
from pallas_kernels.shared import tpu
from pallas_kernels.wkv7.chunked import Inputs
from pallas_kernels.wkv7.pallas_tpu_backward import backward_kernel
from pallas_kernels.wkv7.pallas_tpu_chunk import Plan
from pallas_kernels.wkv7.pallas_tpu_forward import forward_kernel

DEFAULT_CHUNK_SIZE = 64
MAX_HEADS = 16
MAX_CHANNELS = 1024
_VMEM_LIMIT = 48 * 2**20


def wkv7_pallas_tpu(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `wkv7`. Products are bfloat16 with float32 sums where r, k, v, a and b are all bfloat16, else float32.

    Right for sums of log_w above -60 over any half chunk: log_w >= -1.8 in chunks of 64, the default. Backward keeps
    the inputs and one state a chunk, in the products' dtype: for bfloat16 and K = V = 128 two sevenths as many bytes
    again. `interpret` is pallas_call's; None interprets wherever there is no TPU.
    """
    key_size, value_size = r.shape[-1], v.shape[-1]
    tpu.check_sizes("wkv7", key_size, value_size, chunk_size)
    length, heads = r.shape[1:3]
    size = min(chunk_size or DEFAULT_CHUNK_SIZE, max(tpu.CHUNK_SIZES[0], layout.fitting_chunk(length, 128)))
    chunks = 2 if size <= tpu.LANES // 2 and length > size else 1
    dtype = jnp.bfloat16 if jnp.result_type(r, k, v, a, b) == jnp.bfloat16 else jnp.float32
    # float32 products are six passes each: fewer heads hide as much and compile in a fraction of the time.
    most = MAX_HEADS if dtype == jnp.bfloat16 else MAX_HEADS // 4
    group, padded_heads = head_groups(heads, key_size, value_size, most)
    plan = Plan(size, chunks, group, key_size, value_size, dtype)
    more_heads = padded_heads - heads

    counts = tpu.resets_so_far(segment_ids, plan.rows, size)
    state = jnp.pad(initial_state, ((0, 0), (0, more_heads), (0, 0), (0, 0)))
    inputs = Inputs(*(tpu.wide(x, plan.rows, more_heads) for x in (r, log_w, k, v, a, b)))
    out, final_state = recurrence(plan, tpu.interpreted(interpret), inputs, layout.transpose(state), counts)
    out = out.reshape(*out.shape[:2], padded_heads, value_size)[:, :length, :heads]
    return out, layout.transpose(final_state[:, :heads])


def head_groups(heads: int, key_size: int, value_size: int, most: int = MAX_HEADS) -> tuple[int, int]:
    """Heads of a grid step, and all heads with those added that fill the last group.

    A group's channels are a whole number of lanes, unless it has all heads; heads are added where nothing else fits.
    """
    if heads <= most:
        return heads, heads
    whole = [group for group in range(most, most // 2 - 1, -1) if not group * min(key_size, value_size) % tpu.LANES]
    for group in whole:
        if heads % group == 0:
            return group, heads
    if heads * max(key_size, value_size) <= MAX_CHANNELS:
        return heads, heads
    # A grid step takes about as long as eight heads even before its first.
    return min(((group, -(-heads // group) * group) for group in whole), key=lambda pair: pair[1] * (1 + 8 / pair[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(
    plan: Plan, interpret: Any, inputs: Inputs, initial_state: jax.Array, counts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Inputs [B,T,H*K] of whole blocks; states [B,H,V,K]."""
    out, final_state, _ = _run_forward(plan, interpret, False, inputs, initial_state, counts)
    return out, final_state


def _recurrence_forward(
    plan: Plan, interpret: Any, inputs: Inputs, initial_state: jax.Array, counts: jax.Array | None
) -> Any:
    """Keeps the inputs and the state each chunk begins with."""
    out, final_state, states = _run_forward(plan, interpret, True, inputs, initial_state, counts)
    return (out, final_state), (inputs, counts, states)


def _recurrence_backward(plan: Plan, interpret: Any, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The blocks in reverse."""
    inputs, counts, states = kept
    d_out, d_final = cotangents
    specs = _block_specs(plan, inputs, reverse=True)
    operands = [*inputs, *([] if counts is None else [counts]), states, d_out, d_final]
    names = ["key", "key", "key", "value", "key", "key", *([] if counts is None else ["counts"])]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, d_final)]
    gradients = pl.pallas_call(
        functools.partial(backward_kernel, plan, counts is not None),
        grid=_grid(plan, inputs),
        in_specs=[specs[name] for name in (*names, "states", "value", "state")],
        out_specs=[specs[name] for name in ("key", "key", "key", "value", "key", "key", "state")],
        out_shape=shapes,
        compiler_params=tpu.compiler_params(_VMEM_LIMIT),
        interpret=interpret,
        name="wkv7_backward",
    )(*operands)
    return Inputs(*gradients[:6]), gradients[6], None


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _run_forward(
    plan: Plan,
    interpret: Any,
    keep_states: bool,
    inputs: Inputs,
    initial_state: jax.Array,
    counts: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs, final state and, where asked for, the state before each chunk [B,N,H,V,K]."""
    specs = _block_specs(plan, inputs, reverse=False)
    operands = [*inputs, *([] if counts is None else [counts]), initial_state]
    names = ["key", "key", "key", "value", "key", "key", *([] if counts is None else ["counts"]), "state"]
    batch, length = inputs.r.shape[:2]
    shapes = [
        jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype),
        jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
    ]
    if keep_states:
        states = (batch, length // plan.size, *initial_state.shape[1:])
        shapes.append(jax.ShapeDtypeStruct(states, plan.dtype))
    out, final_state, *states = pl.pallas_call(
        functools.partial(forward_kernel, plan, counts is not None),
        grid=_grid(plan, inputs),
        in_specs=[specs[name] for name in names],
        out_specs=[specs[name] for name in ("value", "state", "states")[: len(shapes)]],
        out_shape=shapes,
        compiler_params=tpu.compiler_params(_VMEM_LIMIT),
        interpret=interpret,
        name="wkv7_forward",
    )(*operands)
    return out, final_state, states[0] if states else None


def _grid(plan: Plan, inputs: Inputs) -> tuple[int, int, int]:
    batch, length, width = inputs.r.shape
    return batch, width // (plan.heads * plan.key_size), length // plan.rows


def _block_specs(plan: Plan, inputs: Inputs, reverse: bool) -> dict[str, pl.BlockSpec]:
    return tpu.block_specs(
        inputs.r.shape[1],
        size=plan.size,
        chunks=plan.chunks,
        key_channels=plan.heads * plan.key_size,
        value_channels=plan.heads * plan.value_size,
        state=(plan.heads, plan.value_size, plan.key_size),
        reverse=reverse,
    )
