"""The decoder and its mixers."""

from radlads_jax.models.config import ModelConfig, RopeScaling
from radlads_jax.models.decoder import Decoder, abstract_params, bind, init_params
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.state import init_state

__all__ = [
    "MIXERS",
    "Decoder",
    "ModelConfig",
    "RopeScaling",
    "abstract_params",
    "bind",
    "init_params",
    "init_state",
]
