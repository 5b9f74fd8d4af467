"""wkv6 by chunks: only matrix products, and one step of a scan per chunk."""

import jax
import jax.numpy as jnp

from pallas_kernels import layout

DEFAULT_CHUNK_SIZE = 16


def wkv6_chunked(
    r: jax.Array,
    log_w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    length = r.shape[1]
    size = layout.fitting_chunk(length, chunk_size or DEFAULT_CHUNK_SIZE)
    inputs = tuple(layout.pad(x, size) for x in (r, log_w, k, v))
    starts = None if segment_ids is None else layout.pad(layout.boundaries(segment_ids), size)
    lower = jnp.tril(jnp.ones((size, size), jnp.float32))
    transpose = layout.transpose

    @jax.checkpoint
    def step(state, index):
        r, log_w, k, v = layout.take(inputs, index, size)
        reset = layout.resets(starts, index, size)
        total = jnp.cumsum(log_w, axis=2)
        middle = total[..., size // 2 : size // 2 + 1, :]
        r_mid = r * jnp.exp(total - middle)
        k_mid = k * jnp.exp(middle - total)
        pairs = 1.0 if reset is None else reset.pairs
        head = 1.0 if reset is None else reset.head
        tail = 1.0 if reset is None else reset.tail
        keep = 1.0 if reset is None else reset.keep
        rk = jnp.where(lower, r_mid @ transpose(k_mid), 0) * pairs
        last = total[..., -1:, :]
        out = head * ((r * jnp.exp(total)) @ state) + rk @ v
        k_end = k * jnp.exp(last - total)
        state = jnp.exp(transpose(last)) * (keep * state) + transpose(k_end * tail) @ v
        return state, jnp.swapaxes(out, 1, 2)

    final_state, out = jax.lax.scan(step, initial_state, jnp.arange(inputs[0].shape[1] // size))
    out = jnp.moveaxis(out, 0, 1).reshape(inputs[3].shape)
    return out[:, :length].astype(v.dtype), final_state
