"""Adam, or Adafactor, with one learning rate for the mixers and one for the rest, as RADLADS section 2 trains them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from radlads_jax.config import Optim, StageConfig
from radlads_jax.distill.stages import is_aligned_mixer
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.tensors import tensor_of
from radlads_jax.models.tree import Params, joined, stack_of


def make_optimizer(stage: StageConfig, optim: Optim, cfg: ModelConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam or Adafactor, decoupled weight decay, then the group's own schedule.

    cfg: of the model whose parameters train.
    """
    steps = []
    if optim.clip > 0:
        steps.append(optax.clip_by_global_norm(optim.clip))
    steps += _adafactor(optim) if optim.name == "adafactor" else [_adam(optim)]
    if optim.weight_decay > 0:
        steps.append(_decayed_matrices(optim.weight_decay, cfg))
    groups = {name: optax.scale_by_learning_rate(schedule) for name, schedule in learning_rates(stage).items()}
    return optax.chain(*steps, optax.partition(groups, functools.partial(param_groups, cfg)))


def _adam(optim: Optim) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps)
    return adam if optim.moment_dtype == "float32" else _kept_in(adam, optim.moment_dtype)


def _adafactor(optim: Optim) -> list[optax.GradientTransformation]:
    """Shazeer and Stern (arXiv 1804.04235) with rates that are absolute, as Adam's, and with momentum unless beta1 = 0.

    The second moment of a matrix of at least 128 x 128 is kept as its means over rows and over columns; its decay is
    1 - t^-0.8.
    """
    steps = [optax.scale_by_factored_rms(), optax.stateless(_clipped_layers)]
    return steps + ([optax.ema(optim.beta1, accumulator_dtype=optim.moment_dtype)] if optim.beta1 else [])


def _clipped_layers(updates: Params, _: Params | None) -> Params:
    """Every layer's update of a parameter, scaled down where its root mean square is above 1."""

    def clipped(path: tuple, x: jax.Array) -> jax.Array:
        own = tuple(range(x.ndim - _own_rank(path, x), x.ndim))
        return x / jnp.maximum(1.0, jnp.sqrt(jnp.mean(x**2, axis=own, keepdims=True)))

    return jax.tree_util.tree_map_with_path(clipped, updates)


def _decayed_matrices(rate: float, cfg: ModelConfig) -> optax.GradientTransformation:
    """Adds `rate` of each matrix to its update: of what a token is multiplied with, and of the embedding.

    All else has a size to keep: norms, biases, decay bases, and what multiplies channel by channel, also where several
    vectors are one parameter: mixes of tokens, bonuses, taps of convolutions.
    """

    def decayed(path: tuple, update: jax.Array, x: jax.Array) -> jax.Array:
        tensor = tensor_of(cfg, joined(path))
        is_matrix = tensor is not None and (tensor.multiplies or tensor.path == "embed/embedding")
        return update + rate * x if is_matrix else update

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(decayed, updates, params))


def _own_rank(path: tuple, x: Any) -> int:
    """Dimensions of a parameter in one layer, without the axis along which a stack holds its layers."""
    return x.ndim - (stack_of(joined(path)) is not None)


def _kept_in(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner` with its state's floats in dtype between steps, float32 within them.

    A bfloat16 has steps of 0.4% to 0.8%: a moment is moved by what changes it by more than half of one, which with a
    beta2 of 0.95 is all but gradients within a few percent of their own root mean square; one of 0.999 would stand
    still. (Optax has this for the first moment alone.)
    """

    def cast(state: optax.OptState, to: str) -> optax.OptState:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def init(params: Params) -> optax.OptState:
        return cast(inner.init(params), dtype)

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        updates, state = inner.update(updates, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def learning_rates(stage: StageConfig) -> dict[str, optax.Schedule]:
    """The schedule of every parameter group, "mixer" and "rest"."""
    return {
        "mixer": _quarter_cosine(stage, stage.mixer_lr, stage.mixer_lr_final),
        "rest": _quarter_cosine(stage, stage.lr, stage.lr_final),
    }


def _quarter_cosine(stage: StageConfig, init: float, final: float) -> optax.Schedule:
    """lr = final + (init - final) cos(pi/2 p), p from 0 to 1 between the recipe's fractions of the steps.

    Before, a linear warm-up from 1% to 100%; the decay begins no earlier than the warm-up's end. The published "cosine"
    is this quarter of one, not the usual half.
    """
    begin = max(stage.decay_begin * stage.steps, stage.warmup_steps)
    span = max(stage.decay_end * stage.steps - begin, 1.0)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = 0.01 + 0.99 * jnp.minimum(step / stage.warmup_steps, 1.0) if stage.warmup_steps else 1.0
        progress = jnp.clip((step - begin) / span, 0.0, 1.0)
        return warm * (final + (init - final) * jnp.cos(math.pi / 2 * progress))

    return schedule


def param_groups(cfg: ModelConfig, params: Params) -> Params:
    """The group's name of every parameter: "mixer" for what stage 1 aligns, "rest" for all others.

    Softmax layers that stay, and a teacher's own recurrent ones, are of the rest: they begin as the teacher's.
    """

    def name(path: tuple, _: Any) -> str:
        return "mixer" if is_aligned_mixer(joined(path), cfg) else "rest"

    return jax.tree_util.tree_map_with_path(name, params)
