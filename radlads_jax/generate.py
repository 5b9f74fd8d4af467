"""Greedy continuation: a chunked prefill, then one compiled loop over single tokens with a state of constant size."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from radlads_jax.models import ModelConfig, bind, init_state
from radlads_jax.models.decoder import Params


@functools.partial(jax.jit, static_argnums=(0, 3))
def generate_greedy(cfg: ModelConfig, params: Params, prompts: Int[Array, "B T"], new_tokens: int) -> Int[Array, "B N"]:
    """The most likely next token, new_tokens times, for every row; shorter rows are left-padded with token id -1."""
    real = prompts >= 0
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    decoder = bind(cfg, params)
    hidden, state = decoder.hidden(
        jnp.maximum(prompts, 0),
        segment_ids=real.astype(jnp.int32),
        positions=positions,
        state=init_state(cfg, prompts.shape[0], prompts.shape[1] + new_tokens),
    )

    def choose(hidden: Array) -> Int[Array, " B"]:
        return jnp.argmax(decoder.logits(hidden[:, -1:])[:, 0], axis=-1).astype(jnp.int32)

    def step(carry, _):
        token, position, state = carry
        hidden, state = decoder.hidden(token[:, None], positions=position[:, None], state=state)
        following = choose(hidden)
        return (following, position + 1, state), token

    first = (choose(hidden), positions[:, -1] + 1, state)
    return jax.lax.scan(step, first, None, length=new_tokens)[1].T
