"""The decoder and its mixers: softmax attention, RAD-RWKV6, RAD-RWKV7."""

from radlads_jax.models.config import MixerConfig, ModelConfig, RopeScaling
from radlads_jax.models.decoder import Decoder, abstract_params, bind, init_params
from radlads_jax.models.state import init_state

__all__ = [
    "Decoder",
    "MixerConfig",
    "ModelConfig",
    "RopeScaling",
    "abstract_params",
    "bind",
    "init_params",
    "init_state",
]
