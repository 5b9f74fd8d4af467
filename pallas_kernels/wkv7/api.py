"""The public wkv7: checks its arguments and chooses an implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, layout
from pallas_kernels.wkv7.chunked import wkv7_chunked
from pallas_kernels.wkv7.pallas_tpu import wkv7_pallas_tpu
from pallas_kernels.wkv7.reference import wkv7_reference
from pallas_kernels.wkv7.triton_gpu import wkv7_triton

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pallas_tpu": wkv7_pallas_tpu,
    "triton_gpu": wkv7_triton,
    "chunked": wkv7_chunked,
    "reference": wkv7_reference,
}


def wkv7(
    r: Float[Array, "B T H K"],
    log_w: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The RWKV-7 recurrence: returns all outputs and the state after the last token.

    S_t = diag(e^log_w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T;   o_t = S_t^T r_t

    log_w is the log decay per token and key channel, never positive. The chunked form takes the decays of one chunk
    as quotients of float32 exponentials: it is right for log_w >= -1.8 (three times RWKV-7's own bound of -0.6066) in
    chunks of 32, the default, and for sums of log_w above -60 over any chunk in larger ones. Beyond that log_w's
    gradient loses digits by cancellation, and from sums of -81 on all that depends on them is NaN, never a wrong
    number: take smaller chunks, or the reference. The bound of pallas_tpu, in its chunks of 64, is -1.8 too, in other
    ones sums above -60 over any half chunk.
    Backward keeps one state a chunk: larger chunks, fewer states.
    The state resets to zero before each token t > 0 whose segment id differs from the one before it; initial_state
    (zeros by default) continues into token 0's segment. The state and all sums are float32, o has v's dtype.
    Source: RADLADS (arXiv 2505.03005), appendix on RAD-RWKV7.
    """
    layout.check_recurrence("wkv7", {"r": r, "log_w": log_w, "k": k, "a": a, "b": b}, v, initial_state, segment_ids)
    layout.check_chunk_size("wkv7", chunk_size)
    run = dispatch.choose("wkv7", IMPLEMENTATIONS, implementation, (r.shape[-1], v.shape[-1]))
    if initial_state is None:
        batch, _, heads, key_size = r.shape
        initial_state = jnp.zeros((batch, heads, key_size, v.shape[-1]), jnp.float32)
    return run(r, log_w, k, v, a, b, initial_state.astype(jnp.float32), segment_ids, chunk_size)
