"""Softmax attention: the teachers' mixer, and that of the layers a hybrid keeps."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import attention
from pallas_kernels.attention.blocks import attention_by_blocks
from pallas_kernels.sharded import ROWS, WHOLE_HEADS, parts, per_shard
from radlads_jax.models import heads, rope, sharding
from radlads_jax.models.config import KeptAttention, ModelConfig
from radlads_jax.models.layers import RMSNorm, linear, repeat_kv, split_heads
from radlads_jax.models.spec import MixerSpec, StateArray, Tensor, linear_tensors


class Context(NamedTuple):
    """What every mixer is told of the tokens it sees; built once a call by the decoder.

    segment_ids: [B, T], None where every row is one segment.   starts: [B, T], True where a segment begins (or None).
    offset: the number of tokens before these in the decoding state.
    key_segment_ids: [B, S], of the state's keys; None outside decoding.
    v_first: [B, T, H K], the first recurrent layer's values, where its mixer has any to give.
    logit_scale: of every query in the softmax layers that scale theirs; None where none does.
    """

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]
    segment_ids: Int[Array, "B T"] | None = None
    starts: Bool[Array, "B T"] | None = None
    offset: Int[Array, ""] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    v_first: Float[Array, "B T d"] | None = None
    logit_scale: Float[Array, "B T 1 1"] | None = None


class Mixer(nnx.Module):
    """What the teacher's attention and every student's mixer share: q, k, v, o and the family's per-head norms."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs, qk_norm: bool | None = None):
        """qk_norm: None: as the family has them."""
        self.cfg, normed = cfg, cfg.qk_norm if qk_norm is None else qk_norm
        wide, narrow = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.q = linear(cfg.hidden_size, wide, cfg, rngs, bias=cfg.qkv_bias)
        self.k = linear(cfg.hidden_size, narrow, cfg, rngs, bias=cfg.qkv_bias)
        self.v = linear(cfg.hidden_size, narrow, cfg, rngs, bias=cfg.qkv_bias)
        self.o = linear(wide, cfg.hidden_size, cfg, rngs, bias=cfg.o_bias)
        self.q_norm = RMSNorm(cfg.head_dim, cfg) if normed else None
        self.k_norm = RMSNorm(cfg.head_dim, cfg) if normed else None

    def project(self, x_q: Array, x_k: Array, x_v: Array, context: Context, *, use_rope: bool):
        """q [B, T, H, K] and k, v [B, T, G, K] of inputs [B, T, D], with the family's norms and RoPE."""
        q = split_heads(self.q(x_q), self.cfg.num_heads)
        return self.prepared(q, self.k(x_k), self.v(x_v), context, use_rope=use_rope)

    def prepared(self, q: Array, k: Array, v: Array, context: Context, *, use_rope: bool):
        """What `project` gives, of q [B, T, H, K] and k, v [B, T, G K]."""
        k, v = split_heads(k, self.cfg.num_kv_heads), split_heads(v, self.cfg.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if use_rope:
            q, k = rope.rotate(q, context.cos, context.sin), rope.rotate(k, context.cos, context.sin)
        return sharding.by_heads(q), sharding.by_heads(k), sharding.by_heads(v)

    def flat_projections(self, x_q: Array, x_k: Array, x_v: Array, context: Context, *, use_rope: bool):
        """What `project` gives, as [B, T, H K] and [B, T, G K]."""
        size = self.cfg.head_dim
        q, k, v = self.q(x_q), self.k(x_k), self.v(x_v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = heads.normed(q, self.q_norm), heads.normed(k, self.k_norm)
        if use_rope:
            q, k = (heads.rotate(each, size, context.cos, context.sin) for each in (q, k))
        return tuple(heads.by_heads(each, size) for each in (q, k, v))


class Attention(Mixer):
    """Causal grouped-query attention with RoPE; tokens see their own segment only.

    What a student's cfg says of the softmax layers that it keeps is so here, unless `kept` says otherwise.
    """

    def __init__(
        self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs, kept: KeptAttention | None = None
    ):
        del layer_id
        super().__init__(cfg, rngs=rngs)
        self.kept = kept or cfg.kept_attention or KeptAttention()
        self.gated = cfg.output_gate or self.kept.output_gate
        if self.gated:
            self.q = linear(cfg.hidden_size, 2 * cfg.num_heads * cfg.head_dim, cfg, rngs, bias=cfg.qkv_bias)

    def __call__(self, x, context: Context, layer_id, state):
        """[B, T, D] -> [B, T, D]; state {"k", "v"} [B, S, G, K] is written at context.offset."""
        del layer_id
        q, k, v, gate = self.projected(x, context)
        if state is not None:
            state = {name: _written(state[name], new, context) for name, new in (("k", k), ("v", v))}
            k, v = state["k"].astype(q.dtype), state["v"].astype(q.dtype)
        out = softmax_attention(q, k, v, context)
        out = out if gate is None else out * jax.nn.sigmoid(gate)
        return self.o(out.reshape(*x.shape[:2], -1)), state

    def projected(self, x: Float[Array, "B T D"], context: Context) -> tuple[Array, Array, Array, Array | None]:
        """q, k, v as `project`, and the heads' gates [B, T, H, K] where the family has them."""
        q, gate = split_heads(self.q(x), self.cfg.num_heads), None
        if self.gated:
            # A head's query and its gate lie side by side.
            q, gate = jnp.split(q, 2, axis=-1)
        q, k, v = self.prepared(q, self.k(x), self.v(x), context, use_rope=self.kept.rope)
        if self.kept.log_scale:
            assert context.logit_scale is not None  # of the same cfg
            q = (q.astype(jnp.float32) * context.logit_scale).astype(q.dtype)
        return q, k, v, None if gate is None else sharding.by_heads(gate)


def logit_scale(places: Int[Array, "B T"], base: float) -> Float[Array, "B T 1 1"]:
    """log(t + a) / log(a) of the query at place t, from 0 on, of its segment; base: a."""
    return (jnp.log(places.astype(jnp.float32) + base) / math.log(base))[..., None, None]


def _written(cache: Float[Array, "B S G K"], new: Float[Array, "B T G K"], context: Context) -> Float[Array, "B S G K"]:
    assert context.offset is not None  # a decoding state comes with its length
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), context.offset, axis=1)


def softmax_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], context: Context
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys at or before each query, in its segment; softmax float32.

    Query t stands at key offset + t. Without a decoding state S = T and offset = 0.
    """
    if context.offset is not None:
        return attention_by_blocks(q, k, v, context.segment_ids, context.offset, context.key_segment_ids)
    if k.shape[2] % parts(WHOLE_HEADS, q.shape[2]):
        k, v = repeat_kv(k, q.shape[2]), repeat_kv(v, q.shape[2])

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return attention(q, k, v, segment_ids=segment_ids)

    kinds = ("sequence", "sequence", "sequence", "rows")
    return per_shard(attend, kinds, "sequence")(q, k, v, context.segment_ids)


def projection_tensors(
    cfg: ModelConfig,
    *,
    multiplies: Literal["input", "inner"] = "input",
    gated: bool = False,
    qk_norm: bool | None = None,
) -> list[Tensor]:
    """What every `Mixer` has: q (with the heads' gates), k, v, o and norms of q and k, by Hugging Face's names.

    qk_norm: None: as the family has them.
    """
    width, wide, narrow = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    of_kv: dict[str, Any] = {"bias": cfg.qkv_bias, "split_by": "kv_heads", "multiplies": multiplies}
    tensors = [
        *linear_tensors("q", "q_proj", width, 2 * wide if gated else wide, bias=cfg.qkv_bias, multiplies=multiplies),
        *linear_tensors("k", "k_proj", width, narrow, **of_kv),
        *linear_tensors("v", "v_proj", width, narrow, **of_kv),
        *linear_tensors("o", "o_proj", wide, width, bias=cfg.o_bias, out=True, multiplies="inner"),
    ]
    norms = ("q_norm", "k_norm") if (cfg.qk_norm if qk_norm is None else qk_norm) else ()
    return [*tensors, *(Tensor(f"{name}/scale", f"{name}.weight", (cfg.head_dim,)) for name in norms)]


def _cache(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    """Keys and values [B, S, G, K]."""
    shape = (batch, max_length, cfg.num_kv_heads, cfg.head_dim)
    return {name: StateArray(shape, cfg.dtype, (ROWS, None, "tensor"), by_position=True) for name in ("k", "v")}


def _gate_added(cfg: ModelConfig) -> bool:
    return cfg.kept_attention is not None and cfg.kept_attention.output_gate


def _adopt(cfg: ModelConfig, layers: dict[str, Any]) -> dict[str, Any]:
    """A gate of sigmoid(0) = 1/2 beside every head's query, and an o that makes it good: both are exact."""
    if not _gate_added(cfg):
        return {}
    q, o = layers["mixer"]["q"], layers["mixer"]["o"]

    def with_gate(x: Array) -> Array:
        heads = x.reshape(*x.shape[:-1], cfg.num_heads, -1)
        return jnp.concatenate([heads, jnp.zeros_like(heads)], axis=-1).reshape(*x.shape[:-1], -1)

    return {"q": {name: with_gate(x) for name, x in q.items()}, "o": o | {"kernel": 2 * o["kernel"]}}


SPEC = MixerSpec(
    name="attention",
    title="softmax attention",
    module=Attention,
    tensors=lambda cfg: projection_tensors(cfg, gated=cfg.output_gate or _gate_added(cfg)),
    adopt=_adopt,
    state=_cache,
    # Causal attention sees half the row: 2 T d.
    flops=lambda cfg, seq_len: 2.0 * seq_len * cfg.num_heads * cfg.head_dim,
    bytes_per_column=32,
)
