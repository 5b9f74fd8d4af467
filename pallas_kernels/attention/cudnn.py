"""Softmax attention on NVIDIA's GPUs from Hopper on by cuDNN's, which holds no scores outside the chip's own memory."""

import jax
from jaxtyping import Array, Float, Int


def attention_cudnn(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T H K"]:
    """`attention` in bfloat16 or float16.

    What is of one segment is told as a mask [B, 1, T, T] in the inputs' dtype, for which the backward pass makes a
    gradient that nobody reads: cuDNN's packed rows want a fixed number of segments.
    """
    same = None if segment_ids is None else segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="cudnn")
