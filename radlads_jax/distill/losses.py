"""What a loss returns, and the losses on logits: KL (stages 2, 2a) and next-token cross-entropy (stage 3, pretraining).

Both hand hidden states and the head's matrix to pallas_kernels.linear_loss, so that logits exist for one slice of
tokens at a time. Losses are sums with their weights: accumulated parts of a batch add up to what the whole batch gives.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear_loss import linear_cross_entropy, linear_kl, linear_topk_kl
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import Decoder, bind
from radlads_jax.models.tree import Params

Batch = dict[str, jax.Array]


class LossSums(NamedTuple):
    """loss: summed over tokens; weight: the tokens counted; extras: further sums over the same tokens."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    extras: dict[str, Any]


def kl_loss(
    student_cfg: ModelConfig,
    teacher_cfg: ModelConfig,
    student: Params,
    teacher: Params,
    batch: Batch,
    *,
    remat: str,
    slice_tokens: int | None = None,
    counted: Float[Array, "B T"] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
) -> LossSums:
    """Sum over tokens of KL(teacher || student), softened as pallas_kernels.linear_loss.linear_kl says.

    counted: each token's weight; by default 0 for padding and 1 elsewhere.
    """
    if counted is None:
        counted = (batch["segment_ids"] > 0).astype(jnp.float32)
    frozen = bind(teacher_cfg, teacher)
    target = jax.lax.stop_gradient(read_rows(frozen, batch))
    decoder = bind(student_cfg, student)
    hidden = read_rows(decoder, batch, remat=remat)
    kernel, layout = decoder.head_kernel()
    teacher_kernel, teacher_layout = frozen.head_kernel()
    loss = linear_kl(
        hidden,
        kernel.astype(hidden.dtype),
        target,
        teacher_kernel.astype(target.dtype),
        counted.reshape(-1),
        kernel_layout=layout,
        teacher_kernel_layout=teacher_layout,
        slice_tokens=slice_tokens,
        temperature=temperature,
        top_k=top_k,
    )
    return LossSums(loss, counted.sum(), {})


def answers_kl_loss(
    student_cfg: ModelConfig, teacher_cfg: ModelConfig, student: Params, teacher: Params, batch: Batch, **options: Any
) -> LossSums:
    """`kl_loss`, with its options, over those tokens alone whose next one is a target (loss_mask)."""
    return kl_loss(student_cfg, teacher_cfg, student, teacher, batch, counted=batch["loss_mask"], **options)


def stored_kl_loss(
    student_cfg: ModelConfig,
    teacher_cfg: ModelConfig,
    student: Params,
    teacher: Params | None,
    batch: Batch,
    *,
    remat: str,
    slice_tokens: int | None = None,
) -> LossSums:
    """`kl_loss` of a teacher of whom the batch has the k likeliest tokens: of these and of all others as one.

    sum over tokens of sum_k p log(p / q) + (1 - P) log((1 - P) / (1 - Q)), P and Q the k's probability together; never
    more than the whole KL. batch: with teacher_log_probs and teacher_indices, [B, T, k].
    """
    del teacher_cfg, teacher
    counted = (batch["segment_ids"] > 0).astype(jnp.float32)
    decoder = bind(student_cfg, student)
    hidden = read_rows(decoder, batch, remat=remat)
    kernel, layout = decoder.head_kernel()
    log_probs, indices = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("teacher_log_probs", "teacher_indices")
    )
    loss = linear_topk_kl(
        hidden,
        kernel.astype(hidden.dtype),
        log_probs,
        indices,
        counted.reshape(-1),
        kernel_layout=layout,
        slice_tokens=slice_tokens,
    )
    return LossSums(loss, counted.sum(), {})


def cross_entropy_loss(
    student_cfg: ModelConfig,
    teacher_cfg: ModelConfig | None,
    student: Params,
    teacher: Params | None,
    batch: Batch,
    *,
    remat: str,
    slice_tokens: int | None = None,
) -> LossSums:
    """Sum over tokens of -log p(next token); tokens whose next one is not in their segment have loss_mask 0."""
    del teacher_cfg, teacher
    decoder = bind(student_cfg, student)
    hidden = read_rows(decoder, batch, remat=remat)
    kernel, layout = decoder.head_kernel()
    weights = batch["loss_mask"]
    loss = linear_cross_entropy(
        hidden,
        kernel.astype(hidden.dtype),
        next_tokens(batch["tokens"]).reshape(-1),
        weights.reshape(-1),
        kernel_layout=layout,
        slice_tokens=slice_tokens,
    )
    return LossSums(loss, weights.sum(), {})


def read_rows(decoder: Decoder, batch: Batch, *, remat: str = "none") -> Float[Array, "N D"]:
    """The final hidden states of a batch's tokens, rows joined (N = B T)."""
    hidden, _ = decoder.hidden(
        batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"], remat=remat
    )
    return hidden.reshape(-1, hidden.shape[-1])


def next_tokens(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """tokens[:, t + 1]; the last column's target is its row's first token and must be masked."""
    return jnp.roll(tokens, -1, axis=1)
