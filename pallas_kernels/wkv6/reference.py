"""wkv6 token by token: the definition, slow and memory-hungry under differentiation."""

import jax
import jax.numpy as jnp

from pallas_kernels.layout import boundaries
from pallas_kernels.wkv6.step import wkv6_step


def wkv6_reference(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(e^log_w_t) S_{t-1} + k_t v_t^T; o_t = S_t^T r_t, one scan step a token.

    chunk_size has no meaning here. Arithmetic is that of initial_state's dtype.
    """
    del chunk_size
    dtype = initial_state.dtype
    batch, length = r.shape[:2]
    keep = jnp.ones((batch, length), dtype) if segment_ids is None else (~boundaries(segment_ids)).astype(dtype)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        r_t, log_w_t, k_t, v_t, keep_t = token
        out, state = wkv6_step(r_t, log_w_t, k_t, v_t, state * keep_t[:, None, None, None])
        return state, out

    tokens = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (r, log_w, k, v, keep))
    final_state, out = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), final_state
