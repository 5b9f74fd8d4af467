"""What the commands that measure linear_loss compare: each loss sliced and plain, with its gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_loss import linear_cross_entropy, linear_kl, linear_topk_kl
from pallas_kernels.sharded import VOCAB, split_vocab

LOSSES = ("cross_entropy", "kl", "topk_kl")
FORMS = ("sliced", "plain")
_Loss = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """Tokens, vocabulary, width of student and teacher, and how many of a teacher's tokens were stored."""

    tokens: int = 2048
    vocab: int = 152064
    width: int = 896
    stored: int = 64


def shapes(loss: str, size: Size, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The arguments of one loss; kernels are float32."""
    hidden, kernel, row = (size.tokens, size.width), (size.width, size.vocab), (size.tokens, size.stored)
    rest: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {
        "cross_entropy": {"targets": (hidden[:1], jnp.int32)},
        "kl": {"teacher_hidden": (hidden, dtype), "teacher_kernel": (kernel, jnp.float32)},
        "topk_kl": {"teacher_log_probs": (row, jnp.float32), "teacher_indices": (row, jnp.int32)},
    }
    made = {"hidden": (hidden, dtype), "kernel": (kernel, jnp.float32), "weights": (hidden[:1], jnp.float32)}
    made |= rest[loss]
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in made.items()}


def arguments(loss: str, size: Size, dtype: Any) -> dict[str, jax.Array]:
    """Random ones: logits of a standard deviation of one, a stored row of equal probabilities."""
    keys = iter(jax.random.split(jax.random.key(0), 8))
    made = {}
    for name, like in shapes(loss, size, dtype).items():
        if name == "teacher_indices":
            made[name] = jnp.arange(size.tokens)[:, None] * 7 % (size.vocab - size.stored) + jnp.arange(size.stored)
        elif name == "targets":
            made[name] = jax.random.randint(next(keys), like.shape, 0, size.vocab)
        elif name in ("weights", "teacher_log_probs"):
            value = 1.0 if name == "weights" else jnp.log(0.9 / size.stored)
            made[name] = jnp.full(like.shape, value, jnp.float32)
        else:
            scale = size.width**-0.5 if "kernel" in name else 1.0
            made[name] = scale * jax.random.normal(next(keys), like.shape, like.dtype)
    return made


def value_and_gradients(loss: str, form: str) -> Callable[[dict[str, jax.Array]], Any]:
    """The loss with its gradients in hidden and kernel, as a function of the arguments' dict."""
    sliced: dict[str, _Loss] = {"cross_entropy": linear_cross_entropy, "kl": linear_kl, "topk_kl": linear_topk_kl}
    plain: dict[str, _Loss] = {"cross_entropy": _cross_entropy, "kl": _kl, "topk_kl": _topk_kl}
    run = (sliced if form == "sliced" else plain)[loss]

    def both(arguments: dict[str, jax.Array]) -> Any:
        rest = {name: x for name, x in arguments.items() if name not in ("hidden", "kernel")}
        of_two = jax.value_and_grad(lambda hidden, kernel: run(hidden, kernel, **rest), argnums=(0, 1))
        return of_two(arguments["hidden"], arguments["kernel"])

    return both


def _log_probs(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """All tokens' logits at once, their vocabulary over the devices of a mesh where there is one."""
    kernel = split_vocab(kernel.astype(hidden.dtype), 1, VOCAB)
    logits = split_vocab(jnp.dot(hidden, kernel, preferred_element_type=jnp.float32), 1, VOCAB)
    return jax.nn.log_softmax(logits)


def _cross_entropy(hidden: jax.Array, kernel: jax.Array, weights: jax.Array, targets: jax.Array) -> jax.Array:
    log_q = _log_probs(hidden, kernel)
    return -jnp.sum(weights * jnp.take_along_axis(log_q, targets[:, None], axis=-1)[:, 0])


def _kl(
    hidden: jax.Array, kernel: jax.Array, weights: jax.Array, teacher_hidden: jax.Array, teacher_kernel: jax.Array
) -> jax.Array:
    log_q, log_p = _log_probs(hidden, kernel), _log_probs(teacher_hidden, teacher_kernel)
    return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def _topk_kl(
    hidden: jax.Array, kernel: jax.Array, weights: jax.Array, teacher_log_probs: jax.Array, teacher_indices: jax.Array
) -> jax.Array:
    log_q = _log_probs(hidden, kernel)
    known = jnp.take_along_axis(log_q, teacher_indices, axis=-1)
    p = jnp.exp(teacher_log_probs)
    rest, log_rest = 1 - jnp.sum(p, axis=-1), jnp.log1p(-jnp.sum(jnp.exp(known), axis=-1))
    losses = jnp.sum(p * (teacher_log_probs - known), axis=-1) + rest * (jnp.log(rest) - log_rest)
    return jnp.sum(weights * losses)
