"""Cross-entropy and KL with the head's matmul inside: value and gradients in one pass over slices of tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.sharded import TOKENS, VOCAB_OF_ONE, constrain, current_mesh, split_vocab
from pallas_kernels.shared.products import kernel_gradient

_Slice = tuple[jax.Array, ...]


class Options(NamedTuple):
    """What is static: tokens a slice, how each kernel lies ("dv" or "vd"), and how a KL is softened.

    top_k: of the teacher its k likeliest tokens, and all others as one; 0 for all.
    """

    slice_tokens: int
    layout: str
    teacher_layout: str = "dv"
    temperature: float = 1.0
    top_k: int = 0


def split(slice_tokens: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[N,...] -> [slices,S,...], zeros at the end.

    Slice i takes tokens i, i + slices, ...: tokens split over devices stay split within each slice.
    """
    slices = -(-arrays[0].shape[0] // slice_tokens)
    padding = slices * slice_tokens - arrays[0].shape[0]

    def one(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) if padding else x
        x = jnp.swapaxes(x.reshape(slice_tokens, slices, *x.shape[1:]), 0, 1)
        return constrain(x, None, TOKENS)

    return tuple(one(x) for x in arrays)


def _join(x: jax.Array, tokens: int) -> jax.Array:
    """[slices,S,...] -> [N,...], the inverse of `split`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])[:tokens]


def _columns_of(kernel: jax.Array, layout: str) -> jax.Array:
    """The kernel with its vocabulary over every device."""
    axis = layout.index("v")
    return split_vocab(split_vocab(kernel, axis, VOCAB_OF_ONE), axis)


def logits_of(hidden: jax.Array, kernel: jax.Array, layout: str) -> jax.Array:
    """hidden @ kernel, float32, products in hidden's dtype; of many devices each has all tokens and its own columns."""
    kernel = _columns_of(kernel.astype(hidden.dtype), layout)
    logits = jnp.einsum(f"nd,{layout}->nv", constrain(hidden), kernel, preferred_element_type=jnp.float32)
    return split_vocab(logits, 1)


def _log_partition(logits: jax.Array) -> jax.Array:
    """logsumexp over the vocabulary, [S,1]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    return top + jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[S,vocab] bool: one column per row; a comparison, since it fuses and splits over a vocabulary on many devices."""
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]


def _of_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The targets' logits [S]: read where one device has the whole vocabulary, else summed out of all columns."""
    if current_mesh() is None:
        return jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)


def cross_entropy_slice(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Losses [S] of one slice, and their gradient in the logits (called only where it is wanted)."""
    partition = _log_partition(logits)
    losses = partition[:, 0] - _of_targets(logits, targets)
    return losses, lambda: jnp.exp(logits - partition) - _is_target(logits, targets)


def kl_slice(logits: jax.Array, teacher_logits: jax.Array) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Losses [S] of one slice, and their gradient in the student's logits (called only where it is wanted)."""
    log_q = logits - _log_partition(logits)
    log_p = teacher_logits - _log_partition(teacher_logits)
    losses = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return losses, lambda: jnp.exp(log_q) - jnp.exp(log_p)


def _topk_kl_slice(
    logits: jax.Array, log_probs: jax.Array, indices: jax.Array
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """`kl_slice` of a teacher that is known at k tokens of the vocabulary, and as one probability at all others."""
    log_p = _scattered(log_probs, indices, logits.shape)
    known = log_p > -jnp.inf
    partition = _log_partition(logits)
    log_q = logits - partition
    # Of the student, the logarithm of what all unknown tokens have together; no number where there are none.
    log_rest = _log_partition(jnp.where(known, -jnp.inf, logits)) - partition
    rest = jnp.where(log_rest > -jnp.inf, jnp.maximum(1 - jnp.sum(jnp.exp(log_p), axis=-1, keepdims=True), 0), 0)
    of_known = jnp.sum(jnp.where(known, jnp.exp(log_p) * (log_p - log_q), 0.0), axis=-1)
    of_rest = jnp.where(rest > 0, rest * (jnp.log(jnp.where(rest > 0, rest, 1.0)) - log_rest), 0.0)[:, 0]
    losses = of_known + of_rest
    return losses, lambda: jnp.exp(log_q) - jnp.where(known, jnp.exp(log_p), rest * jnp.exp(log_q - log_rest))


def _scattered(values: jax.Array, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 [S,vocab], split as logits are: values [S,k] in the columns of indices [S,k], -inf in all others."""
    rows = jnp.arange(shape[0])[:, None]
    nowhere = split_vocab(jnp.full(shape, -jnp.inf, jnp.float32), 1)
    return split_vocab(nowhere.at[rows, constrain(indices)].max(constrain(values.astype(jnp.float32))), 1)


_SliceLoss = Callable[[jax.Array, _Slice], tuple[jax.Array, Callable[[], jax.Array]]]


def _value(options: Options, loss: _SliceLoss, hidden: jax.Array, kernel: jax.Array, weights: jax.Array, rest: _Slice):
    """Weighted sum over all slices, nothing kept."""

    def step(total: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        hidden, weights, rest = inputs
        losses, _ = loss(logits_of(hidden, kernel, options.layout), rest)
        return total + jnp.sum(losses * weights), None

    hidden, weights, *others = split(options.slice_tokens, hidden, weights, *rest)
    return jax.lax.scan(step, jnp.float32(0), (hidden, weights, tuple(others)))[0]


def _value_and_gradients(
    options: Options, loss: _SliceLoss, hidden: jax.Array, kernel: jax.Array, weights: jax.Array, rest: _Slice
):
    """Weighted sum over all slices and its gradients in hidden, kernel (both as if d loss = 1) and weights."""
    tokens = hidden.shape[0]
    layout = options.layout
    vocab_axis = layout.index("v")
    products = _columns_of(kernel.astype(hidden.dtype), layout)

    def step(carry: tuple[jax.Array, jax.Array], inputs: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
        total, d_kernel = carry
        hidden, weights, rest = inputs
        losses, d_losses = loss(logits_of(hidden, products, layout), rest)
        d_logits = split_vocab((d_losses() * weights[:, None]).astype(hidden.dtype), 1)
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        d_hidden = constrain(dot(f"nv,{layout}->nd", d_logits, products).astype(hidden.dtype), TOKENS)
        operands = {"d": constrain(hidden), "v": d_logits}
        d_products = kernel_gradient(operands[layout[0]], operands[layout[1]], jnp.float32)
        d_kernel = split_vocab(d_kernel + d_products, vocab_axis)
        return (total + jnp.sum(losses * weights), d_kernel), (d_hidden, losses)

    hidden, weights, *others = split(options.slice_tokens, hidden, weights, *rest)
    start = (jnp.float32(0), split_vocab(jnp.zeros(kernel.shape, jnp.float32), vocab_axis))
    (total, d_kernel), (d_hidden, losses) = jax.lax.scan(step, start, (hidden, weights, tuple(others)))
    d_kernel = split_vocab(d_kernel.astype(kernel.dtype), vocab_axis, VOCAB_OF_ONE)
    return total, (_join(d_hidden, tokens), d_kernel, _join(losses, tokens))


def _scale(gradient: jax.Array, factor: jax.Array) -> jax.Array:
    return (gradient * factor).astype(gradient.dtype)


def _cross_entropy_loss(logits: jax.Array, rest: _Slice) -> tuple[jax.Array, Callable[[], jax.Array]]:
    return cross_entropy_slice(logits, rest[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    options: Options, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """See `linear_cross_entropy`."""
    return _value(options, _cross_entropy_loss, hidden, kernel, weights, (targets,))


def _cross_entropy_forward(options, hidden, kernel, targets, weights):
    return _value_and_gradients(options, _cross_entropy_loss, hidden, kernel, weights, (targets,))


def _cross_entropy_backward(options, gradients, d_total):
    d_hidden, d_kernel, d_weights = (_scale(gradient, d_total) for gradient in gradients)
    return d_hidden, d_kernel, None, d_weights


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _kl_loss(options: Options, teacher_kernel: jax.Array) -> _SliceLoss:
    temperature = options.temperature

    def loss(logits: jax.Array, rest: _Slice) -> tuple[jax.Array, Callable[[], jax.Array]]:
        logits, teacher_logits = logits / temperature, logits_of(rest[0], teacher_kernel, options.teacher_layout)
        teacher_logits = teacher_logits / temperature
        if options.top_k:
            log_probs, indices = jax.lax.top_k(teacher_logits - _log_partition(teacher_logits), options.top_k)
            losses, gradient = _topk_kl_slice(logits, log_probs, indices)
        else:
            losses, gradient = kl_slice(logits, teacher_logits)
        return temperature**2 * losses, lambda: temperature * gradient()

    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kl(
    options: Options,
    hidden: jax.Array,
    kernel: jax.Array,
    teacher_hidden: jax.Array,
    teacher_kernel: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """See `linear_kl`."""
    return _value(options, _kl_loss(options, teacher_kernel), hidden, kernel, weights, (teacher_hidden,))


def _kl_forward(options, hidden, kernel, teacher_hidden, teacher_kernel, weights):
    loss = _kl_loss(options, teacher_kernel)
    return _value_and_gradients(options, loss, hidden, kernel, weights, (teacher_hidden,))


def _kl_backward(options, gradients, d_total):
    d_hidden, d_kernel, d_weights = (_scale(gradient, d_total) for gradient in gradients)
    return d_hidden, d_kernel, None, None, d_weights


kl.defvjp(_kl_forward, _kl_backward)


def _topk_kl_loss(logits: jax.Array, rest: _Slice) -> tuple[jax.Array, Callable[[], jax.Array]]:
    return _topk_kl_slice(logits, *rest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def topk_kl(
    options: Options,
    hidden: jax.Array,
    kernel: jax.Array,
    log_probs: jax.Array,
    indices: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """See `linear_topk_kl`."""
    return _value(options, _topk_kl_loss, hidden, kernel, weights, (log_probs, indices))


def _topk_kl_forward(options, hidden, kernel, log_probs, indices, weights):
    return _value_and_gradients(options, _topk_kl_loss, hidden, kernel, weights, (log_probs, indices))


topk_kl.defvjp(_topk_kl_forward, _kl_backward)
