"""The decoding state: what a model must remember of the tokens it has read."""

import jax.numpy as jnp

from radlads_jax.models.config import ModelConfig

State = dict


def init_state(cfg: ModelConfig, batch: int, max_length: int) -> State:
    """An empty state for `batch` sequences.

    {"length": tokens read, int32 scalar; "segment_ids": [B, S], of the tokens read (S = max_length where a layer is
    softmax attention, which can't read more than that, else 1: the last token's); "stacks": a mixer state per stack,
    layers leading}. Recurrent layers hold [n, B, H, K, V] float32 whatever the length, attention layers keys and
    values [n, B, S, G, K].
    """
    has_attention = "attention" in cfg.layer_mixers
    return {
        "length": jnp.zeros((), jnp.int32),
        "segment_ids": jnp.zeros((batch, max_length if has_attention else 1), jnp.int32),
        "stacks": [_mixer_state(cfg, mixer, n, batch, max_length) for mixer, n in cfg.stacks],
    }


def _mixer_state(cfg: ModelConfig, mixer: str, layers: int, batch: int, max_length: int) -> State:
    if mixer == "attention":
        shape = (layers, batch, max_length, cfg.num_kv_heads, cfg.head_dim)
        return {"k": jnp.zeros(shape, cfg.dtype), "v": jnp.zeros(shape, cfg.dtype)}
    state = {"wkv": jnp.zeros((layers, batch, cfg.num_heads, cfg.head_dim, cfg.head_dim), jnp.float32)}
    if mixer == "rad_rwkv6" and cfg.mixer.token_shift:
        state["shift"] = jnp.zeros((layers, batch, cfg.hidden_size), cfg.dtype)
    return state
