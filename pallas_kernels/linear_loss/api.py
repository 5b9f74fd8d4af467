"""The public losses: check their arguments and choose the slice."""

import math
from typing import Literal

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import backend
from pallas_kernels.linear_loss import sliced
from pallas_kernels.linear_loss.stats import stats
from pallas_kernels.sharded import TOKENS, VOCAB, shards

_Layout = Literal["dv", "vd"]

# The elements of one slice's float32 logits, and the tokens it has at least: enough to repay reading and adding up the
# kernel's gradient. On a CPU a pass over large logits waits for the memory.
_SLICE = (2**26, 128)
_CPU_SLICE = (2**24, 256)


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    slice_tokens: int | None = None,
    kernel_layout: _Layout = "dv",
) -> Float[Array, ""]:
    """Weighted sum over tokens of the cross-entropy of softmax(hidden @ kernel) against targets.

    sum_n weights_n (logsumexp_v(z_n) - z_n[targets_n]),   z = hidden @ kernel

    kernel is [D,vocab], or [vocab,D] with kernel_layout="vd" (a tied embedding, used where it lies). Matrix products
    run in hidden's dtype with float32 sums; logits, softmax and the result are float32. Gradients of hidden, kernel
    and weights come out of the same pass as the value, and at most slice_tokens x vocab logits exist at any time.
    """
    _check("linear_cross_entropy", hidden, kernel, kernel_layout, weights, targets)
    options = sliced.Options(_slice_tokens(hidden, kernel, kernel_layout, slice_tokens), kernel_layout)
    return sliced.cross_entropy(options, hidden, kernel, targets, weights)


def linear_kl(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "_ _"],
    teacher_hidden: Float[Array, "N D2"],
    teacher_kernel: Float[Array, "_ _"],
    weights: Float[Array, " N"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    slice_tokens: int | None = None,
    kernel_layout: _Layout = "dv",
    teacher_kernel_layout: _Layout = "dv",
) -> Float[Array, ""]:
    """Weighted sum over tokens of KL(teacher || student), times temperature^2.

    temperature^2 sum_n weights_n sum_v p_nv (log p_nv - log q_nv),
    p = softmax(teacher_hidden @ teacher_kernel / temperature), q = softmax(hidden @ kernel / temperature)

    The factor keeps gradients at their size (Hinton et al., arXiv 1503.02531). top_k: the KL of the teacher's k
    likeliest tokens and of all others as one, as in `linear_topk_kl`; 0 for the whole vocabulary.
    Layouts, dtypes and gradients as in `linear_cross_entropy`; the teacher is a constant and gets none. Its logits of
    one slice lie beside the student's. Teacher and student may differ in width, not in vocabulary.
    """
    _check("linear_kl", hidden, kernel, kernel_layout, weights)
    _check("linear_kl", teacher_hidden, teacher_kernel, teacher_kernel_layout, weights, name="teacher_")
    _check_vocab("linear_kl", kernel, kernel_layout, teacher_kernel, teacher_kernel_layout)
    vocab = kernel.shape[1 if kernel_layout == "dv" else 0]
    if not (math.isfinite(temperature) and temperature > 0 and 0 <= top_k <= vocab):
        raise ValueError(
            f"linear_kl got temperature {temperature} and top_k {top_k}; expected a temperature above 0, and top_k "
            f"from 1 to the vocabulary's {vocab}, or 0 for all of it."
        )
    size = _slice_tokens(hidden, kernel, kernel_layout, slice_tokens)
    options = sliced.Options(size, kernel_layout, teacher_kernel_layout, float(temperature), top_k)
    return sliced.kl(options, hidden, kernel, teacher_hidden, teacher_kernel, weights)


def linear_topk_kl(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "_ _"],
    teacher_log_probs: Float[Array, "N k"],
    teacher_indices: Int[Array, "N k"],
    weights: Float[Array, " N"],
    *,
    slice_tokens: int | None = None,
    kernel_layout: _Layout = "dv",
) -> Float[Array, ""]:
    """`linear_kl` with a teacher of whom only the k likeliest tokens at each position were stored.

    sum_n weights_n (sum_i p_ni (log p_ni - log q_n,index_ni) + p_n (log p_n - log q_n)),   p_ni = e^teacher_log_probs,
    p_n = 1 - sum_i p_ni,   q_n = the sum of q = softmax(hidden @ kernel) over all tokens that are not among the k

    This is the KL of teacher and student with all other tokens taken as one: never more than the whole KL, equal to
    it with k = vocab, and zero only where the student agrees. (Renormalised over the k alone, the best student would
    be one that denies all other tokens.) So teacher_log_probs are logarithms of the teacher's probabilities in the
    whole vocabulary, its logits less their logsumexp, as jax.lax.top_k of a log_softmax gives them; its k indices in
    [0, vocab) are distinct, and an entry of -inf is not there, for rows that keep fewer than k.
    Layouts, dtypes, memory and gradients as in `linear_cross_entropy`; the teacher gets none.
    """
    _check("linear_topk_kl", hidden, kernel, kernel_layout, weights)
    shapes = {"teacher_log_probs": teacher_log_probs.shape, "teacher_indices": teacher_indices.shape}
    if len(set(shapes.values())) > 1 or teacher_indices.ndim != 2 or len(teacher_indices) != len(hidden):
        raise ValueError(
            f"linear_topk_kl got {shapes}, expected [{len(hidden)},k] for both, a row for each of hidden's; flatten "
            "batch and tokens alike."
        )
    options = sliced.Options(_slice_tokens(hidden, kernel, kernel_layout, slice_tokens), kernel_layout)
    return sliced.topk_kl(options, hidden, kernel, teacher_log_probs, teacher_indices, weights)


def linear_stats(
    hidden: Float[Array, "N D"],
    kernel: Float[Array, "_ _"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    teacher_hidden: Float[Array, "N D2"] | None = None,
    teacher_kernel: Float[Array, "_ _"] | None = None,
    *,
    slice_tokens: int | None = None,
    kernel_layout: _Layout = "dv",
    teacher_kernel_layout: _Layout = "dv",
) -> dict[str, Float[Array, ""]]:
    """Weighted sums over tokens for evaluation, forward only, slice by slice.

    "loss" (cross-entropy) and "top1" (argmax == target); with a teacher also "kl" (teacher || student), "agreement"
    (both argmax equal), "teacher_loss" and "teacher_top1". Divide by weights.sum() for means.
    """
    _check("linear_stats", hidden, kernel, kernel_layout, weights, targets)
    if (teacher_hidden is None) != (teacher_kernel is None):
        raise ValueError("linear_stats got only one of teacher_hidden and teacher_kernel; pass both or neither.")
    if teacher_hidden is not None and teacher_kernel is not None:
        _check("linear_stats", teacher_hidden, teacher_kernel, teacher_kernel_layout, weights, name="teacher_")
        _check_vocab("linear_stats", kernel, kernel_layout, teacher_kernel, teacher_kernel_layout)
    size = _slice_tokens(hidden, kernel, kernel_layout, slice_tokens)
    options = sliced.Options(size, kernel_layout, teacher_kernel_layout)
    return stats(options, hidden, kernel, targets, weights, teacher_hidden, teacher_kernel)


def _slice_tokens(hidden: jax.Array, kernel: jax.Array, layout: str, slice_tokens: int | None) -> int:
    """The slice asked for, or even slices whose logits fit the backend's elements, in multiples of 8 tokens.

    Over many devices each holds all of a slice's hidden states and its share of the logits: the larger one has to fit.
    """
    if slice_tokens is not None and slice_tokens < 1:
        raise ValueError(f"slice_tokens is {slice_tokens}, expected at least 1; pass None for the default.")
    if slice_tokens is None:
        vocab, devices = kernel.shape[1 if layout == "dv" else 0], shards(VOCAB)
        width = vocab if devices == 1 else max(-(-vocab // devices), hidden.shape[1])
        elements, least = _CPU_SLICE if backend() == "cpu" else _SLICE
        slices = -(-hidden.shape[0] // max(least, elements // width))
        multiple = 8 * shards(TOKENS)
        slice_tokens = -(-hidden.shape[0] // slices // multiple) * multiple
    return min(slice_tokens, hidden.shape[0])


def _check(
    operation: str,
    hidden: jax.Array,
    kernel: jax.Array,
    layout: str,
    weights: jax.Array,
    targets: jax.Array | None = None,
    name: str = "",
) -> None:
    if layout not in ("dv", "vd"):
        raise ValueError(f"{operation} got {name}kernel_layout={layout!r}, expected 'dv' or 'vd'.")
    width = kernel.shape[0 if layout == "dv" else 1] if kernel.ndim == 2 else None
    if hidden.ndim != 2 or width != hidden.shape[1]:
        raise ValueError(
            f"{operation} got {name}hidden {hidden.shape} and {name}kernel {kernel.shape} in layout {layout!r}, "
            "expected [N,D] with [D,vocab] ('dv') or [vocab,D] ('vd'); reshape them or change the layout."
        )
    for label, array in (("weights", weights), ("targets", targets)):
        if array is not None and array.shape != hidden.shape[:1]:
            raise ValueError(
                f"{operation} got {label} of shape {array.shape}, expected {hidden.shape[:1]}, one per row of "
                f"{name}hidden; flatten batch and tokens alike."
            )


def _check_vocab(operation: str, kernel: jax.Array, layout: str, teacher: jax.Array, teacher_layout: str) -> None:
    student_vocab = kernel.shape[1 if layout == "dv" else 0]
    teacher_vocab = teacher.shape[1 if teacher_layout == "dv" else 0]
    if student_vocab != teacher_vocab:
        raise ValueError(
            f"{operation} got a student vocabulary of {student_vocab} and a teacher vocabulary of {teacher_vocab}, "
            "expected the same; check both heads and their layouts."
        )
