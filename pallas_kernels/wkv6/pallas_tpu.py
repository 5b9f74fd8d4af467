"""wkv6 for TPUs (Pallas, Mosaic): one pass over the sequence forward, one backward, several heads a grid step."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import layout
from pallas_kernels.shared import tpu
from pallas_kernels.wkv6.chunked import Inputs
from pallas_kernels.wkv6.levels import levels
from pallas_kernels.wkv6.pallas_tpu_kernels import Plan, backward_kernel, forward_kernel

DEFAULT_CHUNK_SIZE = 128
MAX_HEADS = 8
_VMEM_LIMIT = 48 * 2**20


def wkv6_pallas_tpu(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `wkv6`. Products are bfloat16 with float32 sums where r, k and v are all bfloat16, else float32.

    Right for log_w >= -10. Backward keeps the inputs and one state a chunk, in the dtype of the products: as much as
    one input at 128 tokens and 128 channels. `interpret` is pallas_call's; None interprets wherever there is no TPU.
    """
    key_size, value_size = r.shape[-1], v.shape[-1]
    tpu.check_sizes("wkv6", key_size, value_size, chunk_size)
    length, heads = r.shape[1:3]
    size = max(tpu.CHUNK_SIZES[0], layout.fitting_chunk(length, chunk_size or DEFAULT_CHUNK_SIZE))
    group, padded_heads = head_groups(heads, key_size, value_size)
    dtype = jnp.bfloat16 if jnp.result_type(r, k, v) == jnp.bfloat16 else jnp.float32
    plan = Plan(size, group, key_size, value_size, dtype)
    more_heads = padded_heads - heads

    counts = tpu.resets_so_far(segment_ids, size, size)
    state = jnp.pad(initial_state, ((0, 0), (0, more_heads), (0, 0), (0, 0)))
    inputs = Inputs(*(tpu.wide(x, size, more_heads) for x in (r, log_w, k, v)))
    out, final_state = recurrence(plan, tpu.interpreted(interpret), inputs, layout.transpose(state), counts)
    out = out.reshape(*out.shape[:2], padded_heads, value_size)[:, :length, :heads]
    return out, layout.transpose(final_state[:, :heads])


def head_groups(heads: int, key_size: int, value_size: int) -> tuple[int, int]:
    """Heads of a grid step, and all heads with those added that fill the last group: as few as possible.

    A group's channels are a whole number of lanes, unless it has all heads.
    """
    if heads <= MAX_HEADS:
        return heads, heads
    whole = [
        group for group in range(MAX_HEADS // 2, MAX_HEADS + 1) if not group * min(key_size, value_size) % tpu.LANES
    ]
    return min(((group, -(-heads // group) * group) for group in whole), key=lambda pair: (pair[1], -pair[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(
    plan: Plan, interpret: Any, inputs: Inputs, initial_state: jax.Array, counts: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Inputs [B,T,H*K] of whole chunks; states [B,H,V,K]."""
    out, final_state, _ = _run_forward(plan, interpret, False, inputs, initial_state, counts)
    return out, final_state


def _recurrence_forward(
    plan: Plan, interpret: Any, inputs: Inputs, initial_state: jax.Array, counts: jax.Array | None
) -> Any:
    """Keeps the inputs and the state each chunk begins with."""
    out, final_state, states = _run_forward(plan, interpret, True, inputs, initial_state, counts)
    return (out, final_state), (inputs, counts, states)


def _recurrence_backward(plan: Plan, interpret: Any, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """The chunks in reverse."""
    inputs, counts, states = kept
    d_out, d_final = cotangents
    specs = _block_specs(plan, inputs, reverse=True)
    fixed = [*_forward_constants(plan), *_backward_constants(plan)]
    operands = [*inputs, *([] if counts is None else [counts]), states, d_out, d_final]
    names = ["key", "key", "key", "value", *([] if counts is None else ["counts"]), "states", "value", "state"]
    gradients = pl.pallas_call(
        functools.partial(backward_kernel, plan, counts is not None),
        grid=_grid(plan, inputs),
        in_specs=[*map(_whole, fixed), *(specs[name] for name in names)],
        out_specs=[specs[name] for name in ("key", "key", "key", "value", "state")],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, d_final)],
        compiler_params=tpu.compiler_params(_VMEM_LIMIT),
        interpret=interpret,
        name="wkv6_backward",
    )(*fixed, *operands)
    return Inputs(*gradients[:4]), gradients[4], None


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
    fixed = _forward_constants(plan)
    operands = [*inputs, *([] if counts is None else [counts]), initial_state]
    names = ["key", "key", "key", "value", *([] if counts is None else ["counts"]), "state"]
    batch, length = inputs.r.shape[:2]
    shapes = [
        jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype),
        jax.ShapeDtypeStruct(initial_state.shape, jnp.float32),
    ]
    if keep_states:
        shapes.append(jax.ShapeDtypeStruct((batch, length // plan.size, *initial_state.shape[1:]), plan.dtype))
    out, final_state, *states = pl.pallas_call(
        functools.partial(forward_kernel, plan, counts is not None),
        grid=_grid(plan, inputs),
        in_specs=[*map(_whole, fixed), *(specs[name] for name in names)],
        out_specs=[specs[name] for name in ("value", "state", "states")[: len(shapes)]],
        out_shape=shapes,
        compiler_params=tpu.compiler_params(_VMEM_LIMIT),
        interpret=interpret,
        name="wkv6_forward",
    )(*fixed, *operands)
    return out, final_state, states[0] if states else None


def _forward_constants(plan: Plan) -> list[jax.Array]:
    """What sums log_w within groups: from the middle, from the start, to the end; and the pairs i >= j in one group."""
    constants = levels(plan.size)
    group = constants.masks[0] + np.eye(plan.size, dtype=np.float32)
    sums = np.concatenate([constants.sums[0], group, constants.masks[0].T])
    if plan.dtype == jnp.bfloat16:
        sums = np.concatenate([sums, sums], axis=1)
    return [jnp.asarray(sums, plan.dtype), jnp.asarray(group)]


def _backward_constants(plan: Plan) -> list[jax.Array]:
    """The sums transposed, and masks of pairs: i > j in a group, i < j in a group, both ways those of each level."""
    constants = levels(plan.size)
    flipped = constants.masks.swapaxes(1, 2)
    masks = np.concatenate([constants.masks[:1], flipped[:1], (constants.masks + flipped)[1:]])
    return [jnp.asarray(constants.sums.reshape(-1, plan.size).T, plan.dtype), jnp.asarray(masks, plan.dtype)]


def _grid(plan: Plan, inputs: Inputs) -> tuple[int, int, int]:
    batch, length, width = inputs.r.shape
    return batch, width // (plan.heads * plan.key_size), length // plan.size


def _block_specs(plan: Plan, inputs: Inputs, reverse: bool) -> dict[str, pl.BlockSpec]:
    return tpu.block_specs(
        inputs.r.shape[1],
        size=plan.size,
        key_channels=plan.heads * plan.key_size,
        value_channels=plan.heads * plan.value_size,
        state=(plan.heads, plan.value_size, plan.key_size),
        reverse=reverse,
    )


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda b, h, n: (0,) * x.ndim)
