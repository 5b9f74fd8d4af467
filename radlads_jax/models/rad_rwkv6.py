"""RAD-RWKV6 ("RADFinch"): gated linear attention with a per-channel decay (RADLADS section 3.1).

s = x_{t-1} - x_t     z = x + s mu_x     m = tanh(z A), five streams, each times its B     x_i = x + s (mu_i + m_i)
r = x_r W_q + b       k~ = x_k W_k + b   v = x_v W_v + b                                   k~, v repeated to all heads
log_w = max(-exp(decay + tanh(x_w A_d) B_d), -5)     k = k~ (1 - w)     g = sigmoid(x_g W_g)
S_t = diag(w_t) S_{t-1} + k_t v_t^T                  p_t = head_dim^-1/2 S_t^T r_t     out = (g p) W_o
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.context_parallel import over_shards
from pallas_kernels.sharded import ROWS
from pallas_kernels.wkv6 import wkv6, wkv6_step
from pallas_kernels.wkv6.api import IMPLEMENTATIONS
from radlads_jax.models import heads, starts
from radlads_jax.models.attention import Context, Mixer, projection_tensors
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import GroupNorm, LowRank, linear, orthogonal, scaled, shift_tokens, split_heads, spread
from radlads_jax.models.rwkv import (
    RwkvOptions,
    card_facts,
    first_norms,
    gate_and_norm_tensors,
    gate_and_output_calibrations,
    has_norms,
    low_rank_size,
    read_ranks,
    read_switches,
    write_switches,
)
from radlads_jax.models.spec import (
    Calibration,
    MixerSpec,
    Operator,
    PublishedFormat,
    StateArray,
    TeacherStatistics,
    Tensor,
    low_rank_tensors,
    torch_files,
)

_LOG_W_MIN = -5.0


def _uniform(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)


class _TokenShift(nnx.Module):
    """The five mixes of each token with the one before it, in the order r, k, v, w, g."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        rank, width = cfg.mixer.rank_shift, cfg.hidden_size
        self.mu_x = nnx.Param(jnp.ones((width,), cfg.param_dtype))
        self.mu = nnx.Param(jnp.zeros((5, width), cfg.param_dtype))
        self.a = nnx.Param(jnp.zeros((width, 5 * rank), cfg.param_dtype))
        self.b = nnx.Param(_uniform(rngs.params(), (5, rank, width), jnp.dtype(cfg.param_dtype)))

    def __call__(self, x: Float[Array, "B T D"], previous: Float[Array, "B T D"]) -> list[Float[Array, "B T D"]]:
        a, b = (p[...].astype(x.dtype) for p in (self.a, self.b))
        mu = [spread(mu, x.shape, x.dtype) for mu in self.mu[...]]
        s = previous - x
        streams = jnp.split(jnp.tanh((x + scaled(s, self.mu_x[...])) @ a), 5, axis=-1)
        return [x + s * (mu[i] + streams[i] @ b[i]) for i in range(5)]


class RadRwkv6(Mixer):
    """The mixer. Its decoding state holds the recurrence's state and, with token shift, the last input."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs, qk_norm=has_norms(cfg))
        mixer, size = cfg.mixer, cfg.num_heads * cfg.head_dim
        if mixer.token_shift:
            self.shift = _TokenShift(cfg, rngs=rngs)
        self.decay = LowRank(
            cfg,
            mixer.rank_decay,
            size,
            rngs=rngs,
            b_init=_uniform,
            activation=jnp.tanh,
            base=_initial_decay(cfg, layer_id),
        )
        if mixer.gate == "full":
            self.gate = linear(cfg.hidden_size, size, cfg, rngs, zero=True)
        elif mixer.gate == "low_rank":
            self.gate = LowRank(
                cfg, mixer.rank_gate, size, rngs=rngs, b_init=orthogonal(0.1), activation=jax.nn.sigmoid
            )
        if mixer.group_norm:
            self.ln_x = GroupNorm(cfg)

    def __call__(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (out [B, T, D], state as `heads` gives it)."""
        out, state = self.heads(x, context, layer_id, state)
        return self.o(out), state

    def heads(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (what o reads [B, T, d], state {"wkv": [B, H, K, V] float32, "shift": [B, D]})."""
        del layer_id
        cfg, mixer = self.cfg, self.cfg.mixer
        x_r = x_k = x_v = x_w = x_g = x
        if mixer.token_shift:
            before = jnp.zeros_like(x[:, 0]) if state is None else state["shift"]
            x_r, x_k, x_v, x_w, x_g = self.shift(x, shift_tokens(x, before, context.starts))
        r, k, v = self.flat_projections(x_r, x_k, x_v, context, use_rope=mixer.use_rope)
        k, v = (heads.repeat(each, cfg.head_dim, cfg.num_heads) for each in (k, v))
        log_w = jnp.maximum(-jnp.exp(self.decay(x_w)), _LOG_W_MIN)
        if mixer.balance_state:
            k = (k * -jnp.expm1(log_w)).astype(x.dtype)
        initial = None if state is None else state["wkv"]
        sizes = (cfg.head_dim,) * 4
        run = heads.recurrence(wkv6, wkv6_step, over_shards, sizes, heads=cfg.num_heads)
        out, final = run(r, log_w, k, v, initial, context.segment_ids)
        out = out * cfg.head_dim**-0.5
        if mixer.group_norm:
            out = self.ln_x(split_heads(out, cfg.num_heads)).reshape(out.shape)
        if mixer.gate == "full":
            out = out * jax.nn.sigmoid(self.gate(x_g))
        elif mixer.gate == "low_rank":
            out = out * self.gate(x_g)
        if state is not None:
            state = {"wkv": final} | ({"shift": x[:, -1].astype(state["shift"].dtype)} if mixer.token_shift else {})
        return out, state


def _initial_decay(cfg: ModelConfig, layer_id: Int[Array, ""]) -> Float[Array, " d"]:
    """lambda_d[n] = -6 + 5 (n/(d-1))^(0.7 + 1.3 l/(L-1))."""
    size = cfg.num_heads * cfg.head_dim
    depth = layer_id / max(cfg.num_layers - 1, 1)
    return -6 + 5 * jnp.linspace(0.0, 1.0, size) ** (0.7 + 1.3 * depth)


@dataclasses.dataclass(frozen=True)
class RadRwkv6Options(RwkvOptions):
    """The paper's student has token shift, a full-rank gate and state balancing; no RoPE."""

    token_shift: bool = True
    rank_shift: int = 32

    @classmethod
    def for_width(cls, hidden_size: int) -> "RadRwkv6Options":
        wide = low_rank_size(hidden_size, 0.5, 1.8)
        gate = low_rank_size(hidden_size, 0.8, 0.6)
        return cls(use_rope=False, gate="full", rank_decay=wide, rank_gate=gate, rank_shift=wide)


_RANK_KEYS = {
    "rank_decay": "lora_rank_decay",
    "rank_shift": "lora_rank_tokenshift",
    "rank_gate": "lora_rank_gate",
}
_STREAMS = "rkvwg"


def _read(keys: Any, hidden_size: int) -> RadRwkv6Options:
    switches = read_switches(keys, gate="full", group_norm=False)
    token_shift = keys.flag("use_tokenshift", True)
    return SPEC.choose(hidden_size, token_shift=token_shift, **switches, **read_ranks(keys, _RANK_KEYS))


def _tensors(cfg: ModelConfig) -> list[Tensor]:
    width, size, options = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.mixer
    # With token shift its own first matrix reads the mixer's input, and all others what it made of that.
    of_input: Any = "inner" if options.token_shift else "input"
    tensors = projection_tensors(cfg, multiplies=of_input, qk_norm=has_norms(cfg))
    if options.token_shift:
        rank, streams = options.rank_shift, len(_STREAMS)
        whole: Any = {"split_by": "nothing"}
        tensors += [
            Tensor("shift/mu_x", "time_maa_x", (width,), "vector"),
            *(Tensor("shift/mu", f"time_maa_{s}", (width,), "vector", row) for row, s in enumerate(_STREAMS)),
            Tensor(
                "shift/a",
                "time_maa_w1",
                (width, streams * rank),
                axes=(("fsdp", "tensor"),),
                multiplies="input",
                **whole,
            ),
            Tensor(
                "shift/b",
                "time_maa_w2",
                (streams, rank, width),
                axes=(None, None, ("fsdp", "tensor")),
                multiplies="inner",
                **whole,
            ),
        ]
    decay = ("time_decay", "time_decay_w1", "time_decay_w2")
    return [
        *tensors,
        *low_rank_tensors("decay", decay, width, options.rank_decay, size, multiplies=of_input),
        *gate_and_norm_tensors(cfg, multiplies=of_input),
    ]


def _state(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    del max_length
    state = {"wkv": StateArray((batch, cfg.num_heads, cfg.head_dim, cfg.head_dim), axes=(ROWS, "tensor"))}
    shift = {"shift": StateArray((batch, cfg.hidden_size), cfg.dtype, (ROWS,))}
    return state | (shift if cfg.mixer.token_shift else {})


def _decay_of_look_back(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """What a head's state holds is as old, on average, as what its query head looks at; whatever the token."""
    base = mixer["decay"]["base"]
    log_w = starts.log_decay_of_look_back(seen.look_back)
    # A head that looks back nowhere would forget all at once, by an infinite base.
    start = jnp.log(jnp.minimum(-log_w, 0.95 * -_LOG_W_MIN))
    return {"decay": mixer["decay"] | {"base": starts.of_heads(start, base)}}


def _calibrations(cfg: ModelConfig) -> dict[str, Calibration]:
    return {"decay": Calibration(_decay_of_look_back), **gate_and_output_calibrations(cfg)}


SPEC = MixerSpec(
    name="rad_rwkv6",
    title="RAD-RWKV6",
    module=RadRwkv6,
    options=RadRwkv6Options,
    tensors=_tensors,
    state=_state,
    operator=Operator("wkv6", IMPLEMENTATIONS, {"wkv6_forward": 3.0, "wkv6_backward": 5.7}),
    # Decay, outer product, output: 5 K d.
    flops=lambda cfg, seq_len: 5.0 * cfg.head_dim * cfg.num_heads * cfg.head_dim,
    bytes_per_column=44,
    calibrations=_calibrations,
    calibrated=("decay", "gate", "projection"),
    published=PublishedFormat(
        "rwkv6qwen2",
        "RWKV6Qwen2ForCausalLM",
        _read,
        lambda options: write_switches(options, token_shift=options.token_shift, ranks=_RANK_KEYS),
        torch_files("rwkv6qwen2"),
    ),
    adopt=first_norms,
    facts=lambda cfg: card_facts(cfg, token_shift=cfg.mixer.token_shift),
)
