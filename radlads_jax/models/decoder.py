"""The decoder: embedding, stacks of layers (each one scanned), final norm, head. Teachers and students alike."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from radlads_jax.models import rope, sharding
from radlads_jax.models.attention import Context, logit_scale
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import MLP, RMSNorm, linear
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.placement import gathered
from radlads_jax.models.state import State, grows, mixer_state
from radlads_jax.models.tree import Params

# What a layer's backward pass finds stored: everything, its matmuls' results, or its input alone.
_REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Embedding(nnx.Module):
    """Rows of [vocab, D] by token id."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        shape = (cfg.vocab_size, cfg.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, cfg.param_dtype))
        self.dtype = cfg.dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Each device looks up its own columns for all rows, then columns are exchanged for rows: no weight travels.
        columns = sharding.constrain(self.embedding[...][tokens].astype(self.dtype), "data", "context", "fsdp")
        return sharding.residual(columns)


class Layer(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: ModelConfig, mixer: str, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(cfg.hidden_size, cfg)
        self.mixer = MIXERS[mixer].module(cfg, layer_id, rngs=rngs)
        self.post_norm = RMSNorm(cfg.hidden_size, cfg)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(self, x, context: Context, layer_id, state):
        out, state = self.mixer(self.mixer_input(x), context, layer_id, state)
        return self.after_mixer(x, out), state

    def mixer_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The normed residual stream, whole rows of it."""
        return sharding.whole_rows(self.input_norm(x))

    def after_mixer(self, x: Float[Array, "B T D"], out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's result, given its input and its mixer's output."""
        x = x + sharding.to_residual(out)
        return x + sharding.to_residual(self.mlp(sharding.whole_rows(self.post_norm(x))))


class Decoder(nnx.Module):
    """A causal language model; cfg.stacks says which mixer each run of layers has."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Embedding(cfg, rngs=rngs)
        self.stacks = nnx.List(
            [
                jax.vmap(lambda r, i, mixer=mixer: Layer(cfg, mixer, i, rngs=r))(rngs.split(n), start + jnp.arange(n))
                for start, (mixer, n) in zip(cfg.stack_starts, cfg.stacks, strict=True)
            ]
        )
        self.norm = RMSNorm(cfg.hidden_size, cfg)
        if not cfg.tie_embeddings:
            self.head = linear(cfg.hidden_size, cfg.vocab_size, cfg, rngs)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        state: State | None = None,
        remat: str = "none",
    ) -> tuple[Float[Array, "B T D"], State | None]:
        """The normed hidden states that the head reads, and the state after the last token (None without one).

        segment_ids: 0 = padding; tokens see their own segment only, recurrent states reset where it changes. positions:
        from 0 in every segment, for RoPE and logits that are scaled; by default they count from the segment's start, or
        on from the state's length. remat: a name of _REMAT_POLICIES.
        """
        context, state = make_context(self.cfg, tokens, segment_ids, positions, state)
        x, stack_states = self.embed(tokens), []
        for stack, stack_state in zip(self.walk(), _stack_states(state, self.cfg), strict=True):
            if stack.start == self.cfg.first_recurrent_layer and MIXERS[stack.mixer].shares_values:
                first_values = rematted(lambda layers, x, stack=stack: _first_values(stack.first(layers), x), remat)
                context = context._replace(v_first=first_values(stack.layers, x))
            x, stack_state = stack.scan(functools.partial(_layer, context), x, stack_state, remat=remat)
            stack_states.append(stack_state)
        return sharding.whole_rows(self.norm(x)), None if state is None else state | {"stacks": stack_states}

    def walk(self) -> Iterator["Stack"]:
        """The layers, stack after stack, from the first on."""
        for start, (mixer, n), layers in zip(self.cfg.stack_starts, self.cfg.stacks, self.stacks, strict=True):
            yield Stack(self.cfg, mixer, start, n, layers)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """hidden times the head (the embedding where they are tied), accumulated and returned in float32."""
        kernel, layout = self.head_kernel()
        equation = "btd,dv->btv" if layout == "dv" else "btd,vd->btv"
        return jnp.einsum(equation, hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def head_kernel(self) -> tuple[Array, Literal["dv", "vd"]]:
        """The head's matrix and its layout, "dv" for [D, vocab] or "vd" for the tied embedding [vocab, D]."""
        return (self.embed.embedding[...], "vd") if self.cfg.tie_embeddings else (self.head.kernel[...], "dv")


class Stack(NamedTuple):
    """`num_layers` layers in a row that have one mixer, from layer `start` on; `layers` has them along axis 0."""

    cfg: ModelConfig
    mixer: str
    start: int
    num_layers: int
    layers: Layer

    def first(self, layers: Layer | None = None) -> Layer:
        """The first layer, whole on every device. layers: instead of the stack's own."""
        return self._whole(jax.tree.map(lambda param: param[0], self.layers if layers is None else layers))

    def layer(self, index: Int[Array, ""]) -> Layer:
        """The stack's layer of this number, counted from its first one, whole on every device."""
        layer = jax.tree.map(lambda param: jax.lax.dynamic_index_in_dim(param, index, keepdims=False), self.layers)
        return self._whole(layer)

    def scan(
        self, visit: Callable[..., tuple[Array, Any]], x: Array, inputs: Any = None, *, remat: str = "none"
    ) -> tuple[Array, Any]:
        """visit(x, layer, layer_id, its part of inputs) -> (x, output) from layer to layer; the last x, all outputs.

        inputs: a tree whose leaves have the stack's layers along axis 0. remat: what is kept of a visit.
        """

        def body(x, scanned):
            layer, layer_id, own = scanned
            return visit(x, self._whole(layer), layer_id, own)

        return jax.lax.scan(rematted(body, remat), x, (self.layers, self.start + jnp.arange(self.num_layers), inputs))

    def _whole(self, layer: Layer) -> Layer:
        return gathered(layer, self.cfg, self.mixer)


def _layer(context: Context, x, layer: Layer, layer_id, state):
    return layer(x, context, layer_id, state)


def _first_values(layer: Layer, x: Float[Array, "B T D"]) -> Float[Array, "B T d"]:
    """Computed before the scan, that not every layer's carry holds them."""
    return layer.mixer.first_values(layer.mixer_input(x))


def rematted(body, remat: str):
    """The scan's body under jax.checkpoint with the policy of that name."""
    if remat not in _REMAT_POLICIES:
        raise ValueError(f"remat is {remat!r}; expected one of {', '.join(_REMAT_POLICIES)}.")
    policy = _REMAT_POLICIES[remat]
    return body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)


def make_context(
    cfg: ModelConfig,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
    state: State | None,
) -> tuple[Context, State | None]:
    """What the mixers are told of these tokens, and the state as it stands before them."""
    if state is not None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    starts = None
    if segment_ids is not None:
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(changes, ((0, 0), (1, 0)))
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if state is not None:
            positions = positions + state["length"]
        elif starts is not None:
            positions = positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
    context = Context(*rope.rope_tables(cfg, positions), segment_ids, starts)
    if cfg.kept_attention is not None and cfg.kept_attention.log_scale:
        context = context._replace(logit_scale=logit_scale(positions, cfg.kept_attention.log_scale))
    if state is None or segment_ids is None:
        return context, None
    return _advance(cfg, context, segment_ids, state)


def _advance(cfg: ModelConfig, context: Context, segment_ids: Int[Array, "B T"], state: State) -> tuple[Context, State]:
    """The context with the state's offset and keys' segments, and the state that stands before these tokens."""
    offset, seen = state["length"], state["segment_ids"]
    context = context._replace(offset=offset)
    if grows(cfg):
        last = jax.lax.dynamic_index_in_dim(seen, jnp.maximum(offset - 1, 0), axis=1, keepdims=False)
        seen = jax.lax.dynamic_update_slice_in_dim(seen, segment_ids, offset, axis=1)
        context = context._replace(key_segment_ids=seen)
    else:
        last, seen = seen[:, 0], segment_ids[:, -1:]
    keep = last == segment_ids[:, 0]
    of_stacks = zip(cfg.stacks, state["stacks"], strict=True)
    stacks = [_keep_rows(cfg, mixer, stack, keep) for (mixer, _), stack in of_stacks]
    return context, {"length": offset + segment_ids.shape[1], "segment_ids": seen, "stacks": stacks}


def _keep_rows(cfg: ModelConfig, mixer: str, stack_state: State, keep: Bool[Array, " B"]) -> State:
    """A stack's state, zero for the sequences whose segment has ended; what is kept by position is masked instead."""
    arrays = mixer_state(cfg, mixer)
    return {
        name: value if arrays[name].by_position else jnp.where(keep.reshape(1, -1, *[1] * (value.ndim - 2)), value, 0)
        for name, value in stack_state.items()
    }


def _stack_states(state: State | None, cfg: ModelConfig) -> list[State | None]:
    return [None] * len(cfg.stacks) if state is None else state["stacks"]


@functools.lru_cache
def graphdef(cfg: ModelConfig) -> nnx.GraphDef:
    """The structure that turns a dict of parameters into a Decoder."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(cfg, rngs=nnx.Rngs(0))))[0]


def bind(cfg: ModelConfig, params: Params) -> Decoder:
    """The Decoder with these parameters (a nested dict, any subset of dtypes); cheap, to be called inside jit."""
    return nnx.merge(graphdef(cfg), params)


def init_params(cfg: ModelConfig, seed: int | Array) -> Params:
    """Fresh parameters as nested dicts: normal of std 0.02 for the teacher's kinds, RADLADS section 2's for the
    students'.
    """
    return nnx.to_pure_dict(nnx.split(Decoder(cfg, rngs=nnx.Rngs(seed)))[1])


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without any array."""
    return jax.tree.map(lambda leaf: leaf, _abstract_params(cfg))


@functools.cache
def _abstract_params(cfg: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init_params(cfg, 0))
