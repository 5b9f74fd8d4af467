"""Softmax attention by blocks of queries, by XLA, on any backend; with a decoding state's keys too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Scores are [B, H, block, S]: with blocks of queries a long row needs memory linear in its length and skips the
# keys behind each block.
_QUERY_BLOCK = 512
_SMALLEST_BLOCK = 128


def attention_by_blocks(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    segment_ids: Int[Array, "B T"] | None,
    offset: Int[Array, ""] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T H K"]:
    """`attention`; with an offset query t stands at key offset + t, of the segments key_segment_ids (None: one)."""
    key_segments = segment_ids if key_segment_ids is None else key_segment_ids

    def block(queries: Array, first: int, keys: Array, values: Array) -> Array:
        rows = (0 if offset is None else offset) + first + jnp.arange(queries.shape[1])
        mask = (rows[:, None] >= jnp.arange(keys.shape[1])[None, :])[None, None]
        if segment_ids is not None and key_segments is not None:
            own = segment_ids[:, first : first + queries.shape[1]]
            mask = mask & (own[:, None, :, None] == key_segments[:, None, None, : keys.shape[1]])
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask)

    total = q.shape[1]
    size = min(_QUERY_BLOCK, max(total // 4, _SMALLEST_BLOCK))
    if total <= size:
        return block(q, 0, k, v)
    outputs = []
    for i in range(0, total, size):
        end = k.shape[1] if offset is not None else min(i + size, total)
        output = jax.checkpoint(block, static_argnums=1)(q[:, i : i + size], i, k[:, :end], v[:, :end])
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1)
