"""Gated DeltaNet as dense Qwen3.5 has it: a delta rule with one decay a head behind a short convolution.

    u = SiLU(conv4(x W_qkv))    q^ = q / |q| K^-1/2    k^ = k / |k|    beta = sigmoid(x W_b)
    log_g = -exp(A_log) softplus(x W_a + dt_bias)
    S <- e^log_g S;   S <- S + k^ (beta (v - S^T k^))^T;   o = S^T q^
    out = (w RMS(o) SiLU(x W_z)) W_o

A student's k and v have its teacher's kv heads, and every one serves its query heads (a Qwen3.5 checkpoint holds them
cloned); with kv_heads "cloned" every query head begins with a copy and trains its own. The format has neither biases
nor norms of q and k, nor RoPE: a teacher's are left out. Of a teacher that has such layers itself, the student's others
have their sizes (models/gdn_start.py).
Source: Gated Delta Networks (arXiv 2412.06464); transformers' qwen3_5.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels.context_parallel import over_shards
from pallas_kernels.gdn import conv_over_shards, gdn, gdn_step, short_conv
from pallas_kernels.gdn.api import IMPLEMENTATIONS
from pallas_kernels.sharded import ROWS, constrain, per_shard
from radlads_jax.models import gdn_start, heads, starts
from radlads_jax.models.attention import Context
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.layers import RMSNorm, linear
from radlads_jax.models.spec import (
    Calibration,
    MixerSpec,
    Operator,
    StateArray,
    Tensor,
    linear_tensors,
    of_checkpoint,
)

CONV_WIDTH = 4
# Of |q|^2 and |k|^2, as transformers has it.
_UNIT_EPS = 1e-6
# Tokens; with less a gate keeps nothing of a state, and its logarithm has no start to train from.
_LEAST_HALF_LIFE = 0.14
_KV_HEADS = ("teacher", "cloned")


@dataclasses.dataclass(frozen=True)
class GdnOptions:
    """key_heads, value_heads, key_size, value_size: 0 = the softmax layers' (a student); all given: of a checkpoint,
    whose q, k and v are one matrix on disk and here. kv_heads: a student's k and v are trained at the "teacher"'s kv
    heads, or "cloned" for every query head.

    The start of what is new: shortest_half_life, longest_half_life: of the first and the last head, in tokens, the
    others spread evenly in log between them, for what looks back how far is not known without data. conv_qk, conv_v:
    the last tap of the convolution, the others 0: SiLU is nearly linear where its argument is small, and what is
    smaller meets the eps of the norms behind it. gate_std: of W_z; 0 would stop every gradient but its own.
    """

    key_heads: int = of_checkpoint(0)
    value_heads: int = of_checkpoint(0)
    key_size: int = of_checkpoint(0)
    value_size: int = of_checkpoint(0)
    kv_heads: str = "teacher"
    shortest_half_life: float = 4.0
    longest_half_life: float = 4096.0
    conv_qk: float = 0.03
    conv_v: float = 0.2
    gate_std: float = 0.02

    def __post_init__(self):
        sizes = (self.key_heads, self.value_heads, self.key_size, self.value_size)
        if any(sizes) != all(sizes) or (self.fused and self.value_heads % self.key_heads):
            raise ValueError(
                f"gdn's key_heads, value_heads, key_size, value_size are {sizes}; expected all 0 (the teacher's), or "
                "all given with value_heads a multiple of key_heads. Correct the one that is wrong."
            )
        if self.kv_heads not in _KV_HEADS:
            raise ValueError(f"config.student.kv_heads is {self.kv_heads!r}; expected one of {', '.join(_KV_HEADS)}.")
        if not _LEAST_HALF_LIFE <= self.shortest_half_life <= self.longest_half_life < math.inf:
            raise ValueError(
                f"config.student.shortest_half_life and .longest_half_life are {self.shortest_half_life:g} and "
                f"{self.longest_half_life:g} tokens; expected {_LEAST_HALF_LIFE:.2f} <= shortest <= longest. Exchange "
                "or raise them."
            )
        for name in ("conv_qk", "conv_v", "gate_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"config.student.{name} is {getattr(self, name)}; expected a number above 0.")

    @property
    def fused(self) -> bool:
        """Whether q, k and v are one matrix."""
        return self.key_heads > 0

    @classmethod
    def for_width(cls, hidden_size: int) -> "GdnOptions":
        """The same for every width."""
        del hidden_size
        return cls()


class _Part(NamedTuple):
    """One of q, k, v: its heads and their size."""

    name: str
    heads: int
    size: int

    @property
    def channels(self) -> int:
        return self.heads * self.size


def _parts_of(cfg: ModelConfig) -> tuple[_Part, _Part, _Part]:
    """q, k and v."""
    options = cfg.mixer
    if options.fused:
        keys = (options.key_heads, options.key_size)
        return _Part("q", *keys), _Part("k", *keys), _Part("v", options.value_heads, options.value_size)
    narrow = (cfg.num_heads if options.kv_heads == "cloned" else cfg.num_kv_heads, cfg.head_dim)
    return _Part("q", cfg.num_heads, cfg.head_dim), _Part("k", *narrow), _Part("v", *narrow)


def _value_heads(cfg: ModelConfig) -> tuple[int, int]:
    """The heads of the state, and their size."""
    options = cfg.mixer
    return (options.value_heads, options.value_size) if options.fused else (cfg.num_heads, cfg.head_dim)


class Gdn(nnx.Module):
    """The mixer; taps [C, 1, 4] lie as on disk, the last one the token's own."""

    def __init__(self, cfg: ModelConfig, layer_id: Int[Array, ""], *, rngs: nnx.Rngs):
        del layer_id
        self.cfg, options = cfg, cfg.mixer
        heads, size = _value_heads(cfg)
        last = {"q": options.conv_qk, "k": options.conv_qk, "v": options.conv_v}
        taps = {part.name: _first_taps(part.channels, last[part.name], cfg) for part in _parts_of(cfg)}
        if options.fused:
            self.qkv = linear(cfg.hidden_size, sum(part.channels for part in _parts_of(cfg)), cfg, rngs)
            self.conv = nnx.Param(jnp.concatenate(list(taps.values())))
        else:
            self.q, self.k, self.v = (linear(cfg.hidden_size, p.channels, cfg, rngs) for p in _parts_of(cfg))
            self.conv_q, self.conv_k, self.conv_v = (nnx.Param(first) for first in taps.values())
        self.z = linear(cfg.hidden_size, heads * size, cfg, rngs)
        self.z.kernel = nnx.Param(self.z.kernel[...] * (options.gate_std / 0.02))
        self.b = linear(cfg.hidden_size, heads, cfg, rngs, zero=True)
        self.a = linear(cfg.hidden_size, heads, cfg, rngs, zero=True)
        self.a_log = nnx.Param(jnp.zeros((heads,), cfg.param_dtype))
        self.dt_bias = nnx.Param(_first_dt_bias(options, heads).astype(cfg.param_dtype))
        self.norm = RMSNorm(size, cfg, zero_centred=False)
        self.o = linear(heads * size, cfg.hidden_size, cfg, rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (out [B, T, D], state as of `heads`)."""
        out, state = self.heads(x, context, layer_id, state)
        return self.o(out), state

    def heads(self, x: Float[Array, "B T D"], context: Context, layer_id, state):
        """-> (what o reads [B, T, d], state {"gdn": [B, H, K, V] float32, "conv_q", "conv_k", "conv_v": [B, 3, C]})."""
        del layer_id
        (q, k, v), windows = self._convolved(x, context, state)
        (_, key_heads, size), _, (_, _, value_size) = _parts_of(self.cfg)
        if not self.cfg.mixer.fused:
            k, v = (heads.repeat(each, size, self.cfg.num_heads) for each in (k, v))
        q, k = (heads.unit(each.astype(jnp.float32), size, eps=_UNIT_EPS) for each in (q, k))
        q, k = (q * size**-0.5).astype(x.dtype), k.astype(x.dtype)
        # float32 from here on: the sums feed the exponentials of the decay.
        beta = jax.nn.sigmoid(self.b(x).astype(jnp.float32))
        rate = jax.nn.softplus(self.a(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        log_g = -jnp.exp(self.a_log[...].astype(jnp.float32)) * rate
        initial = None if state is None else state["gdn"]
        sizes, cut = (size, size, value_size), over_shards(values=2)
        run = heads.recurrence(gdn, gdn_step, cut, sizes, heads=key_heads, of_heads=2)
        out, final = run(q, k, v, log_g, beta, initial, context.segment_ids)
        gate = jax.nn.silu(self.z(x).astype(jnp.float32))
        out = (heads.normed(out, self.norm) * gate).astype(x.dtype)
        return out, None if state is None else {"gdn": final, **windows}

    def _convolved(self, x: Array, context: Context, state: dict | None) -> tuple[list[Array], dict[str, Array]]:
        """q, k, v [B, T, heads size] after the convolution, and its last inputs."""
        parts = _parts_of(self.cfg)
        if self.cfg.mixer.fused:
            ends = [parts[0].channels, parts[0].channels + parts[1].channels]
            inputs, taps = jnp.split(self.qkv(x), ends, axis=-1), jnp.split(self.conv[...], ends)
        else:
            inputs = [self.q(x), self.k(x), self.v(x)]
            taps = [self.conv_q[...], self.conv_k[...], self.conv_v[...]]
        run = per_shard(_conv, ("sequence", "taps", "window", "rows"), ("sequence", "window"), conv_over_shards)
        outs, windows = [], {}
        for part, u, kernel in zip(parts, inputs, taps, strict=True):
            name = f"conv_{part.name}"
            before = None if state is None else state[name]
            y, windows[name] = run(constrain(u, ROWS, "context", "tensor"), kernel[:, 0].T, before, context.segment_ids)
            outs.append(y)
        return outs, windows if state is None else {n: w.astype(state[n].dtype) for n, w in windows.items()}


def _conv(x, kernel, initial_state, segment_ids):
    return short_conv(x, kernel, initial_state=initial_state, segment_ids=segment_ids)


def _first_taps(channels: int, last: float, cfg: ModelConfig) -> Float[Array, "C 1 W"]:
    return jnp.zeros((channels, 1, CONV_WIDTH), cfg.param_dtype).at[:, 0, -1].set(last)


def _first_dt_bias(options: GdnOptions, heads: int) -> Float[Array, " H"]:
    """softplus^-1(log 2 / half-life), half-lives from the shortest to the longest."""
    half_lives = jnp.geomspace(options.shortest_half_life, options.longest_half_life, heads)
    return jnp.log(jnp.expm1(math.log(2) / half_lives))


def _tensors(cfg: ModelConfig) -> list[Tensor]:
    heads, size = _value_heads(cfg)
    width, parts = cfg.hidden_size, _parts_of(cfg)

    def taps(path: str, name: str, channels: int, **split: Any) -> Tensor:
        return Tensor(path, f"{name}.weight", (channels, 1, CONV_WIDTH), axes=("tensor",), **split)

    if cfg.mixer.fused:
        # Cut by columns, q, k and v do not lie by heads: every device of the axis tensor uses all of them.
        channels = sum(part.channels for part in parts)
        weight = linear_tensors("qkv", "in_proj_qkv", width, channels)[0]
        before = [
            dataclasses.replace(weight, split_by="nothing"),
            taps("conv", "conv1d", channels, split_by="nothing"),
        ]
    else:
        before = []
        for part in parts:
            by: Literal["heads", "kv_heads"] = "heads" if part.heads == cfg.num_heads else "kv_heads"
            before += linear_tensors(part.name, f"{part.name}_proj", width, part.channels, split_by=by)
            before.append(taps(f"conv_{part.name}", f"conv_{part.name}", part.channels, split_by=by))
    return [
        *before,
        *linear_tensors("z", "in_proj_z", width, heads * size),
        *linear_tensors("b", "in_proj_b", width, heads),
        *linear_tensors("a", "in_proj_a", width, heads),
        Tensor("a_log", "A_log", (heads,), axes=("tensor",)),
        Tensor("dt_bias", "dt_bias", (heads,), axes=("tensor",)),
        Tensor("norm/scale", "norm.weight", (size,)),
        *linear_tensors("o", "out_proj", heads * size, width, out=True, multiplies="inner"),
    ]


def _state(cfg: ModelConfig, batch: int, max_length: int) -> dict[str, StateArray]:
    del max_length
    heads, value_size = _value_heads(cfg)
    parts = _parts_of(cfg)
    windows = {
        f"conv_{part.name}": StateArray((batch, CONV_WIDTH - 1, part.channels), cfg.dtype, (ROWS, None, "tensor"))
        for part in parts
    }
    return {"gdn": StateArray((batch, heads, parts[0].size, value_size), axes=(ROWS, "tensor")), **windows}


def _columns(cfg: ModelConfig) -> int:
    heads, size = _value_heads(cfg)
    return heads * size


def _flops(cfg: ModelConfig, seq_len: int) -> float:
    """Decay, what the key finds, outer product, output: 7 K V a head; four taps a channel."""
    del seq_len
    heads, value_size = _value_heads(cfg)
    parts = _parts_of(cfg)
    return 7.0 * heads * parts[0].size * value_size + 2.0 * CONV_WIDTH * sum(part.channels for part in parts)


def _left_out(cfg: ModelConfig) -> list[str]:
    """What a teacher of these dimensions has and the mixer has no place for."""
    present = {
        "biases of q, k and v": cfg.qkv_bias,
        "the bias of o": cfg.o_bias,
        "norms of q and k": cfg.qk_norm,
        "gates of the heads' outputs": cfg.output_gate,
        "RoPE": True,
    }
    return [name for name, is_there in present.items() if is_there]


def _facts(cfg: ModelConfig) -> dict[str, str]:
    heads, size = _value_heads(cfg)
    return {
        "heads of the state": f"{heads} of {_parts_of(cfg)[0].size} x {size}",
        "convolution": f"{CONV_WIDTH} tokens, causal, with SiLU",
        "of softmax attention left out in these layers": ", ".join(_left_out(cfg)),
    }


SPEC = MixerSpec(
    name="gdn",
    title="Gated DeltaNet",
    module=Gdn,
    options=GdnOptions,
    tensors=_tensors,
    state=_state,
    operator=Operator("gdn", IMPLEMENTATIONS, {"gdn_forward": 2.5, "gdn_backward": 5.0}),
    flops=_flops,
    # bfloat16: q, k, v before and after the convolution, their unit vectors, the output, its norm and the gate; the
    # gradients of most of them; the kernel's state every 64 tokens.
    bytes_per_column=56,
    disk_prefix="linear_attn",
    export_format="qwen3_5",
    calibrations=lambda cfg: {
        "decay": Calibration(gdn_start.decay_of_look_back, replaces=("shortest_half_life", "longest_half_life")),
        "beta": Calibration(gdn_start.beta_of_entropy),
        "gate": Calibration(gdn_start.open_gate, replaces=("gate_std",)),
        "output": Calibration(gdn_start.output_of_rms),
        "projection": dataclasses.replace(starts.SOLVED_OUTPUT, needs=("gate",)),
    },
    calibrated=("decay", "beta", "gate", "output"),
    columns=_columns,
    obstacles=gdn_start.obstacles,
    adopt=gdn_start.adopt,
    facts=_facts,
)
