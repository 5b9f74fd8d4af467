"""A softmax model in which any layers see a window of keys alone: which ones is data, so that one program has them all.

A layer is one softmax behind one of two masks, the whole segment's or that of the mixer `window` (models/window.py),
whose output it has. Scores are [B, H, T, T]: for measurements on short rows, forward only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from radlads_jax.models import sharding
from radlads_jax.models.attention import Context
from radlads_jax.models.decoder import Decoder, Layer, make_context
from radlads_jax.models.window import WindowOptions


class _Masks(NamedTuple):
    """Which keys each query sees: all before it in its segment, or the window's of them."""

    whole: Bool[Array, "B T T"]
    window: Bool[Array, "B T T"]


class Inputs(NamedTuple):
    """layers: what every layer reads. hidden: the normed hidden states after the last one."""

    layers: Float[Array, "L B T D"]
    hidden: Float[Array, "B T D"]


def layer_inputs(
    decoder: Decoder,
    options: WindowOptions,
    windowed: Bool[Array, " L"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Inputs:
    """One forward pass of the softmax model, with windows in the layers that are True."""
    context, masks = _context_and_masks(decoder, options, tokens, segment_ids, positions)

    def visit(x, layer, layer_id, _):
        return _layer(context, masks, x, layer, windowed[layer_id]), x

    x, inputs = decoder.embed(tokens), []
    for stack in decoder.walk():
        x, of_stack = stack.scan(visit, x)
        inputs.append(of_stack)
    return Inputs(jnp.concatenate(inputs), sharding.whole_rows(decoder.norm(x)))


def hidden_from(
    decoder: Decoder,
    options: WindowOptions,
    windowed: Bool[Array, " L"],
    inputs: Float[Array, "L B T D"],
    first: Int[Array, ""],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The normed hidden states of a pass that differs from the one of `inputs` in layer `first` and after it alone."""
    context, masks = _context_and_masks(decoder, options, tokens, segment_ids, positions)
    x = jax.lax.dynamic_index_in_dim(inputs, first, keepdims=False)
    for stack in decoder.walk():

        def body(i, x, stack=stack):
            return _layer(context, masks, x, stack.layer(i), windowed[stack.start + i])

        x = jax.lax.fori_loop(jnp.clip(first - stack.start, 0, stack.num_layers), stack.num_layers, body, x)
    return sharding.whole_rows(decoder.norm(x))


def _context_and_masks(decoder: Decoder, options: WindowOptions, tokens: Array, segment_ids: Array, positions: Array):
    context, _ = make_context(decoder.cfg, tokens, segment_ids, positions, None)
    assert context.starts is not None  # there are segments
    return context, _masks(segment_ids, context.starts, options)


def _masks(segment_ids: Int[Array, "B T"], starts: Bool[Array, "B T"], options: WindowOptions) -> _Masks:
    places = jnp.arange(starts.shape[1])
    in_segment = places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    whole = (places[:, None] >= places) & (segment_ids[:, :, None] == segment_ids[:, None])
    near = (places[:, None] - places < options.window) | (in_segment < options.sinks)[:, None]
    return _Masks(whole, whole & near)


def _layer(context: Context, masks: _Masks, x: Float[Array, "B T D"], layer: Layer, windowed: Bool[Array, ""]):
    q, k, v, gate = layer.mixer.projected(layer.mixer_input(x), context)
    mask = jnp.where(windowed, masks.window, masks.whole)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    out = out if gate is None else out * jax.nn.sigmoid(gate)
    return layer.after_mixer(x, layer.mixer.o(out.reshape(*x.shape[:2], -1)))
