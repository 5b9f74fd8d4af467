"""A softmax model in which any layers have a student's mixer: which ones is data, so that one program has them all.

The student has all its layers converted, and stacks that are cut as the model's. Its own norm is before its mixer (an
export may have moved factors from one into the other); what comes after the mixer is the softmax model's. With `window`
(models/window.py) nothing has to be trained: all of its parameters are the model's own. Forward only.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from radlads_jax.models import sharding
from radlads_jax.models.attention import Context
from radlads_jax.models.decoder import Decoder, Layer, Stack, make_context
from radlads_jax.models.mixers import MIXERS


class Inputs(NamedTuple):
    """layers: what every layer reads. hidden: the normed hidden states after the last one."""

    layers: Float[Array, "L B T D"]
    hidden: Float[Array, "B T D"]


def layer_inputs(
    decoder: Decoder,
    student: Decoder,
    swapped: Bool[Array, " L"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Inputs:
    """One forward pass of the softmax model, with the student's mixers in the layers that are True."""
    x, inputs = decoder.embed(tokens), []
    context = _context(decoder, student, x, (tokens, segment_ids, positions))
    for stack, of_student in zip(decoder.walk(), student.walk(), strict=True):

        def visit(x, layer, layer_id, _, of_student=of_student):
            return _layer(context, x, layer, of_student, layer_id, swapped), x

        x, of_stack = stack.scan(visit, x)
        inputs.append(of_stack)
    return Inputs(jnp.concatenate(inputs), sharding.whole_rows(decoder.norm(x)))


def hidden_from(
    decoder: Decoder,
    student: Decoder,
    swapped: Bool[Array, " L"],
    inputs: Float[Array, "L B T D"],
    first: Int[Array, ""],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The normed hidden states of a pass that differs from the one of `inputs` in layer `first` and after it alone."""
    context = _context(decoder, student, inputs[0], (tokens, segment_ids, positions))
    x = jax.lax.dynamic_index_in_dim(inputs, first, keepdims=False)
    for stack, of_student in zip(decoder.walk(), student.walk(), strict=True):

        def body(i, x, stack=stack, of_student=of_student):
            return _layer(context, x, stack.layer(i), of_student, stack.start + i, swapped)

        x = jax.lax.fori_loop(jnp.clip(first - stack.start, 0, stack.num_layers), stack.num_layers, body, x)
    return sharding.whole_rows(decoder.norm(x))


def _context(decoder: Decoder, student: Decoder, x: Float[Array, "B T D"], rows: tuple[Array, Array, Array]) -> Context:
    """x: what the first layer reads. rows: tokens, segment_ids, positions."""
    context, _ = make_context(decoder.cfg, *rows, None)
    stack = next(student.walk())
    if not MIXERS[stack.mixer].shares_values:
        return context
    first = stack.first()
    return context._replace(v_first=first.mixer.first_values(first.mixer_input(x)))


def _layer(
    context: Context,
    x: Float[Array, "B T D"],
    layer: Layer,
    of_student: Stack,
    layer_id: Int[Array, ""],
    swapped: Bool[Array, " L"],
) -> Float[Array, "B T D"]:
    def mixed(layer: Layer, x: Array) -> Array:
        return layer.mixer(layer.mixer_input(x), context, layer_id, None)[0].astype(x.dtype)

    own = of_student.layer(layer_id - of_student.start)
    out = jax.lax.cond(swapped[layer_id], functools.partial(mixed, own), functools.partial(mixed, layer), x)
    return layer.after_mixer(x, out)
