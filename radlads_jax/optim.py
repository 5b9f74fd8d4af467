"""Adam with one learning rate for the mixers and one for the rest, as RADLADS section 2 trains them."""

import math

import jax
import jax.numpy as jnp
import optax

from radlads_jax.config import Optim, StageConfig
from radlads_jax.train_state import Params


def make_optimizer(stage: StageConfig, optim: Optim) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay, then the group's own schedule."""
    steps = []
    if optim.clip > 0:
        steps.append(optax.clip_by_global_norm(optim.clip))
    steps.append(optax.scale_by_adam(b1=optim.beta1, b2=optim.beta2, eps=optim.eps))
    if optim.weight_decay > 0:
        steps.append(optax.add_decayed_weights(optim.weight_decay))
    groups = {name: optax.scale_by_learning_rate(schedule) for name, schedule in learning_rates(stage).items()}
    return optax.chain(*steps, optax.partition(groups, param_groups))


def learning_rates(stage: StageConfig) -> dict[str, optax.Schedule]:
    """The schedule of every parameter group, "mixer" and "rest"."""
    return {
        "mixer": quarter_cosine(stage, stage.mixer_lr, stage.mixer_lr_final),
        "rest": quarter_cosine(stage, stage.lr, stage.lr_final),
    }


def quarter_cosine(stage: StageConfig, init: float, final: float) -> optax.Schedule:
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


def param_groups(params: Params) -> Params:
    """The group's name of every parameter: "mixer" for what stands in a mixer, "rest" for all others."""

    def name(path: tuple, _: jax.Array) -> str:
        return "mixer" if "/mixer/" in jax.tree_util.keystr(path, simple=True, separator="/") else "rest"

    return jax.tree_util.tree_map_with_path(name, params)
