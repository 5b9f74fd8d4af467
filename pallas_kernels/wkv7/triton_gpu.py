"""wkv7 by Triton kernels, forward and backward, for NVIDIA GPUs of compute capability 8.0 and up.

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
        "outputs": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 64},
        "adjoint_values": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 64},
        "pair_gradients": {"num_warps": 4, "BLOCK": 32, "BLOCK_K": 32},
        "key_gradients": {"num_warps": 8, "BLOCK": 64, "BLOCK_V": 32},
    },
    "float32": {
        "prepare": {"num_warps": 4, "BLOCK": 32},
        "pass_states": {"num_warps": 4, "BLOCK": 16},
        "outputs": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 32},
        "adjoint_values": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 32},
        "pair_gradients": {"num_warps": 4, "BLOCK": 32, "BLOCK_K": 32},
        "key_gradients": {"num_warps": 4, "BLOCK": 32, "BLOCK_V": 32},
    },
}


class _Inputs(NamedTuple):
    """[B,T,H,K], v [B,T,H,V]; log_w float32, the others of the plan's dtype."""

    r: jax.Array
    log_w: jax.Array
    k: jax.Array
    v: jax.Array
    a: jax.Array
    b: jax.Array


class _Prepared(NamedTuple):
    """What `triton_kernels.prepare` makes of the inputs."""

    w: jax.Array
    u0: jax.Array
    b_end: jax.Array
    k_end: jax.Array
    r_head: jax.Array
    inner: jax.Array
    decay: jax.Array


def _prepare(plan: Plan, inputs: _Inputs, segment_ids: jax.Array | None) -> _Prepared:
    keys, values = plan.keys(), plan.values()
    inner, decay = plan.per_chunk(4, plan.C, plan.C), plan.per_chunk(2, plan.K, dtype=jnp.float32)
    outputs = [keys, values, keys, keys, keys, inner, decay]
    kernel, resets = import_kernels("wkv7").prepare, segment_ids is not None
    return _Prepared(*run(plan, _TUNED, kernel, (*inputs, as_pointer(segment_ids)), outputs, RESETS=resets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(plan: Plan, inputs: _Inputs, state: jax.Array, segment_ids: jax.Array | None) -> Any:
    """(o, final_state)."""
    return _recurrence_forward(plan, inputs, state, segment_ids)[0]


def _recurrence_forward(plan: Plan, inputs: _Inputs, state: jax.Array, segment_ids: jax.Array | None) -> Any:
    """Keeps the inputs and the state each chunk begins with, in the inputs' dtype."""
    ready = _prepare(plan, inputs, segment_ids)
    removal = (ready.w, ready.u0, ready.b_end)
    u, states, final_state = pass_states(
        plan, _TUNED, removal, ready.k_end, inputs.v, ready.decay, state, reverse=False
    )
    arguments = (ready.r_head, ready.inner, u, inputs.v, states)
    (out,) = run(plan, _TUNED, import_kernels("wkv7").outputs, arguments, [plan.values()], blocks_of=plan.V)
    return (out, final_state), (inputs, segment_ids, states)


def _recurrence_backward(plan: Plan, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """Prepares the chunks again, passes the state's gradient back through them, then takes all at once."""
    inputs, segment_ids, states = kept
    d_out, d_final = cotangents
    kernels, ids, resets = import_kernels("wkv7"), as_pointer(segment_ids), segment_ids is not None
    keys, values, pairs = plan.keys(), plan.values(), plan.per_chunk(4, plan.C, plan.C)
    ready = _prepare(plan, inputs, segment_ids)
    arguments: tuple[jax.Array, ...] = (ready.w, ready.inner, ready.u0, states, d_out)
    u, z = run(plan, _TUNED, kernels.adjoint_values, arguments, [values, values], blocks_of=plan.V)
    removal = (ready.b_end, z, ready.w)
    d_u, d_states, d_state = pass_states(plan, _TUNED, removal, ready.r_head, d_out, ready.decay, d_final, reverse=True)
    arguments = (ready.k_end, ready.inner, u, inputs.v, d_u, d_out, d_states, ids)
    d_v, d_y, d_inner = run(plan, _TUNED, kernels.pair_gradients, arguments, [values, values, pairs], RESETS=resets)
    arguments = (*inputs, ids, ready.decay, u, d_y, d_out, states, d_states, d_inner)
    outputs = [keys, plan.keys(jnp.float32), keys, keys, keys]
    d_r, d_log_w, d_k, d_a, d_b = run(
        plan, _TUNED, kernels.key_gradients, arguments, outputs, blocks_of=plan.K, RESETS=resets
    )
    return _Inputs(d_r, d_log_w, d_k, d_v, d_a, d_b), d_state, None


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def wkv7_triton(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `wkv7`. Products are bfloat16 where r, k, v, a and b all are, else float32 in chunks of 16.

    Outputs are right for log_w >= -3.6; below -1.8 log_w's gradient loses digits by cancellation.
    """
    import_kernels("wkv7")
    plan = make_plan("wkv7", r, v, (k, a, b), chunk_size)
    r, k, a, b = (fill(x, plan.K, dtype=plan.dtype) for x in (r, k, a, b))
    inputs = _Inputs(r, fill(log_w, plan.K, dtype=jnp.float32), k, fill(v, plan.V, dtype=plan.dtype), a, b)
    ids = None if segment_ids is None else segment_ids.astype(jnp.int32)
    out, final_state = recurrence(plan, inputs, fill(initial_state, plan.K, plan.V, dtype=jnp.float32), ids)
    key_size, value_size = initial_state.shape[-2:]
    return out[..., :value_size].astype(v.dtype), final_state[..., :key_size, :value_size]
