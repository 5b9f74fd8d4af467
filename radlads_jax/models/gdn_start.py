"""What Gated DeltaNet layers begin with of the softmax layers that they take the place of.

A fused mixer's heads (of a teacher that has such layers itself) are not the softmax layer's: of S = value heads / heads
value heads in a row, each takes the next channels of one softmax head's value, so that o keeps its rows, and a key head
has the first channels of q and k of the softmax head in the middle of those that it serves. Untested on a trained
model; stage 1 trains all of it.

calibrations: MixerSpec's, from the teacher's statistics.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from radlads_jax.models import starts
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.spec import TeacherStatistics

# SiLU of it is 1.
_SILU_OF_ONE = 1.278465
# exp(log_g) halves in no less than a seventh of a token and in no more than 693.
_RATES = (1e-3, 5.0)


def obstacles(cfg: ModelConfig) -> list[str]:
    """Why a mixer of these sizes can not begin from a softmax layer of these."""
    options = cfg.mixer
    if not options.fused:
        return ["an output gate in each softmax head, and no gdn layer that tells the format's sizes"] * cfg.output_gate
    of_head, left = divmod(options.value_heads, cfg.num_heads)
    # Exported from a family without norms of q and k, heads are of twice the size, the second half of v and o zeros.
    whole = cfg.rotary_size if cfg.qkv_bias and options.value_heads == cfg.num_heads else cfg.head_dim
    if not left and of_head * options.value_size in (whole, cfg.head_dim) and options.key_size <= cfg.head_dim:
        return []
    own = f"{options.key_heads} key heads of {options.key_size} and {options.value_heads} value heads of "
    return [f"{own}{options.value_size} channels, which {cfg.num_heads} softmax heads of {cfg.head_dim} do not make"]


def adopt(cfg: ModelConfig, layers: dict[str, Any]) -> dict[str, Any]:
    """Of a stack's softmax layers, a fused mixer's qkv and o; nothing for one that has q, k, v and o by their names."""
    options, heads, kv_heads = cfg.mixer, cfg.num_heads, cfg.num_kv_heads
    if not options.fused:
        return {}
    attention = layers["mixer"]
    # A head's query and its gate lie side by side: the query's channels come first.
    q, k, v = (_by_head(attention[name]["kernel"], n) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    of_head, served = options.value_heads // heads, options.value_heads // options.key_heads
    of_key = (jnp.arange(options.key_heads) * served + served // 2) // of_head
    taken = of_head * options.value_size
    parts = [
        q[..., of_key, : options.key_size],
        k[..., of_key * kv_heads // heads, : options.key_size],
        v[..., jnp.arange(heads) * kv_heads // heads, :taken],
    ]
    kernel = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)
    o = attention["o"]["kernel"]
    rows = o.reshape(o.shape[0], heads, -1, o.shape[-1])[:, :, :taken]
    return {"qkv": {"kernel": kernel}, "o": {"kernel": rows.reshape(o.shape[0], -1, o.shape[-1])}}


def _by_head(kernel: Float[Array, "L D d"], heads: int) -> Float[Array, "L D H K"]:
    return kernel.reshape(*kernel.shape[:2], heads, -1)


def decay_of_look_back(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """Each head's half-life is its query head's mean look-back, whatever the token: W_a stays 0."""
    rate = jnp.clip(math.log(2) / _of_value_heads(seen.look_back, mixer), *_RATES)
    dtype = mixer["dt_bias"].dtype
    return {"dt_bias": jnp.log(jnp.expm1(rate)).astype(dtype), "a_log": jnp.zeros_like(mixer["a_log"])}


def open_gate(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """SiLU(x W_z) about 1, as nearly as a map without bias has it."""
    kernel = mixer["z"]["kernel"]
    constant = jnp.broadcast_to(_SILU_OF_ONE * seen.constant[..., None], kernel.shape)
    return {"z": {"kernel": constant.astype(kernel.dtype)}}


def beta_of_entropy(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """beta as `starts.removal_of_entropy`."""
    beta = jax.scipy.special.logit(starts.removal_of_entropy(seen.entropy))
    kernel, logit = mixer["b"]["kernel"], _of_value_heads(beta, mixer)
    return {"b": {"kernel": (seen.constant[..., None] * logit[:, None]).astype(kernel.dtype)}}


def output_of_rms(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """o reads every head's output, of RMS 1 behind the norm and an open gate, as large as attention's was."""
    kernel = mixer["o"]["kernel"]
    # Of heads whose other channels are zeros, the RMS of those that are taken.
    rms = seen.output_rms * math.sqrt(cfg.num_heads * cfg.head_dim / kernel.shape[1])
    scale = jnp.repeat(rms, kernel.shape[1] // cfg.num_heads, axis=-1)
    return {"o": {"kernel": (kernel * scale[..., None]).astype(kernel.dtype)}}


def _of_value_heads(statistic: Float[Array, "L H"], mixer: dict[str, Any]) -> Float[Array, "L Hv"]:
    """A softmax head's, for each of its value heads."""
    return jnp.repeat(statistic, mixer["dt_bias"].shape[-1] // statistic.shape[-1], axis=-1)
