"""gdn by Triton kernels, forward and backward, for NVIDIA GPUs of compute capability 8.0 and up.

The kernels are in `triton_kernels`; how they are called is in `shared.triton_call`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gdn.chunked import of_groups, with_resets
from pallas_kernels.shared.triton_call import Plan, Tuning, fill, import_kernels, make_plan, run

# Warps and blocks with which no kernel spills a register on sm_80, sm_90 or sm_100.
_TUNED: Tuning = {
    "bfloat16": {
        "prepare": {"num_warps": 4, "BLOCK": 32},
        "pass_states": {"num_warps": 4, "BLOCK": 32},
        "outputs": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 64},
        "adjoint_values": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 64},
        "pair_gradients": {"num_warps": 4, "BLOCK": 32},
        "key_gradients": {"num_warps": 8, "BLOCK": 64, "BLOCK_V": 32},
    },
    "float32": {
        "prepare": {"num_warps": 4, "BLOCK": 32},
        "pass_states": {"num_warps": 8, "BLOCK": 16},
        "outputs": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 32},
        "adjoint_values": {"num_warps": 4, "BLOCK": 64, "BLOCK_K": 32},
        "pair_gradients": {"num_warps": 4, "BLOCK": 32},
        "key_gradients": {"num_warps": 4, "BLOCK": 32, "BLOCK_V": 32},
    },
}


class _Inputs(NamedTuple):
    """[B,T,G,K], v [B,T,H,V] of the plan's dtype; log_g and beta [B,T,H] float32."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_g: jax.Array
    beta: jax.Array


class _Prepared(NamedTuple):
    """What `triton_kernels.prepare` makes of the inputs."""

    w_state: jax.Array
    w_value: jax.Array
    inner: jax.Array


def _prepare(plan: Plan, inputs: _Inputs) -> _Prepared:
    outputs = [plan.keys(), plan.values(), plan.per_chunk(2, plan.C, plan.C)]
    return _Prepared(*run(plan, _TUNED, import_kernels("gdn").prepare, inputs, outputs, G=inputs.k.shape[2]))


def _pass_states(
    plan: Plan, inputs: _Inputs, w_state: jax.Array, x0: jax.Array, y: jax.Array, start: jax.Array, *, reverse: bool
) -> Any:
    """X, the states that chunks begin with, and the last; see `triton_kernels.pass_states`."""
    return run(
        plan,
        _TUNED,
        import_kernels("gdn").pass_states,
        (inputs.q, inputs.k, inputs.log_g, inputs.beta, w_state, x0, y, start),
        [
            plan.values(),
            plan.per_chunk(plan.V, plan.K),
            jax.ShapeDtypeStruct((plan.B, plan.H, plan.K, plan.V), jnp.float32),
        ],
        blocks_of=plan.V,
        every_chunk=False,
        G=inputs.k.shape[2],
        REVERSE=reverse,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def recurrence(plan: Plan, inputs: _Inputs, state: jax.Array) -> Any:
    """(o, final_state)."""
    return _recurrence_forward(plan, inputs, state)[0]


def _recurrence_forward(plan: Plan, inputs: _Inputs, state: jax.Array) -> Any:
    """Keeps the inputs and the state each chunk begins with, in the inputs' dtype."""
    ready = _prepare(plan, inputs)
    w, states, final_state = _pass_states(plan, inputs, ready.w_state, ready.w_value, inputs.v, state, reverse=False)
    arguments = (inputs.q, inputs.log_g, ready.inner, w, states)
    kernel, groups = import_kernels("gdn").outputs, inputs.k.shape[2]
    (out,) = run(plan, _TUNED, kernel, arguments, [plan.values()], blocks_of=plan.V, G=groups)
    return (out, final_state), (inputs, states)


def _recurrence_backward(plan: Plan, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """Prepares the chunks again, passes the state's gradient back through them, then takes all at once."""
    inputs, states = kept
    d_out, d_final = cotangents
    kernels, groups = import_kernels("gdn"), inputs.k.shape[2]
    keys, values, pairs = plan.keys(), plan.values(), plan.per_chunk(2, plan.C, plan.C)
    scalars = jax.ShapeDtypeStruct((plan.B, plan.T, plan.H), jnp.float32)
    ready = _prepare(plan, inputs)
    arguments: tuple[jax.Array, ...] = (ready.w_state, ready.w_value, ready.inner, states, d_out)
    w, z = run(plan, _TUNED, kernels.adjoint_values, arguments, [values, values], blocks_of=plan.V, G=groups)
    d_w, d_states, d_state = _pass_states(plan, inputs, ready.w_state, z, d_out, d_final, reverse=True)
    gates = (inputs.log_g, inputs.beta)
    arguments = (inputs.q, inputs.k, *gates, ready.inner, w, d_w, d_out)
    outputs = [values, pairs, scalars, scalars]
    d_v, d_inner, d_total, d_pairs = run(plan, _TUNED, kernels.pair_gradients, arguments, outputs, G=groups)
    arguments = (inputs.q, inputs.k, *gates, w, d_v, d_out, states, d_states, d_inner, d_total, d_pairs)
    outputs = [keys, keys, scalars, scalars]
    d_q, d_k, d_log_g, d_beta = run(plan, _TUNED, kernels.key_gradients, arguments, outputs, G=groups)
    d_q, d_k = (
        of_groups(x.astype(jnp.float32).swapaxes(1, 2), groups).swapaxes(1, 2).astype(plan.dtype) for x in (d_q, d_k)
    )
    return _Inputs(d_q, d_k, d_v, d_log_g, d_beta), d_state


recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def gdn_triton(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """See `gdn`. Products are bfloat16 where q, k and v all are, else float32 in chunks of 16."""
    import_kernels("gdn")
    plan = make_plan("gdn", q, v, (k,), chunk_size)._replace(H=v.shape[2])
    q, k = (fill(x, plan.K, dtype=plan.dtype) for x in (q, k))
    gates = (with_resets(log_g, segment_ids).astype(jnp.float32), beta.astype(jnp.float32))
    inputs = _Inputs(q, k, fill(v, plan.V, dtype=plan.dtype), *gates)
    out, final_state = recurrence(plan, inputs, fill(initial_state, plan.K, plan.V, dtype=jnp.float32))
    key_size, value_size = initial_state.shape[-2:]
    return out[..., :value_size].astype(v.dtype), final_state[..., :key_size, :value_size]
