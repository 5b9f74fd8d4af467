"""A mixer as a stranger would add it, in one file: an exponential moving average of values behind two taps.

    u_t = v_t + tap v_{t-1}        m_t = d m_{t-1} + (1 - d) u_t        out = (q m) W_o        d = sigmoid(decay)

Tokens see their own segment. Its decoding state has two arrays of different rank: m [B, H, K] and v_{t-1} [B, d].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.sharded import ROWS
from radlads_jax.models.attention import Context, Mixer, projection_tensors
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import repeat_kv, shift_tokens, split_heads
from radlads_jax.models.spec import MixerSpec, Operator, PublishedFormat, StateArray, Tensor


@dataclasses.dataclass(frozen=True)
class EmaOptions:
    """use_rope: of q. half_life: tokens, of every head at the start."""

    use_rope: bool = False
    half_life: int = 8

    def __post_init__(self):
        if self.half_life < 1:
            raise ValueError(f"student.half_life is {self.half_life}; expected at least 1 token.")

    @classmethod
    def for_width(cls, hidden_size: int) -> "EmaOptions":
        del hidden_size
        return cls()


class Ema(Mixer):
    """The mixer."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        del layer_id
        super().__init__(cfg, rngs=rngs)
        decay = 0.5 ** (1 / cfg.mixer.half_life)
        self.decay = nnx.Param(jnp.full((cfg.num_heads,), jnp.log(decay / (1 - decay)), cfg.param_dtype))
        self.tap = nnx.Param(jnp.zeros((cfg.num_heads * cfg.head_dim,), cfg.param_dtype))

    def __call__(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        del layer_id
        cfg = self.cfg
        q, _, v = self.project(x, x, x, context, use_rope=cfg.mixer.use_rope)
        values = repeat_kv(v, cfg.num_heads).reshape(*x.shape[:2], -1)
        before = jnp.zeros_like(values[:, 0]) if state is None else state["last"]
        mixed = values + self.tap[...].astype(x.dtype) * shift_tokens(values, before, context.starts)
        mean = jnp.zeros((x.shape[0], cfg.num_heads, cfg.head_dim), jnp.float32) if state is None else state["mean"]
        means, mean = _average(split_heads(mixed, cfg.num_heads), self.decay[...], mean, context)
        out = self.o((q * means.astype(x.dtype)).reshape(*x.shape[:2], -1))
        return out, None if state is None else {"mean": mean, "last": values[:, -1].astype(state["last"].dtype)}


def _average(u: Float[Array, "B T H K"], decay: Float[Array, " H"], mean: Float[Array, "B H K"], context: Context):
    d = jax.nn.sigmoid(decay.astype(jnp.float32))[:, None]
    starts = jnp.zeros(u.shape[:2], bool) if context.starts is None else context.starts

    def step(m, inputs):
        u_t, start = inputs
        m = d * jnp.where(start[:, None, None], 0, m) + (1 - d) * u_t
        return m, m

    mean, means = jax.lax.scan(step, mean, (u.astype(jnp.float32).swapaxes(0, 1), starts.T))
    return means.swapaxes(0, 1), mean


def _tensors(cfg: ModelConfig) -> list[Tensor]:
    wide = cfg.num_heads * cfg.head_dim
    return [
        *projection_tensors(cfg),
        Tensor("decay", "ema_decay", (cfg.num_heads,), axes=("tensor",)),
        Tensor("tap", "ema_tap", (wide,), "vector", axes=("tensor",)),
    ]


def _state(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    del max_length
    return {
        "mean": StateArray((batch, cfg.num_heads, cfg.head_dim), axes=(ROWS, "tensor")),
        "last": StateArray((batch, cfg.num_heads * cfg.head_dim), cfg.dtype, (ROWS, "tensor")),
    }


def _read(keys: Any, hidden_size: int) -> EmaOptions:
    return SPEC.choose(hidden_size, use_rope=keys.flag("use_rope", False), half_life=keys.integer("half_life", 8))


SPEC = MixerSpec(
    name="ema",
    title="moving average",
    module=Ema,
    options=EmaOptions,
    tensors=_tensors,
    state=_state,
    operator=Operator("ema", {"chunked": _average}),
    flops=lambda cfg, seq_len: 4.0 * cfg.num_heads * cfg.head_dim,
    bytes_per_column=20,
    published=PublishedFormat("emaqwen2", "EmaQwen2ForCausalLM", _read, dataclasses.asdict),
    facts=lambda cfg: {"half-life at the start": f"{cfg.mixer.half_life} tokens"},
)
