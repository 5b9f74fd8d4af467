"""Stage 1: every new mixer learns its attention layer's output, all layers in one pass (RADLADS section 2).

A softmax layer that is kept without its RoPE is new in this sense.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from radlads_jax.distill.losses import Batch, LossSums
from radlads_jax.models import sharding
from radlads_jax.models.attention import Context
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import Layer, bind, make_context, rematted
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.placement import gathered
from radlads_jax.models.tree import Params


def align_loss(
    student_cfg: ModelConfig,
    teacher_cfg: ModelConfig,
    student: Params,
    teacher: Params,
    batch: Batch,
    *,
    remat: str,
    slice_tokens: int | None = None,
) -> LossSums:
    """Sum over tokens of mean over layers of D^-1/2 |attention(x) - mixer(x)|_2, both after the output projection.

    student: {"stacks": {i: {"mixer": ...}}} of the aligned stacks alone: layers that stay as they are, softmax or
    recurrent, have no part in it. teacher: whole, in stacks cut at the student's boundaries; its residual stream feeds
    every mixer, so no gradient runs between layers but the value residual's. Padding (segment 0) does not count.
    Extras: "layer_loss" [aligned layers].
    """
    del slice_tokens  # there are no logits here
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    counted = (segment_ids > 0).astype(jnp.float32)
    decoder = bind(teacher_cfg, teacher)
    context, _ = make_context(teacher_cfg, tokens, segment_ids, batch["positions"], None)
    x = decoder.embed(tokens)
    layer_sums = []
    for i, (stack, (mixer, _)) in enumerate(zip(decoder.walk(), student_cfg.stacks, strict=True)):
        if not student_cfg.is_aligned(i):
            x, _ = stack.scan(functools.partial(_teacher_layer, context), x)
            continue
        mixers = Mixers(student_cfg, mixer, mixer_structure(student_cfg, mixer))
        params = student["stacks"][i]["mixer"]
        if stack.start == student_cfg.first_recurrent_layer and MIXERS[mixer].shares_values:
            v_first = rematted(mixers.first_values, remat)(params, stack.first().mixer_input(x))
            context = context._replace(v_first=v_first)
        error = rematted(functools.partial(_error, mixers, context, counted), remat)
        x, sums = stack.scan(functools.partial(_beside, context, error), x, params)
        layer_sums.append(sums)
    layer_loss = jnp.concatenate(layer_sums)
    return LossSums(layer_loss.mean(), counted.sum(), {"layer_loss": layer_loss})


class Mixers(NamedTuple):
    """The student's mixers of one stack; parameters are given as they are stored."""

    cfg: ModelConfig
    name: str
    structure: nnx.GraphDef

    def of(self, params: Params) -> Any:
        """One layer's mixer, whole on every device."""
        return nnx.merge(self.structure, gathered(params, self.cfg, self.name, "mixer/"))

    def input(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return h.astype(jnp.dtype(self.cfg.dtype))

    def first_values(self, stacked: Params, h: Float[Array, "B T D"]) -> Float[Array, "B T d"]:
        return self.of(jax.tree.map(lambda param: param[0], stacked)).first_values(self.input(h))


def _teacher_layer(context: Context, x, layer: Layer, layer_id, _):
    return layer(x, context, layer_id, None)[0], None


def _beside(context: Context, error: Callable[..., Array], x, layer: Layer, layer_id, params: Params):
    """The teacher's layer, and how far the student's mixer is from its attention on the same input."""
    h = layer.mixer_input(x)
    target = sharding.residual(layer.mixer(h, context, None, None)[0])
    return layer.after_mixer(x, target), error(params, layer_id, h, target)


def _error(mixers: Mixers, context: Context, counted, params: Params, layer_id, h, target) -> Float[Array, ""]:
    out, _ = mixers.of(params)(mixers.input(h), context, layer_id, None)
    return jnp.sum(_distance(target, sharding.to_residual(out)) * counted)


def _distance(target: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """D^-1/2 |target - out|_2, float32; the smallest term keeps the root's gradient finite where they are equal."""
    squares = jnp.square(target.astype(jnp.float32) - out.astype(jnp.float32)).sum(-1)
    return jnp.sqrt(squares + 1e-30) * target.shape[-1] ** -0.5


def mixer_structure(cfg: ModelConfig, mixer: str) -> nnx.GraphDef:
    """What turns the parameters of one of the mixers into the module."""
    return nnx.split(nnx.eval_shape(lambda: MIXERS[mixer].module(cfg, jnp.zeros((), jnp.int32), rngs=nnx.Rngs(0))))[0]
