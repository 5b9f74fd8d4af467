"""RAD-RWKV7 ("RADGoose"): the generalised delta rule in the place of softmax attention (RADLADS section 3.2).

    r = RoPE(x W_q + b)    k = RoPE(x W_k + b)    v' = x W_v + b        k, v' repeated to all heads
    iclr  = sigmoid(a0 + (x A_a) B_a)             log_w = -exp(-1/2) sigmoid(w0 + tanh(x A_w) B_w)
    v     = v' + (v_first - v') sigmoid(v0 + (x A_v) B_v)               (v' in the first recurrent layer)
    S_t   = (diag(w_t) - (kk_t iclr_t) kk_t^T) S_{t-1} + k_t v_t^T      p_t = S_t^T r_t     out = (g p) W_o

balance_state (variant A): kk = k / |k|,        k <- k (1 - w + iclr),            p <- p head_dim^-1/2
otherwise     (variant B): kk = k k_k / |k k_k|, k <- k (1 + (iclr - 1) k_a),     p <- GroupNorm(p) with group_norm
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.context_parallel import over_shards
from pallas_kernels.sharded import ROWS
from pallas_kernels.wkv7 import wkv7, wkv7_step
from pallas_kernels.wkv7.api import IMPLEMENTATIONS
from radlads_jax.models import heads, starts
from radlads_jax.models.attention import Context, Mixer, projection_tensors
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import GroupNorm, LowRank, linear, orthogonal, split_heads
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

_LOG_W_BOUND = -math.exp(-0.5)


class RadRwkv7(Mixer):
    """The mixer; r_k is carried for the published format and unused, k_k and k_a are used by variant B alone."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs, qk_norm=has_norms(cfg))
        mixer, size = cfg.mixer, cfg.num_heads * cfg.head_dim

        def low_rank(rank: int, **options) -> LowRank:
            gain = 0.1 * max(1.0, math.sqrt(rank / size))
            return LowRank(cfg, rank, size, rngs=rngs, b_init=orthogonal(gain), **options)

        self.decay = low_rank(mixer.rank_decay, activation=jnp.tanh, base=_initial_decay(cfg, layer_id))
        self.iclr = low_rank(mixer.rank_iclr, base=jnp.zeros(size))
        self.value = low_rank(mixer.rank_value, base=jnp.ones(size))
        if mixer.gate == "low_rank":
            self.gate = low_rank(mixer.rank_gate, activation=jax.nn.sigmoid)
        elif mixer.gate == "full":
            self.gate = linear(cfg.hidden_size, size, cfg, rngs, zero=True)
        if mixer.group_norm:
            self.ln_x = GroupNorm(cfg)
        self.k_k = nnx.Param(jnp.full((size,), 0.85, cfg.param_dtype))
        self.k_a = nnx.Param(jnp.ones((size,), cfg.param_dtype))
        self.r_k = nnx.Param(jnp.zeros((cfg.num_heads, cfg.head_dim), cfg.param_dtype))

    def __call__(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (out [B, T, D], state as `heads` gives it)."""
        out, state = self.heads(x, context, layer_id, state)
        return self.o(out), state

    def heads(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (what o reads [B, T, d], state {"wkv": [B, H, K, V] float32})."""
        r, k, v = self.flat_projections(x, x, x, context, use_rope=self.cfg.mixer.use_rope)
        return self.gated(x, r, k, v, context, layer_id, state)

    def gated(self, x: Float[Array, "B T D"], r: Array, k: Array, v: Array, context: Context, layer_id, state):
        """As `heads`, of x's projections r [B, T, H K] and k, v [B, T, G K]."""
        cfg, mixer = self.cfg, self.cfg.mixer
        k, v = (heads.repeat(each, cfg.head_dim, cfg.num_heads) for each in (k, v))
        log_w, iclr = _LOG_W_BOUND * jax.nn.sigmoid(self.decay(x)), jax.nn.sigmoid(self.iclr(x))

        assert context.v_first is not None
        residual = jax.nn.sigmoid(self.value(x)).astype(v.dtype)
        v = v + (context.v_first - v) * jnp.where(layer_id == cfg.first_recurrent_layer, 0, residual)

        kk, k = self._keys(k.astype(jnp.float32), log_w, iclr)
        a, b = (-kk).astype(x.dtype), (kk * iclr).astype(x.dtype)
        initial = None if state is None else state["wkv"]
        sizes = (cfg.head_dim,) * 6
        run = heads.recurrence(wkv7, wkv7_step, over_shards, sizes, heads=cfg.num_heads)
        out, final = run(r, log_w, k.astype(x.dtype), v, a, b, initial, context.segment_ids)
        if mixer.group_norm:
            out = self.ln_x(split_heads(out, cfg.num_heads)).reshape(out.shape)
        else:
            out = out * cfg.head_dim**-0.5
        if mixer.gate == "low_rank":
            out = out * self.gate(x)
        elif mixer.gate == "full":
            out = out * jax.nn.sigmoid(self.gate(x))
        return out, None if state is None else {"wkv": final}

    def first_values(self, x: Float[Array, "B T D"]) -> Float[Array, "B T d"]:
        """v' of all heads: the value residual of every later layer."""
        size = self.cfg.head_dim
        return heads.repeat(heads.by_heads(self.v(x), size), size, self.cfg.num_heads)

    def _keys(self, k, log_w, iclr):
        """The removal key kk (unit length per head) and the key that is written, [B, T, H K] float32."""
        size = self.cfg.head_dim
        if self.cfg.mixer.balance_state:
            return heads.unit(k, size), k * (iclr - jnp.expm1(log_w))
        k_k, k_a = (p[...].astype(jnp.float32) for p in (self.k_k, self.k_a))
        return heads.unit(k * k_k, size), k * (1 + (iclr - 1) * k_a)


def _initial_decay(cfg: ModelConfig, layer_id: Int[Array, ""]) -> Float[Array, " d"]:
    """w0[n] = -7 + 5 (n/(d-1))^(0.85 + sqrt(l/(L-1))) + 0.5."""
    size = cfg.num_heads * cfg.head_dim
    depth = layer_id / max(cfg.num_layers - 1, 1)
    return -6.5 + 5 * jnp.linspace(0.0, 1.0, size) ** (0.85 + jnp.sqrt(depth))


@dataclasses.dataclass(frozen=True)
class RadRwkv7Options(RwkvOptions):
    """The paper's student has RoPE, a low-rank gate and state balancing; no token shift, which gives nothing here."""

    rank_iclr: int = 32
    rank_value: int = 32

    @classmethod
    def for_width(cls, hidden_size: int) -> "RadRwkv7Options":
        wide = low_rank_size(hidden_size, 0.5, 1.8)
        return cls(
            use_rope=True,
            gate="low_rank",
            rank_decay=wide,
            rank_gate=low_rank_size(hidden_size, 0.8, 0.6),
            rank_iclr=wide,
            rank_value=low_rank_size(hidden_size, 0.5, 1.3),
        )


_RANK_KEYS = {
    "rank_decay": "lora_rank_decay",
    "rank_iclr": "lora_rank_iclr",
    "rank_value": "lora_rank_value_residual_mix",
    "rank_gate": "lora_rank_gate",
}


def _read(keys: Any, hidden_size: int) -> RadRwkv7Options:
    if keys.flag("use_tokenshift", False):
        raise ValueError(
            "config.json: use_tokenshift is true in a model of type rwkv7qwen2; expected false, because RAD-RWKV7 has "
            "no token shift here. Choose a checkpoint without token shift."
        )
    switches = read_switches(keys, gate="low_rank", group_norm=True)
    return SPEC.choose(hidden_size, **switches, **read_ranks(keys, _RANK_KEYS))


def _tensors(cfg: ModelConfig) -> list[Tensor]:
    width, size, options = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.mixer
    ranks = {
        ("decay", "w"): options.rank_decay,
        ("iclr", "a"): options.rank_iclr,
        ("value", "v"): options.rank_value,
    }
    tensors = projection_tensors(cfg, qk_norm=has_norms(cfg))
    for (path, letter), rank in ranks.items():
        tensors += low_rank_tensors(path, (f"{letter}0", f"{letter}1", f"{letter}2"), width, rank, size)
    return [
        *tensors,
        *gate_and_norm_tensors(cfg),
        Tensor("k_k", "k_k", (size,), "vector", axes=("tensor",)),
        Tensor("k_a", "k_a", (size,), "vector", axes=("tensor",)),
        Tensor("r_k", "r_k", (cfg.num_heads, cfg.head_dim), axes=("tensor",)),
    ]


def _state(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    del max_length
    return {"wkv": StateArray((batch, cfg.num_heads, cfg.head_dim, cfg.head_dim), axes=(ROWS, "tensor"))}


# Of the sigmoid: log_w is at least 0.95 times its bound, where a gradient is left.
_MOST_DECAY = 0.95
# The first layer's values have a share of 0.2%.
_QUIET = -6.0


def _decay_of_look_back(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    """What a head's state holds is as old, on average, as what its query head looks at; whatever the token."""
    share = jnp.minimum(starts.log_decay_of_look_back(seen.look_back) / _LOG_W_BOUND, _MOST_DECAY)
    base = mixer["decay"]["base"]
    return {"decay": mixer["decay"] | {"base": starts.of_heads(jax.scipy.special.logit(share), base)}}


def _iclr_of_entropy(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    iclr, base = starts.removal_of_entropy(seen.entropy), mixer["iclr"]["base"]
    return {"iclr": mixer["iclr"] | {"base": starts.of_heads(jax.scipy.special.logit(iclr), base)}}


def _quiet_value_residual(cfg: ModelConfig, mixer: dict[str, Any], seen: TeacherStatistics) -> dict[str, Any]:
    return {"value": mixer["value"] | {"base": jnp.full_like(mixer["value"]["base"], _QUIET)}}


def _calibrations(cfg: ModelConfig) -> dict[str, Calibration]:
    return {
        "decay": Calibration(_decay_of_look_back),
        "iclr": Calibration(_iclr_of_entropy),
        "value": Calibration(_quiet_value_residual),
        **gate_and_output_calibrations(cfg),
    }


SPEC = MixerSpec(
    name="rad_rwkv7",
    title="RAD-RWKV7",
    module=RadRwkv7,
    options=RadRwkv7Options,
    tensors=_tensors,
    state=_state,
    operator=Operator("wkv7", IMPLEMENTATIONS, {"wkv7_forward": 3.1, "wkv7_backward": 5.8}),
    # Decay, removal, two outer products, output: 9 K d.
    flops=lambda cfg, seq_len: 9.0 * cfg.head_dim * cfg.num_heads * cfg.head_dim,
    # bfloat16: r, k, v, a, b and the output; float32: decay, in-context rate, value residual; the gradients of all of
    # them; the kernel's state every 64 tokens.
    bytes_per_column=56,
    shares_values=True,
    calibrations=_calibrations,
    calibrated=("decay", "iclr", "value", "gate", "projection"),
    published=PublishedFormat(
        "rwkv7qwen2",
        "RWKV7Qwen2ForCausalLM",
        _read,
        lambda options: write_switches(options, token_shift=False, ranks=_RANK_KEYS),
        torch_files("rwkv7qwen2"),
    ),
    adopt=first_norms,
    facts=lambda cfg: card_facts(cfg, token_shift=False),
)
