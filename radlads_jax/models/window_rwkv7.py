"""RAD-RWKV7 behind a window: softmax attention to the first and the latest keys, the recurrence for all others.

    near_t = softmax over the keys in sight (models/window.py) of q = r, k, v        far = g p of models/rad_rwkv7.py
    m = sigmoid(x W_m + b_m)                                                         out = ((1 - m) near + far) W_o

Both have the same projections. m, one number a head, is the share of attention that goes out of sight. At the start g
is 0 and m nearly: the student begins as the untrained control (the mixer `window`), and what training adds to it is
what attention finds beyond. In decoding its state is the recurrence's and the window's, of constant size.
Source of the idea: a window beside a recurrence in each head, as LoLCATs (arXiv 2410.10254) and others have it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from radlads_jax.models import rad_rwkv7
from radlads_jax.models.attention import Context
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import linear, split_heads
from radlads_jax.models.rad_rwkv7 import RadRwkv7, RadRwkv7Options
from radlads_jax.models.spec import PublishedFormat, StateArray, Tensor, linear_tensors, torch_files
from radlads_jax.models.window import (
    WindowOptions,
    read_sight,
    window_attention,
    window_flops,
    window_state,
    write_sight,
)

# The share of the recurrence at the start: of sigmoid, 1.8%.
_QUIET = -4.0


class WindowRwkv7(RadRwkv7):
    """The mixer; what it has beside RAD-RWKV7's parameters is `share`."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        super().__init__(cfg, layer_id, rngs=rngs)
        self.share = linear(cfg.hidden_size, cfg.num_heads, cfg, rngs, bias=True, zero=True)
        self.share.bias = nnx.Param(jnp.full((cfg.num_heads,), _QUIET, cfg.param_dtype))
        self.gate.b = nnx.Param(jnp.zeros_like(self.gate.b[...]))

    def heads(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (what o reads [B, T, d], the states of RAD-RWKV7 and of the window together)."""
        r, k, v = self.flat_projections(x, x, x, context, use_rope=True)
        kept = None if state is None else {name: state[name] for name in state if name != "wkv"}
        query, key, value = (split_heads(each, each.shape[-1] // self.cfg.head_dim) for each in (r, k, v))
        near, kept = window_attention(self.cfg.mixer, query, key, value, context, kept)
        far, wkv = self.gated(x, r, k, v, context, layer_id, state)
        share = jax.nn.sigmoid(self.share(x).astype(jnp.float32))[..., None].astype(near.dtype)
        out = (near * (1 - share)).reshape(far.shape) + far
        return out, None if kept is None else kept | wkv


@dataclasses.dataclass(frozen=True)
class WindowRwkv7Options(WindowOptions, RadRwkv7Options):
    """RAD-RWKV7's, of which RoPE and the low-rank gate stay as they are, and the window's."""

    def __post_init__(self):
        WindowOptions.__post_init__(self)
        RadRwkv7Options.__post_init__(self)
        if not self.use_rope or self.gate != "low_rank":
            raise ValueError(
                f"config.student.use_rope is {self.use_rope} and config.student.gate {self.gate!r} for the mixer "
                "window_rwkv7; expected true and 'low_rank', with which it begins as its window. Leave them out."
            )

    @classmethod
    def for_width(cls, hidden_size: int) -> "WindowRwkv7Options":
        of_recurrence = RadRwkv7Options.for_width(hidden_size)
        return cls(**vars(of_recurrence) | {"balance_state": False, "group_norm": True})


def _tensors(cfg: ModelConfig) -> list[Tensor]:
    return [*rad_rwkv7.SPEC.tensors(cfg), *linear_tensors("share", "share", cfg.hidden_size, cfg.num_heads, bias=True)]


def _state(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    return rad_rwkv7.SPEC.state(cfg, batch, max_length) | window_state(cfg, batch, max_length)


def _read(keys: Any, hidden_size: int) -> WindowRwkv7Options:
    # This type has RoPE, so that a config.json need not say it.
    options = _FORMAT.read(dataclasses.replace(keys, values={"use_rope": True, **keys.values}), hidden_size)
    return WindowRwkv7Options(**vars(options), **vars(read_sight(keys, hidden_size)))


def _write(options: WindowRwkv7Options) -> dict[str, Any]:
    return _FORMAT.write(options) | write_sight(options)


_FORMAT = rad_rwkv7.SPEC.published
assert _FORMAT is not None

SPEC = dataclasses.replace(
    rad_rwkv7.SPEC,
    name="window_rwkv7",
    title="RAD-RWKV7 behind a window",
    module=WindowRwkv7,
    options=WindowRwkv7Options,
    tensors=_tensors,
    state=_state,
    flops=lambda cfg, seq_len: rad_rwkv7.SPEC.flops(cfg, seq_len) + window_flops(cfg, seq_len),
    bytes_per_column=56 + 32,
    calibrations=lambda cfg: {
        name: part for name, part in rad_rwkv7.SPEC.calibrations(cfg).items() if name in ("decay", "iclr", "value")
    },
    calibrated=("decay", "iclr", "value"),
    published=PublishedFormat(
        "windowrwkv7qwen2",
        "WindowRWKV7Qwen2ForCausalLM",
        _read,
        _write,
        torch_files("windowrwkv7qwen2", "windowqwen2", "rwkv7qwen2"),
    ),
    facts=lambda cfg: (
        dict(rad_rwkv7.SPEC.facts(cfg))
        | {"keys in sight": f"the first {cfg.mixer.sinks} and the latest {cfg.mixer.window}"}
    ),
)
