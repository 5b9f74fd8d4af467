"""wkv6 by Triton kernels, forward and backward, for NVIDIA GPUs of compute capability 8.0 and up.

The kernels are in `triton_kernels`; how they are called, and the pass over chunks, are in `shared`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.shared.triton_call import (
    Plan,
    Tuning,
    as_pointer,
    fill,
    import_kernels,
    make_plan,
    pass_states,
    run,
)

# Warps and blocks with which no kernel spills a register on sm_80, sm_90 or sm_100.
_TUNED: Tuning = {
    "bfloat16": {
        "prepare": {"num_warps": 4, "BLOCK": 32},
        "pass_states": {"num_warps": 4, "BLOCK": 32},
        "combine": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 64},
        "key_gradients": {"num_warps": 4, "BLOCK": 16, "BLOCK_V": 32},
    },
    "float32": {
        "prepare": {"num_warps": 2, "BLOCK": 16},
        "pass_states": {"num_warps": 4, "BLOCK": 16},
        "combine": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 32},
        "key_gradients": {"num_warps": 4, "BLOCK": 16, "BLOCK_V": 32},
    },
}


class _Inputs(NamedTuple):
    """[B,T,H,K], v [B,T,H,V]; log_w float32, the others of the plan's dtype."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array


class _Prepared(NamedTuple):
    """What `triton_kernels.prepare` makes of the inputs."""

    k_end: jax.Array
    r_head: jax.Array
    inner: jax.Array
    decay: jax.Array


def _levels(plan: Plan) -> int:
    """The number after the last level's, whose spans are half a chunk."""
    return plan.C.bit_length() - 1


def _prepare(plan: Plan, inputs: _Inputs, segment_ids: jax.Array | None) -> _Prepared:
    decay = plan.per_chunk(2, plan.K, dtype=jnp.float32)
    outputs = [plan.keys(), plan.keys(), plan.per_chunk(plan.C, plan.C), decay]
    arguments = (*inputs[:3], as_pointer(segment_ids))
    kernel, resets = import_kernels("wkv6").prepare, segment_ids is not None
    return _Prepared(*run(plan, _TUNED, kernel, arguments, outputs, RESETS=resets, LEVELS=_levels(plan)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(plan: Plan, inputs: _Inputs, state: jax.Array, segment_ids: jax.Array | None) -> Any:
    """(o, final_state)."""
    return _recurrence_forward(plan, inputs, state, segment_ids)[0]


def _recurrence_forward(plan: Plan, inputs: _Inputs, state: jax.Array, segment_ids: jax.Array | None) -> Any:
    """Keeps the inputs and the state each chunk begins with, in the inputs' dtype."""
    ready = _prepare(plan, inputs, segment_ids)
    _, states, final_state = pass_states(plan, _TUNED, None, ready.k_end, inputs.v, ready.decay, state, reverse=False)
    arguments = (ready.r_head, states, ready.inner, inputs.v)
    kernel = import_kernels("wkv6").combine
    (out,) = run(plan, _TUNED, kernel, arguments, [plan.values()], blocks_of=plan.V, TRANSPOSED=False)
    return (out, final_state), (inputs, segment_ids, states)


def _recurrence_backward(plan: Plan, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """Prepares the chunks again, passes the state's gradient back through them, then takes all at once."""
    inputs, segment_ids, states = kept
    d_out, d_final = cotangents
    kernels, ids, resets = import_kernels("wkv6"), as_pointer(segment_ids), segment_ids is not None
    ready = _prepare(plan, inputs, segment_ids)
    _, d_states, d_state = pass_states(plan, _TUNED, None, ready.r_head, d_out, ready.decay, d_final, reverse=True)
    arguments = (ready.k_end, d_states, ready.inner, d_out)
    (d_v,) = run(plan, _TUNED, kernels.combine, arguments, [plan.values()], blocks_of=plan.V, TRANSPOSED=True)
    outputs = [plan.keys(), plan.keys(jnp.float32), plan.keys()]
    arguments = (*inputs, ids, ready.decay, d_out, states, d_states)
    d_r, d_log_w, d_k = run(
        plan, _TUNED, kernels.key_gradients, arguments, outputs, blocks_of=plan.K, RESETS=resets, LEVELS=_levels(plan)
    )
    return _Inputs(d_r, d_log_w, d_k, d_v), d_state, None


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def wkv6_triton(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `wkv6`. Products are bfloat16 where r, k and v all are, else float32 in chunks of 16.

    Right for log_w >= -10.
    """
    import_kernels("wkv6")
    plan = make_plan("wkv6", r, v, (k,), chunk_size)
    r, k = (fill(x, plan.K, dtype=plan.dtype) for x in (r, k))
    inputs = _Inputs(r, fill(log_w, plan.K, dtype=jnp.float32), k, fill(v, plan.V, dtype=plan.dtype))
    ids = None if segment_ids is None else segment_ids.astype(jnp.int32)
    out, final_state = recurrence(plan, inputs, fill(initial_state, plan.K, plan.V, dtype=jnp.float32), ids)
    key_size, value_size = initial_state.shape[-2:]
    return out[..., :value_size].astype(v.dtype), final_state[..., :key_size, :value_size]
