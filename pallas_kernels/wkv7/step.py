"""One token of wkv7, for decoding, with the output from the state before it.

o = S^T r = S_before^T (e^log_w r) + (b^T r) (S_before^T a) + (k^T r) v reads the state once. Out of the new state, XLA
on a CPU would compute that twice, once for the product and once to keep it.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import layout

# As exact as the state's dtype on a TPU too.
_dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def wkv7_step(
    r: Float[Array, "B H K"],
    log_w: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    state: Float[Array, "B H K V"],
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token of `wkv7` for each row: its output, and the state after it.

    S = diag(e^log_w) S_before + b (a^T S_before) + k v^T;   o = S^T r

    Arithmetic is in the state's dtype, and so is the new state; o has v's dtype. Any log_w is right. Where a segment
    begins, the caller gives a state of zeros.
    """
    layout.check_step("wkv7_step", {"r": r, "log_w": log_w, "k": k, "a": a, "b": b}, v, state)
    dtype = v.dtype
    r, log_w, k, v, a, b = (x.astype(state.dtype) for x in (r, log_w, k, v, a, b))
    w = jnp.exp(log_w)
    removed, kept = jnp.moveaxis(_dot("bhnk,bhkv->bhnv", jnp.stack([a, w * r], axis=2), state), 2, 0)
    out = kept + jnp.sum(b * r, axis=-1, keepdims=True) * removed + jnp.sum(k * r, axis=-1, keepdims=True) * v
    state = w[..., None] * state + b[..., None] * removed[..., None, :] + k[..., None] * v[..., None, :]
    return out.astype(dtype), state
