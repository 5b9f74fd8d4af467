"""Stage 1: every recurrent mixer learns its attention layer's output, all layers in one pass (RADLADS section 2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from radlads_jax.distill.losses import Batch, LossSums
from radlads_jax.models import sharding
from radlads_jax.models.attention import Context
from radlads_jax.models.config import SOFTMAX, ModelConfig
from radlads_jax.models.decoder import Params, bind, make_context, rematted
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.placement import gathered


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

    student: {"stacks": {i: {"mixer": ...}}} of the recurrent stacks alone. teacher: whole, in stacks cut at the
    student's boundaries; its residual stream feeds every mixer, so no gradient runs between layers but the value
    residual's. Padding (segment 0) does not count. Extras: "layer_loss" [recurrent layers].
    """
    del slice_tokens  # there are no logits here
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    counted = (segment_ids > 0).astype(jnp.float32)
    decoder = bind(teacher_cfg, teacher)
    context, _ = make_context(teacher_cfg, tokens, segment_ids, batch["positions"], None)
    student_dtype = jnp.dtype(student_cfg.dtype)
    x = decoder.embed(tokens)
    layer_sums = []
    stacks = zip(student_cfg.stack_starts, student_cfg.stacks, decoder.stacks, strict=True)
    for i, (start, (mixer_name, n), stack) in enumerate(stacks):
        if mixer_name == SOFTMAX:
            x, _ = jax.lax.scan(functools.partial(_teacher_layer, teacher_cfg, context), x, stack)
            continue
        structure = mixer_structure(student_cfg, mixer_name)

        def mixer_of(params, structure=structure, mixer_name=mixer_name):
            return nnx.merge(structure, gathered(params, student_cfg, mixer_name, "mixer/"))

        def first_values(params, h, mixer_of=mixer_of):
            first = jax.tree.map(lambda param: param[0], params)
            return mixer_of(first).first_values(h.astype(student_dtype))

        mixers = student["stacks"][i]["mixer"]
        if start == student_cfg.first_recurrent_layer:
            first = gathered(jax.tree.map(lambda param: param[0], stack), teacher_cfg, SOFTMAX)
            v_first = rematted(first_values, remat)(mixers, first.mixer_input(x))
            context = context._replace(v_first=v_first)

        def error(params, layer_id, h, target, mixer_of=mixer_of, context=context):
            out, _ = mixer_of(params)(h.astype(student_dtype), context, layer_id, None)
            return jnp.sum(_distance(target, sharding.to_residual(out)) * counted)

        def body(x, inputs, error=error, context=context):
            layer, params, layer_id = inputs
            layer = gathered(layer, teacher_cfg, SOFTMAX)
            h = layer.mixer_input(x)
            target = sharding.residual(layer.mixer(h, context, None, None)[0])
            return layer.after_mixer(x, target), rematted(error, remat)(params, layer_id, h, target)

        x, sums = jax.lax.scan(body, x, (stack, mixers, start + jnp.arange(n)))
        layer_sums.append(sums)
    layer_loss = jnp.concatenate(layer_sums)
    return LossSums(layer_loss.mean(), counted.sum(), {"layer_loss": layer_loss})


def _teacher_layer(cfg: ModelConfig, context: Context, x: Array, layer: Any) -> tuple[Array, None]:
    return gathered(layer, cfg, SOFTMAX)(x, context, None, None)[0], None


def _distance(target: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """D^-1/2 |target - out|_2, float32; the smallest term keeps the root's gradient finite where they are equal."""
    squares = jnp.square(target.astype(jnp.float32) - out.astype(jnp.float32)).sum(-1)
    return jnp.sqrt(squares + 1e-30) * target.shape[-1] ** -0.5


def mixer_structure(cfg: ModelConfig, mixer: str) -> nnx.GraphDef:
    """What turns the parameters of one of the mixers into the module."""
    return nnx.split(nnx.eval_shape(lambda: MIXERS[mixer].module(cfg, jnp.zeros((), jnp.int32), rngs=nnx.Rngs(0))))[0]
