"""Weighted sums for evaluation, forward only."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.linear_loss.sliced import Options, cross_entropy_slice, kl_slice, logits_of, split


def stats(
    options: Options,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    teacher_hidden: jax.Array | None,
    teacher_kernel: jax.Array | None,
) -> dict[str, jax.Array]:
    """See `linear_stats`."""

    def step(totals: dict[str, jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], None]:
        hidden, targets, weights, *teacher = inputs
        logits = logits_of(hidden, kernel, options.layout)
        top = jnp.argmax(logits, axis=-1)
        values: dict[str, Any] = {"loss": cross_entropy_slice(logits, targets)[0], "top1": top == targets}
        if teacher and teacher_kernel is not None:
            teacher_logits = logits_of(teacher[0], teacher_kernel, options.teacher_layout)
            teacher_top = jnp.argmax(teacher_logits, axis=-1)
            values["kl"] = kl_slice(logits, teacher_logits)[0]
            values["agreement"] = top == teacher_top
            values["teacher_loss"] = cross_entropy_slice(teacher_logits, targets)[0]
            values["teacher_top1"] = teacher_top == targets
        return {name: totals[name] + jnp.sum(value * weights) for name, value in values.items()}, None

    names = ["loss", "top1"]
    arrays = [hidden, targets, weights]
    if teacher_hidden is not None:
        names += ["kl", "agreement", "teacher_loss", "teacher_top1"]
        arrays.append(teacher_hidden)
    start = {name: jnp.float32(0) for name in names}
    return jax.lax.scan(step, start, split(options.slice_tokens, *arrays))[0]
