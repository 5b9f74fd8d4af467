"""One token of gdn, for decoding, with the output from the state before it.

o = S^T q = e^g S_before^T q + (k^T q) u reads the state once for both of its products.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layout


def gdn_step(
    q: Float[Array, "B G K"],
    k: Float[Array, "B G K"],
    v: Float[Array, "B H V"],
    log_g: Float[Array, "B H"],
    beta: Float[Array, "B H"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `gdn` for each row: its output, and the state after it.

    u = beta (v - e^log_g S_before^T k);   S = e^log_g S_before + k u^T;   o = S^T q

    Arithmetic is in the state's dtype, and so is the new state; o has v's dtype. Where a segment begins, the caller
    gives a state of zeros.
    """
    _check(q, k, v, log_g, beta, state)
    dtype, (batch, groups, key_size), heads = v.dtype, q.shape, v.shape[1]
    q, k, v, log_g, beta = (x.astype(state.dtype) for x in (q, k, v, log_g, beta))
    decay = jnp.exp(log_g)[..., None]
    of_groups = state.reshape(batch, groups, heads // groups, key_size, -1)
    # As exact as the state's dtype on a TPU too.
    seen = jnp.einsum(
        "bngk,bgrkv->nbgrv", jnp.stack([k, q], axis=1), of_groups, precision=jax.lax.Precision.HIGHEST
    ).reshape(2, batch, heads, -1)
    u = beta[..., None] * (v - decay * seen[0])
    pair = jnp.repeat(jnp.sum(k * q, axis=-1), heads // groups, axis=1)[..., None]
    written = (k[:, :, None, :, None] * u.reshape(batch, groups, -1, 1, u.shape[-1])).reshape(state.shape)
    return (decay * seen[1] + pair * u).astype(dtype), decay[..., None] * state + written


def _check(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array, beta: jax.Array, state: jax.Array) -> None:
    """Raises ValueError unless everything goes with q [B,G,K] and v [B,H,V]."""
    if q.ndim != 3:
        raise ValueError(f"gdn_step got q of shape {q.shape}, expected one token of each row, [B,G,K].")
    batch, groups, key_size = q.shape
    if v.ndim != 3 or v.shape[1] % groups:
        raise ValueError(
            f"gdn_step got v of shape {v.shape}, expected [B,H,V] with H a multiple of the {groups} key heads of q "
            f"{q.shape}; repeat or drop heads of the one that is wrong."
        )
    heads, value_size = v.shape[1:]
    arrays = {"k": k, "v": v, "log_g": log_g, "beta": beta, "state": state}
    expected = {"k": q.shape, "v": (batch, heads, value_size), "state": (batch, heads, key_size, value_size)}
    expected |= dict.fromkeys(("log_g", "beta"), (batch, heads))
    layout.check_shapes("gdn_step", arrays, expected, f"q of shape {q.shape} and {heads} heads of v")
