"""Fresh weights of a model that is trained from scratch, with heads that look back from the start."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from radlads_jax.models import rope
from radlads_jax.models.config import SOFTMAX, ModelConfig
from radlads_jax.models.decoder import init_params
from radlads_jax.models.tree import Params, joined

# Biases so large that a head's attention lies on one token, in the pairs of channels that RoPE turns fastest: the
# others hardly tell a token from its neighbour.
_BIAS = 5.0
_PAIRS = 6


def fresh_params(cfg: ModelConfig, seed: int, look_back: tuple[int, ...] = ()) -> Params:
    """As `init_params`; with `look_back`, head i of the first layer begins by looking look_back[i] tokens back.

    All kernels are then normal of std hidden_size^-0.5, which keeps a small model's activations of one size.

    To look a word up, a model needs a head that marks every token with the one before it, and a later head that looks
    for the mark (Olsson et al., arXiv 2209.11895). Neither is of use without the other, so a small model finds them
    late; given the first, it soon finds the second.

    Raises ValueError as `check_look_back` does.
    """
    check_look_back(cfg, look_back)
    if not look_back:
        return init_params(cfg, seed)
    params = init_params(cfg, seed)
    factor = cfg.hidden_size**-0.5 / 0.02
    params["stacks"] = jax.tree_util.tree_map_with_path(
        lambda path, x: factor * x if joined(path).endswith("kernel") else x, params["stacks"]
    )
    mixer = params["stacks"][0]["mixer"]
    for name, bias in zip(("q", "k"), _biases(cfg, look_back), strict=True):
        mixer[name]["bias"] = mixer[name]["bias"].at[0].set(bias)
    return params


def check_look_back(cfg: ModelConfig, look_back: tuple[int, ...]) -> None:
    """Raises ValueError where the first layer's heads have no biases of q and k that RoPE turns, or are fewer."""
    able = cfg.qkv_bias and not cfg.qk_norm and cfg.stacks[0][0] == SOFTMAX
    if look_back and (not able or len(look_back) > cfg.num_heads):
        raise ValueError(
            f"config.teacher.look_back is {look_back}; expected at most {cfg.num_heads} places, one a head, of a model "
            "of softmax attention with biases of q and k and no norms of them, as qwen2's. Leave it out."
        )


def _biases(cfg: ModelConfig, look_back: tuple[int, ...]) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Of q [H K] and of k [G K]: RoPE makes of them a score that is highest for the key look_back[i] places before."""
    of_key = jnp.zeros(cfg.head_dim).at[:_PAIRS].set(_BIAS)
    back = rope.rope_tables(cfg, -jnp.asarray(look_back)[None])
    of_query = rope.rotate(jnp.broadcast_to(of_key, (1, len(look_back), 1, cfg.head_dim)), *back).reshape(-1)
    free = jnp.zeros((cfg.num_heads - len(look_back)) * cfg.head_dim)
    return jnp.concatenate([of_query, free]), jnp.tile(of_key, cfg.num_kv_heads)
