"""The chunked form of transformers' torch_chunk_gated_delta_rule, in JAX, for comparison with `gdn`."""

import jax
import jax.numpy as jnp

_CHUNK_SIZE = 64  # what transformers takes


def plain_chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_g: jax.Array,
    beta: jax.Array,
    chunk_size: int = _CHUNK_SIZE,
) -> tuple[jax.Array, jax.Array]:
    """Line for line as in transformers 5 (qwen3_5): float32, all chunks' systems at once, then a loop over chunks.

    T is a whole number of chunks; q is scaled already. JAX's own gradient. The systems are inverted row by row, as
    transformers does for export; the triangular solves that it does else have no fast form in XLA.
    """
    (batch, length, heads, value_size), key_size = v.shape, q.shape[-1]
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    query, key, value = (jnp.moveaxis(x, 2, 1).astype(jnp.float32) for x in (q, k, v))
    decay, weight = (jnp.moveaxis(x, 2, 1).astype(jnp.float32) for x in (log_g, beta))
    v_beta, k_beta = value * weight[..., None], key * weight[..., None]
    query, key, k_beta, v_beta = (
        x.reshape(batch, heads, -1, chunk_size, x.shape[-1]) for x in (query, key, k_beta, v_beta)
    )
    cum_decay = jnp.cumsum(decay.reshape(batch, heads, -1, chunk_size), axis=3)
    upper = jnp.triu(jnp.ones((chunk_size, chunk_size), bool), 1)
    gap = cum_decay[..., :, None] - cum_decay[..., None, :]
    pairwise_decay = jnp.exp(jnp.where(upper, -jnp.inf, gap))
    ut_system = (k_beta @ jnp.swapaxes(key, -1, -2)) * pairwise_decay
    intra_chunk = (query @ jnp.swapaxes(key, -1, -2)) * pairwise_decay
    inverse = _substituted(-jnp.tril(ut_system, -1))
    new_values, k_cumdecay = inverse @ v_beta, inverse @ (k_beta * jnp.exp(cum_decay)[..., None])
    query = query * jnp.exp(cum_decay)[..., None]
    key = key * jnp.exp(cum_decay[..., -1:] - cum_decay)[..., None]
    chunk_decay = jnp.exp(cum_decay[..., -1])[..., None, None]

    def step(state: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        values, cumdecay, queries, inner, keys, decays = chunk
        v_new = values - cumdecay @ state
        out = queries @ state + inner @ v_new
        return state * decays + jnp.swapaxes(keys, -1, -2) @ v_new, out

    chunks = (new_values, k_cumdecay, query, intra_chunk, key, chunk_decay)
    state = jnp.zeros((batch, heads, key_size, value_size), jnp.float32)
    state, out = jax.lax.scan(step, state, tuple(jnp.moveaxis(x, 2, 0) for x in chunks))
    out = jnp.moveaxis(out, 0, 2).reshape(batch, heads, length, value_size)
    return jnp.moveaxis(out, 1, 2), state


def _substituted(strict: jax.Array) -> jax.Array:
    """(I - strict)^-1 of strictly lower triangular [...,C,C], each row from those above it."""

    def row(known: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        mine = jax.lax.dynamic_index_in_dim(known, index, axis=-2, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(known, mine + mine @ known, index, axis=-2), None

    # A row's entries beyond the diagonal are zeros, and so is what they take from rows not yet done.
    size = strict.shape[-1]
    known, _ = jax.lax.scan(row, strict, jnp.arange(1, size))
    return known + jnp.eye(size, dtype=strict.dtype)
