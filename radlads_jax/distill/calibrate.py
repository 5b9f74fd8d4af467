"""A mixer's start from what its teacher's attention does on one batch (config.student.init "calibrated").

Every layer is read as stage 1 reads it, first its attention alone, then beside the mixer as that made it begin; what
becomes of what is seen is the mixer's to say (MixerSpec.calibrations). Source of the ideas: Taylor-Calibrate (arXiv
2606.16429).
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from radlads_jax.distill.align import Mixers, mixer_structure
from radlads_jax.models import sharding
from radlads_jax.models.attention import Context, softmax_attention
from radlads_jax.models.config import SOFTMAX, ModelConfig
from radlads_jax.models.decoder import Layer, bind, make_context
from radlads_jax.models.layers import repeat_kv
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.placement import constrain_params, shardings
from radlads_jax.models.spec import Calibration, LayerOutputs, TeacherStatistics
from radlads_jax.models.tree import Params, overlay_params

# Of each row: a look-back beyond half of it can not be told from none.
_MOST_TOKENS = 1024
# The first keys of a segment are where attention rests that looks nowhere, and the first queries have few others.
_SINKS = 4
_FIRST_QUERY = 8
_QUERY_BLOCK = 128
_RIDGE = 1e-2
_SOLVER_STEPS = 64


def calibrated(
    student: ModelConfig,
    teacher: ModelConfig,
    mixers: Params,
    weights: Params,
    batch: Mapping[str, Any],
    parts: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Params:
    """`mixers`, as `init_mixers` makes them, with these parts (all by default) of every converted stack calibrated.

    weights: the teacher's, whose stacks are cut at the student's boundaries. batch: as a training step reads it.
    """
    spec = MIXERS[student.recurrent_mixer or SOFTMAX]
    known = spec.calibrations(student)
    chosen = [known[name] for name in parts or spec.calibrated if name in known]

    def calibrate(mixers: Params, weights: Params, batch: Mapping[str, Any]) -> Params:
        seen = statistics(student, teacher, weights, batch)
        for i in seen:
            stack = mixers["stacks"][i]
            for part in chosen:
                if part.of_attention is not None:
                    stack["mixer"] |= part.of_attention(student, stack["mixer"], seen[i])
        if any(part.of_outputs is not None for part in chosen):
            mixers = overlay_params(mixers, _fitted(student, teacher, mixers, weights, batch, chosen))
        return constrain_params(mixers, student)

    if mesh is None:
        return jax.jit(calibrate)(mixers, weights, batch)
    with sharding.traced_over(mesh):
        return jax.jit(calibrate, out_shardings=shardings(mesh, mixers, student))(mixers, weights, batch)


def has_queries(batch: Mapping[str, Any]) -> bool:
    """Whether a row of the batch, as numpy arrays, has a query whose attention is looked at."""
    segment_ids, positions = (batch[name][:, :_MOST_TOKENS] for name in ("segment_ids", "positions"))
    return bool(((segment_ids > 0) & (positions >= _FIRST_QUERY)).any())


def statistics(
    student: ModelConfig, teacher: ModelConfig, weights: Params, batch: Mapping[str, Any]
) -> dict[int, TeacherStatistics]:
    """Of the layers of every converted stack, by the stack's number."""
    tokens, segment_ids, positions = _read(batch)
    decoder = bind(teacher, weights)
    context, _ = make_context(teacher, tokens, segment_ids, positions, None)
    x, by_stack = decoder.embed(tokens), {}

    def visit(converted: bool, x: Array, layer: Layer, layer_id: Array, _: None) -> tuple[Array, Any]:
        h = layer.mixer_input(x)
        out = sharding.residual(layer.mixer(h, context, layer_id, None)[0])
        seen = _of_layer(layer.mixer, h, context, segment_ids, positions) if converted else None
        return layer.after_mixer(x, out), seen

    for i, stack in enumerate(decoder.walk()):
        x, seen = stack.scan(functools.partial(visit, student.is_converted(i)), x)
        if seen is not None:
            by_stack[i] = seen
    return by_stack


def _fitted(
    student: ModelConfig,
    teacher: ModelConfig,
    mixers: Params,
    weights: Params,
    batch: Mapping[str, Any],
    parts: Sequence[Calibration],
) -> Params:
    """The converted stacks' mixers, parts of which are made of their outputs beside attention's; one layer's outputs
    are held at a time."""
    tokens, segment_ids, positions = _read(batch)
    decoder = bind(teacher, weights)
    context, _ = make_context(teacher, tokens, segment_ids, positions, None)
    counted = (segment_ids > 0).astype(jnp.float32)
    x, fitted = decoder.embed(tokens), {}

    def visit(
        own: Mixers | None, context: Context, x: Array, layer: Layer, layer_id: Array, params: Params | None
    ) -> tuple[Array, Any]:
        h = layer.mixer_input(x)
        out = sharding.residual(layer.mixer(h, context, layer_id, None)[0])
        if own is not None and params is not None:
            attention = _attention_outputs(layer.mixer, h, context).reshape(*h.shape[:2], -1)
            outputs, _ = own.of(params).heads(own.input(h), context, layer_id, None)
            target = attention @ layer.mixer.o.kernel[...].astype(jnp.float32)
            seen = LayerOutputs(attention, outputs.astype(jnp.float32), target, counted)
            fits = (part.of_outputs(student, params, seen) for part in parts if part.of_outputs is not None)
            params = functools.reduce(operator.or_, fits, params)
        return layer.after_mixer(x, out), params

    for i, (stack, (mixer, _)) in enumerate(zip(decoder.walk(), student.stacks, strict=True)):
        if not student.is_converted(i):
            x, _ = stack.scan(functools.partial(visit, None, context), x)
            continue
        own, params = Mixers(student, mixer, mixer_structure(student, mixer)), mixers["stacks"][i]["mixer"]
        if stack.start == student.first_recurrent_layer and MIXERS[mixer].shares_values:
            context = context._replace(v_first=own.first_values(params, stack.first().mixer_input(x)))
        x, params = stack.scan(functools.partial(visit, own, context), x, params)
        fitted[i] = {"mixer": params}
    return {"stacks": fitted}


def _read(batch: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Its tokens, segment ids and positions, as far as they are read."""
    tokens, segment_ids, positions = (batch[name][:, :_MOST_TOKENS] for name in ("tokens", "segment_ids", "positions"))
    return tokens, segment_ids, positions


def _of_layer(
    mixer: Any, h: Float[Array, "B T D"], context: Context, segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"]
) -> TeacherStatistics:
    q, k, _, _ = mixer.projected(h, context)
    outputs = _attention_outputs(mixer, h, context)
    counted = (segment_ids > 0).astype(jnp.float32)
    squares = jnp.einsum("bthk,bt->h", jnp.square(outputs), counted) / (counted.sum() * outputs.shape[-1])
    look_back, entropy = _attention(q, repeat_kv(k, q.shape[2]), segment_ids, positions)
    return TeacherStatistics(look_back, entropy, jnp.sqrt(squares), _constant(h.astype(jnp.float32), counted))


def _attention_outputs(mixer: Any, h: Float[Array, "B T D"], context: Context) -> Float[Array, "B T H K"]:
    """What o reads, float32."""
    q, k, v, gate = mixer.projected(h, context)
    outputs = softmax_attention(q, k, v, context).astype(jnp.float32)
    return outputs if gate is None else outputs * jax.nn.sigmoid(gate.astype(jnp.float32))


def _attention(q: Array, k: Array, segment_ids: Array, positions: Array) -> tuple[Array, Array]:
    """(mean distance in tokens, mean entropy in nats) of a query's keys but for the segment's first ones, [H] each."""
    length, scale = q.shape[1], q.shape[-1] ** -0.5
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    queries = ((segment_ids > 0) & (positions >= _FIRST_QUERY)).astype(jnp.float32)
    sums = jnp.zeros((2, q.shape[2]), jnp.float32)
    for first in range(0, length, _QUERY_BLOCK):
        block = slice(first, first + _QUERY_BLOCK)
        scores = scale * jnp.einsum("bthk,bshk->bhts", q[:, block], k, preferred_element_type=jnp.float32)
        same = segment_ids[:, block, None] == segment_ids[:, None, :]
        seen = (same & (distance[block] >= 0) & (positions[:, None, :] >= _SINKS))[:, None]
        log_p = jax.nn.log_softmax(jnp.where(seen, scores, -1e30), axis=-1)
        p = jnp.where(seen, jnp.exp(log_p), 0.0)
        far = jnp.einsum("bhts,ts->bht", p, jnp.maximum(distance[block], 0.5))
        spread = -jnp.sum(jnp.where(seen, p * log_p, 0.0), axis=-1)
        sums += jnp.einsum("nbht,bt->nh", jnp.stack([far, spread]), queries[:, block])
    look_back, entropy = sums / jnp.maximum(queries.sum(), 1.0)
    return look_back, entropy


def _constant(x: Float[Array, "B T D"], counted: Float[Array, "B T"]) -> Float[Array, " D"]:
    """The w for which x w is nearest to 1, by ridge regression: what stands in for a bias that a format has not."""
    weight = counted[..., None]
    ridge = _RIDGE * jnp.sum(jnp.square(x) * weight) / x.shape[-1]

    def normal(w: Array) -> Array:
        return jnp.einsum("btd,bt->d", x, counted * (x @ w)) + ridge * w

    # Products with x alone: D x D matrices of every layer would be as large as the layer.
    w, _ = jax.scipy.sparse.linalg.cg(normal, jnp.sum(x * weight, (0, 1)), maxiter=_SOLVER_STEPS)
    return w
