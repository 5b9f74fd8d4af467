"""The public wkv6: checks its arguments and chooses an implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, layout
from pallas_kernels.wkv6.chunked import wkv6_chunked
from pallas_kernels.wkv6.pallas_tpu import wkv6_pallas_tpu
from pallas_kernels.wkv6.reference import wkv6_reference
from pallas_kernels.wkv6.triton_gpu import wkv6_triton

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pallas_tpu": wkv6_pallas_tpu,
    "triton_gpu": wkv6_triton,
    "chunked": wkv6_chunked,
    "reference": wkv6_reference,
}


def wkv6(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The RWKV-6 recurrence without bonus: returns all outputs and the state after the last token.

    S_t = diag(e^log_w_t) S_{t-1} + k_t v_t^T;   o_t = S_t^T r_t

    log_w is the log decay per token and key channel, never positive; RAD-RWKV6 keeps it at or above -5. The chunked
    form is right where log_w sums to -60 or more over any half chunk, as it does down to -7.5 a token in chunks of 16,
    the default; beyond, all that depends on such a sum is NaN, never a wrong number. pallas_tpu is right down to -10
    in chunks of any size.
    The state resets to zero before each token t > 0 whose segment id differs from the one before it; initial_state
    (zeros by default) continues into token 0's segment. The state and all sums are float32, o has v's dtype.
    Source: RADLADS (arXiv 2505.03005), appendix on RAD-RWKV6.
    """
    layout.check_recurrence("wkv6", {"r": r, "log_w": log_w, "k": k}, v, initial_state, segment_ids)
    layout.check_chunk_size("wkv6", chunk_size)
    run = dispatch.choose("wkv6", IMPLEMENTATIONS, implementation, (r.shape[-1], v.shape[-1]))
    if initial_state is None:
        batch, _, heads, key_size = r.shape
        initial_state = jnp.zeros((batch, heads, key_size, v.shape[-1]), jnp.float32)
    return run(r, log_w, k, v, initial_state.astype(jnp.float32), segment_ids, chunk_size)
