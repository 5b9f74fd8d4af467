"""The public gdn: checks its arguments and chooses an implementation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, layout
from pallas_kernels.gdn.chunked import gdn_chunked
from pallas_kernels.gdn.pallas_tpu import gdn_pallas_tpu
from pallas_kernels.gdn.reference import gdn_reference
from pallas_kernels.gdn.triton_gpu import gdn_triton

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pallas_tpu": gdn_pallas_tpu,
    "triton_gpu": gdn_triton,
    "chunked": gdn_chunked,
    "reference": gdn_reference,
}


def gdn(
    q: Float[Array, "B T G K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T H V"],
    log_g: Float[Array, "B T H"],
    beta: Float[Array, "B T H"],
    *,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The gated delta rule: returns all outputs and the state after the last token.

    S <- e^log_g S;   S <- S + k (beta (v - S^T k))^T;   o = S^T q

    q and k come as they are used: the caller has normalised both to unit length (keys must be, or the rule may
    diverge; nothing is checked) and multiplied q with its scale, K^-0.5. H is a multiple of G: head h reads key head
    h // (H/G), and no sequence of keys is copied for it.
    log_g is the log decay per token and head, never positive and finite: from -1e-7 to -100 a token all is exact to
    the dtype, in chunks of any size, since decays are taken of differences that are never positive.
    The state resets to zero before each token t > 0 whose segment id differs from the one before it; initial_state
    (zeros by default) continues into token 0's segment. The state and all sums are float32, o has v's dtype. Backward
    keeps one state a chunk: larger chunks, fewer states.
    Source: Gated Delta Networks (arXiv 2412.06464), as in Qwen3.5.
    """
    _check(q, k, v, log_g, beta, initial_state, segment_ids)
    layout.check_chunk_size("gdn", chunk_size)
    run = dispatch.choose("gdn", IMPLEMENTATIONS, implementation, (q.shape[-1], v.shape[-1]))
    if initial_state is None:
        batch, heads, key_size = v.shape[0], v.shape[2], q.shape[-1]
        initial_state = jnp.zeros((batch, heads, key_size, v.shape[-1]), jnp.float32)
    return run(q, k, v, log_g, beta, initial_state.astype(jnp.float32), segment_ids, chunk_size)


def _check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
) -> None:
    """Raises ValueError unless the others go with q and the key heads divide the heads."""
    if q.ndim != 4 or q.shape[1] < 1:
        raise ValueError(f"gdn got q of shape {q.shape}, expected [B,T,G,K] with T >= 1; q's four axes are needed.")
    batch, length, groups, key_size = q.shape
    if v.ndim != 4 or v.shape[2] % groups:
        raise ValueError(
            f"gdn got v of shape {v.shape}, expected [B,T,H,V] with H a multiple of the {groups} key heads of q "
            f"{q.shape}; repeat or drop heads of the one that is wrong."
        )
    heads, value_size = v.shape[2:]
    arrays = {"k": k, "v": v, "log_g": log_g, "beta": beta}
    expected: dict[str, tuple[int, ...]] = {"k": q.shape, "v": (batch, length, heads, value_size)}
    expected |= dict.fromkeys(("log_g", "beta"), (batch, length, heads))
    if initial_state is not None:
        arrays["initial_state"] = initial_state
        expected["initial_state"] = (batch, heads, key_size, value_size)
    if segment_ids is not None:
        arrays["segment_ids"] = segment_ids
        expected["segment_ids"] = (batch, length)
    layout.check_shapes("gdn", arrays, expected, f"q of shape {q.shape} and {heads} heads of v")
