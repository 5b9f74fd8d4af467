"""The public attention: chooses an implementation."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention.blocks import attention_by_blocks
from pallas_kernels.attention.cudnn import attention_cudnn
from pallas_kernels.attention.pallas_tpu import SMALLEST_BLOCK, attention_pallas_tpu

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "pallas_tpu": attention_pallas_tpu,
    "cudnn": attention_cudnn,
    "chunked": attention_by_blocks,
}
# Below, XLA's scores are small, and a kernel of few blocks has little to overlap.
_KERNEL_FROM = 2048


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys at or before each query in its segment; softmax float32, o as q.

    H is a multiple of G: a group of H / G neighbouring heads shares a key head. pallas_tpu takes rows of a multiple of
    128 positions, cudnn bfloat16 and float16. Left to the backend, they run on TPU and on NVIDIA's GPUs from Hopper on
    for rows of such multiples from 2,048 positions on, for head sizes 64 and 128, in bfloat16 alone: a TPU multiplies
    float32 so too unless told otherwise, and the library's kernels have no word for it.
    """
    length = q.shape[1]
    if implementation is None and (length < _KERNEL_FROM or length % SMALLEST_BLOCK or q.dtype != jnp.bfloat16):
        implementation = "chunked"
    if implementation == "pallas_tpu" and length % SMALLEST_BLOCK:
        raise ValueError(
            f"attention by pallas_tpu got rows of {length} positions, expected a multiple of {SMALLEST_BLOCK}; pad "
            "them with a segment of their own, or pass implementation=None."
        )
    run = dispatch.choose("attention", IMPLEMENTATIONS, implementation, (q.shape[-1],))
    return run(q, k, v, segment_ids)
