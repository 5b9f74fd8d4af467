"""Softmax attention on TPU by the library's splash attention, which holds no scores outside the chip's own memory."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch

SMALLEST_BLOCK = 128  # of positions: a row is a whole number of them
_BLOCKS = (1024, 512, 256, SMALLEST_BLOCK)


def attention_pallas_tpu(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H K"]:
    """`attention` of rows of a multiple of 128 positions; interpreted wherever there is no TPU."""
    length, heads, head_size = q.shape[1:]
    # The library's kernels do not scale their scores.
    q = (q.astype(jnp.float32) * head_size**-0.5).astype(q.dtype)
    block = next(size for size in _BLOCKS if length % size == 0)
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_of_size(block),
        interpret=dispatch.backend() != "tpu",
    )

    def of_row(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        ids = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
        return attend(q, k, v, segment_ids=ids)

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(of_row)(q, k, v, segment_ids).swapaxes(1, 2)


def _of_size(block: int) -> splash.BlockSizes:
    """The same of queries and keys, in all three kernels."""
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
