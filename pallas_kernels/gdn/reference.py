"""gdn token by token: the definition, slow and memory-hungry under differentiation."""

import jax
import jax.numpy as jnp

from pallas_kernels.gdn.step import gdn_step
from pallas_kernels.layout import boundaries


def gdn_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """S <- e^log_g S; S <- S + k (beta (v - S^T k))^T; o = S^T q, one scan step a token.

    chunk_size has no meaning here. Arithmetic is that of initial_state's dtype.
    """
    del chunk_size
    dtype = initial_state.dtype
    batch, length = q.shape[:2]
    keep = jnp.ones((batch, length), dtype) if segment_ids is None else (~boundaries(segment_ids)).astype(dtype)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_t, k_t, v_t, log_g_t, beta_t, keep_t = token
        out, state = gdn_step(q_t, k_t, v_t, log_g_t, beta_t, state * keep_t[:, None, None, None])
        return state, out

    tokens = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, log_g, beta, keep))
    final_state, out = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), final_state
