"""Softmax attention: the teachers' mixer, and that of the layers a hybrid keeps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from radlads_jax.models import rope
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import RMSNorm, linear, split_heads

# Scores are [B, H, block, S]: with blocks of queries a long row needs memory linear in its length.
QUERY_BLOCK = 512


class Context(NamedTuple):
    """What every mixer is told of the tokens it sees; built once a call by the decoder.

    segment_ids: [B, T], None where every row is one segment.   starts: [B, T], True where a segment begins (or None).
    offset: the number of tokens before these in the decoding state.
    key_segment_ids: [B, S], of the state's keys; None outside decoding.
    """

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]
    segment_ids: Int[Array, "B T"] | None = None
    starts: Bool[Array, "B T"] | None = None
    offset: Int[Array, ""] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None


class Attention(nnx.Module):
    """Causal grouped-query attention with RoPE; tokens see their own segment only."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        del layer_id
        self.cfg = cfg
        add_projections(self, cfg, rngs)

    def __call__(self, x, context: Context, v_first, layer_id, state):
        """[B, T, D] -> [B, T, D]; state {"k", "v"} [B, S, G, K] is written at context.offset. v_first passes through."""
        del layer_id
        cfg = self.cfg
        q, k, v = project_qkv(self, x, context, use_rope=True)
        if state is not None:
            state = {
                "k": jax.lax.dynamic_update_slice_in_dim(state["k"], k.astype(state["k"].dtype), context.offset, axis=1),
                "v": jax.lax.dynamic_update_slice_in_dim(state["v"], v.astype(state["v"].dtype), context.offset, axis=1),
            }
            k, v = state["k"].astype(q.dtype), state["v"].astype(q.dtype)
        out = softmax_attention(q, k, v, context)
        return self.o(out.reshape(*x.shape[:2], cfg.num_heads * cfg.head_dim)), v_first, state


def add_projections(module: nnx.Module, cfg: ModelConfig, rngs: nnx.Rngs) -> None:
    """Gives a mixer the teacher's q, k, v, o and, where the family has them, the per-head norms of q and k."""
    wide, narrow = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    module.q = linear(cfg.hidden_size, wide, cfg, rngs, bias=cfg.qkv_bias)
    module.k = linear(cfg.hidden_size, narrow, cfg, rngs, bias=cfg.qkv_bias)
    module.v = linear(cfg.hidden_size, narrow, cfg, rngs, bias=cfg.qkv_bias)
    module.o = linear(wide, cfg.hidden_size, cfg, rngs, bias=cfg.o_bias)
    if cfg.qk_norm:
        module.q_norm = RMSNorm(cfg.head_dim, cfg)
        module.k_norm = RMSNorm(cfg.head_dim, cfg)


def project_qkv(module, x, context: Context, *, use_rope: bool, x_k=None, x_v=None):
    """q [B, T, H, K] and k, v [B, T, G, K], with the family's norms and RoPE; x_k, x_v replace x where given."""
    cfg = module.cfg
    q = split_heads(module.q(x), cfg.num_heads)
    k = split_heads(module.k(x if x_k is None else x_k), cfg.num_kv_heads)
    v = split_heads(module.v(x if x_v is None else x_v), cfg.num_kv_heads)
    if cfg.qk_norm:
        q, k = module.q_norm(q), module.k_norm(k)
    if use_rope:
        q, k = rope.rotate(q, context.cos, context.sin), rope.rotate(k, context.cos, context.sin)
    return q, k, v


def softmax_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], context: Context
) -> Float[Array, "B T H K"]:
    """softmax(q k^T / sqrt(K)) v over the keys at or before each query, in its segment; softmax float32.

    Query t stands at key offset + t. Without a decoding state S = T and offset = 0.
    """
    offset = 0 if context.offset is None else context.offset
    key_segments = context.segment_ids if context.key_segment_ids is None else context.key_segment_ids

    def block(queries: Array, first: int, keys: Array, values: Array) -> Array:
        rows = offset + first + jnp.arange(queries.shape[1])
        mask = (rows[:, None] >= jnp.arange(keys.shape[1])[None, :])[None, None]
        if key_segments is not None:
            own = context.segment_ids[:, first : first + queries.shape[1]]
            mask = mask & (own[:, None, :, None] == key_segments[:, None, None, : keys.shape[1]])
        return jax.nn.dot_product_attention(queries, keys, values, mask=mask)

    total = q.shape[1]
    if total <= QUERY_BLOCK:
        return block(q, 0, k, v)
    # Without a state, a block's queries see no key behind its end: those are never multiplied.
    ends = [k.shape[1] if context.offset is not None else min(i + QUERY_BLOCK, total) for i in range(0, total, QUERY_BLOCK)]
    pieces = [
        jax.checkpoint(block, static_argnums=1)(q[:, i : i + QUERY_BLOCK], i, k[:, :end], v[:, :end])
        for i, end in zip(range(0, total, QUERY_BLOCK), ends, strict=True)
    ]
    return jnp.concatenate(pieces, axis=1)
