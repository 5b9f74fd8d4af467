"""The decoding state: what a model must remember of the tokens it has read."""

import jax.numpy as jnp

from pallas_kernels.sharded import constrain
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.spec import StateArray

State = dict


def init_state(cfg: ModelConfig, batch: int, max_length: int) -> State:
    """An empty state for `batch` sequences.

    {"length": tokens read, int32 scalar; "segment_ids": [B, S], of the tokens read (S = max_length where a layer keeps
    something of every token, and can't read more than that, else 1: the last token's); "stacks": a mixer's state per
    stack, as its spec says, layers leading}.
    """
    return {
        "length": jnp.zeros((), jnp.int32),
        "segment_ids": jnp.zeros((batch, max_length if grows(cfg) else 1), jnp.int32),
        "stacks": [
            {
                name: constrain(jnp.zeros((layers, *array.shape), array.dtype), None, *array.axes)
                for name, array in mixer_state(cfg, mixer, batch, max_length).items()
            }
            for mixer, layers in cfg.stacks
        ],
    }


def mixer_state(cfg: ModelConfig, mixer: str, batch: int = 1, max_length: int = 1) -> dict[str, StateArray]:
    """The arrays of one layer's decoding state."""
    return MIXERS[mixer].state(cfg, batch, max_length)


def grows(cfg: ModelConfig) -> bool:
    """Whether the state of a sequence grows with its length: a layer keeps something of every token."""
    return any(array.by_position for mixer, _ in cfg.stacks for array in mixer_state(cfg, mixer).values())
