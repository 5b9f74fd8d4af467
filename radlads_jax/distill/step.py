"""The one training step: loss, accumulated gradient, clip, update; what is not finite changes nothing but counters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pallas_kernels.sharded import ROWS, constrain
from radlads_jax.distill.losses import Batch, LossSums
from radlads_jax.distill.train_state import TrainState
from radlads_jax.models.tree import Params, merge_params

_LossFn = Callable[[Params, Params | None, Batch], LossSums]


def make_train_step(
    loss_fn: _LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    place: Callable[[Params], Params] = lambda params: params,
):
    """train_step(state, frozen, teacher, batch) -> (state, metrics); pure, to be jitted with state donated.

    loss_fn(student params, teacher params, batch) -> LossSums. frozen: the student's parameters that don't train,
    teacher: its own; neither is differentiated. batch: arrays [B, T], computed in `accumulate` parts of B / accumulate
    rows. place: puts gradients where their parameters lie.
    metrics: loss (mean per token), grad_norm (before the clip), finite (0 or 1), tokens counted,
    skipped and skipped_in_a_row (non-finite steps so far), extras as means.
    """

    def train_step(state: TrainState, frozen: Params, teacher: Params | None, batch: Batch):
        def loss_of(trainable: Params, part: Batch) -> tuple[jax.Array, LossSums]:
            sums = loss_fn(merge_params(trainable, frozen), teacher, part)
            return sums.loss, sums

        sums, grads = _accumulate(jax.grad(loss_of, has_aux=True), state.params, batch, accumulate, place)
        weight = jnp.maximum(sums.weight, 1.0)
        grads = place(jax.tree.map(lambda g: g / weight.astype(g.dtype), grads))
        loss, grad_norm = sums.loss / weight, optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": grad_norm, "finite": finite.astype(jnp.float32), "tokens": sums.weight}
        metrics |= jax.tree.map(lambda total: total / weight, sums.extras)
        state = state.advance(params, opt_state, finite)
        return state, metrics | {"skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}

    return train_step


def _accumulate(
    grad_fn: Any, params: Params, batch: Batch, parts: int, place: Callable[[Params], Params]
) -> tuple[LossSums, Params]:
    """Sums and gradients of a batch, computed part by part so that one part's activations exist at a time."""
    if parts == 1:
        grads, sums = grad_fn(params, batch)
        return sums, grads
    split = jax.tree.map(lambda x: constrain(x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), None, ROWS), batch)
    one_part = jax.tree.map(lambda x: x[0], split)
    grads, sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad_fn, params, one_part))

    def body(total, part):
        grads, sums = jax.tree.map(jnp.add, total, grad_fn(params, part))
        return (place(grads), sums), None

    (grads, sums), _ = jax.lax.scan(body, (place(grads), sums), split)
    return sums, grads
