"""Rotary position embedding in the half-rotation layout, with the frequency scalings of the llama family."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from radlads_jax.models.config import ModelConfig, RopeScaling


def _inverse_frequencies(cfg: ModelConfig) -> Float[Array, " half"]:
    """theta^(-2i/r) for i in [0, r/2) (r: the channels that are turned), scaled as cfg says; radians per position."""
    turned = cfg.rotary_size or cfg.head_dim
    exponents = jnp.arange(0, turned, 2, dtype=jnp.float32) / turned
    frequencies = 1.0 / (cfg.rope_theta**exponents)
    if cfg.rope_scaling is None:
        return frequencies
    if cfg.rope_scaling.kind == "linear":
        return frequencies / cfg.rope_scaling.factor
    return _llama3(frequencies, cfg.rope_scaling)


def _llama3(frequencies: Float[Array, " half"], scaling: RopeScaling) -> Float[Array, " half"]:
    """Keeps short wavelengths, divides long ones by the factor and blends in between (Llama 3.1)."""
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / frequencies
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((context / wavelength - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_tables(
    cfg: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of every position's angles, float32, with an axis for the heads."""
    angles = positions[..., None, None].astype(jnp.float32) * _inverse_frequencies(cfg)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H K"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T H K"]:
    """Rotates the pairs (x_i, x_{i + half}) by their position's angles; float32 inside, x's dtype outside.

    Channels from 2 half on stay as they are.
    """
    if (turned := 2 * cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turned], cos, sin), x[..., turned:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
