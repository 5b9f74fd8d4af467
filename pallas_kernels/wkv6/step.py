"""One token of wkv6, for decoding, with the output from the state before it, as in wkv7's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layout


def wkv6_step(
    r: Float[Array, "B H K"],
    log_w: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `wkv6` for each row: its output, and the state after it.

    S = diag(e^log_w) S_before + k v^T;   o = S^T r

    Arithmetic is in the state's dtype, and so is the new state; o has v's dtype. Any log_w is right. Where a segment
    begins, the caller gives a state of zeros.
    """
    layout.check_step("wkv6_step", {"r": r, "log_w": log_w, "k": k}, v, state)
    dtype = v.dtype
    r, log_w, k, v = (x.astype(state.dtype) for x in (r, log_w, k, v))
    w = jnp.exp(log_w)
    # As exact as the state's dtype on a TPU too.
    kept = jnp.einsum("bhk,bhkv->bhv", w * r, state, precision=jax.lax.Precision.HIGHEST)
    out = kept + jnp.sum(k * r, axis=-1, keepdims=True) * v
    return out.astype(dtype), w[..., None] * state + k[..., None] * v[..., None, :]
