"""What both students' layers are built from: the cache, norms, MLP, RoPE, softmax attention, the mixers' shared parts.

Arrays are [B, T, heads, head size]; the recurrences and everything summed over tokens are float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from .configuration_student import GATE_FULL, GATE_LOW_RANK, StudentConfig

# Of a weight matrix, in the product with a single row.
PARTS = 8


class Context(NamedTuple):
    """What every mixer is told of the tokens; real [B, T] is False for padding, pairs [B, 1, T, S] says which keys a
    query sees; both are None where nothing is hidden but the future.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    real: torch.Tensor | None
    pairs: torch.Tensor | None


class RecurrentLayer(CacheLayerMixin):
    """A mixer's state: wkv [B, heads, K, V] float32 and, with token shift, the last input [B, D]."""

    is_sliding = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.length = 0
        self.wkv: torch.Tensor | None = None
        self.last_input: torch.Tensor | None = None

    def store(self, tokens: int, wkv: torch.Tensor, last_input: torch.Tensor | None = None) -> None:
        """Puts the state after `tokens` more tokens in the place of the one before them."""
        self.length += tokens
        self.wkv, self.last_input, self.is_initialized = wkv, last_input, True

    def _change(self, change) -> None:
        self.wkv = None if self.wkv is None else change(self.wkv)
        self.last_input = None if self.last_input is None else change(self.last_input)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        self.length, self.wkv, self.last_input, self.is_initialized = 0, None, None, False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError("a recurrent state cannot forget its last tokens; read the prompt again.")

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("a recurrent layer keeps a state, not keys and values.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("a recurrent layer keeps a state, not keys and values.")


class StudentCache(Cache):
    """What a model remembers of the tokens it has read: a state a recurrent layer, keys and values a softmax layer."""

    def __init__(self, config: StudentConfig):
        softmax = config.softmax_layers
        super().__init__(
            layers=[DynamicLayer() if i in softmax else RecurrentLayer() for i in range(config.num_hidden_layers)]
        )


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps); statistics float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Linear(nn.Linear):
    """y = x W^T + b; for a single float32 row on a CPU as a batch of products with parts of W.

    While tokens are made one by one, reading W is all the work. torch's product of a row and a matrix does it on one
    core at half the memory's speed, its batched product on all of them at the whole.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() != self.in_features:
            return super().forward(x)
        parts = math.gcd(self.out_features, PARTS)
        # The row as a transpose of [parts, 1, in]: by its strides torch picks the fast product.
        rows = torch.bmm(self.weight.unflatten(0, (parts, -1)), x.reshape(1, 1, -1).expand(parts, 1, -1).mT)
        out = rows.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class MLP(nn.Module):
    """y = (silu(x W_gate) * x W_up) W_down."""

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Projections(nn.Module):
    """The parts of the teacher's attention that every mixer keeps: q, k, v, o and, of some families, per-head norms."""

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, size, narrow = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(width, size, bias=config.attention_bias)
        self.k_proj = Linear(width, narrow, bias=config.attention_bias)
        self.v_proj = Linear(width, narrow, bias=config.attention_bias)
        self.o_proj = Linear(size, width, bias=config.attention_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads K] -> [B, T, heads, K]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def project(self, x_q: torch.Tensor, x_k: torch.Tensor, x_v: torch.Tensor, context: Context, *, use_rope: bool):
        """q [B, T, H, K] and k, v [B, T, G, K] of inputs [B, T, D]."""
        q, k, v = self.split(self.q_proj(x_q)), self.split(self.k_proj(x_k)), self.split(self.v_proj(x_v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if use_rope:
            q, k = rotate(q, context), rotate(k, context)
        return q, k, v


class SoftmaxAttention(Projections):
    """Causal grouped-query attention, in the layers that stay as the teacher's were."""

    def forward(self, x: torch.Tensor, v_first: torch.Tensor | None, context: Context, cache: Cache | None):
        q, k, v = (y.transpose(1, 2) for y in self.project(x, x, x, context, use_rope=True))
        if cache is not None:
            k, v = cache.layers[self.layer_idx].update(k, v)
        causal = context.pairs is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.pairs, is_causal=causal, enable_gqa=self.heads != self.kv_heads
        )
        return self.o_proj(out.transpose(1, 2).flatten(2)), v_first


class RecurrentMixer(Projections):
    """What both recurrent mixers share: repeated heads, the gate, GroupNorm."""

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width, size = config.hidden_size, self.heads * self.head_dim
        if config.gate_rank_type == GATE_FULL:
            self.gate = Linear(width, size, bias=False)
        elif config.gate_rank_type == GATE_LOW_RANK:
            self.g1 = nn.Parameter(torch.zeros(width, config.lora_rank_gate))
            self.g2 = nn.Parameter(torch.zeros(config.lora_rank_gate, size))
        if config.groupnorm_att:
            self.ln_x = nn.GroupNorm(self.heads, size, eps=self.head_dim * 1e-5)

    def repeat(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, G, K] -> [B, T, H, K], the heads of one group side by side."""
        return x.repeat_interleave(self.heads // self.kv_heads, dim=2)

    def initial_state(self, x: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """The recurrence's state [B, H, K, V] before these tokens."""
        stored = None if cache is None else cache.layers[self.layer_idx].wkv
        if stored is not None:
            return stored
        return x.new_zeros(x.shape[0], self.heads, self.head_dim, self.head_dim, dtype=torch.float32)

    def finish(self, out: torch.Tensor, x_gate: torch.Tensor) -> torch.Tensor:
        """The recurrence's output [B, T, H, V] normalised, gated and projected to [B, T, D]."""
        out = out.flatten(2)
        if self.config.groupnorm_att:
            weight, bias = self.ln_x.weight.float(), self.ln_x.bias.float()
            out = F.group_norm(out.float().flatten(0, 1), self.heads, weight, bias, self.ln_x.eps).view_as(out)
        out = out.to(x_gate.dtype)
        if self.config.gate_rank_type == GATE_FULL:
            out = out * torch.sigmoid(self.gate(x_gate))
        elif self.config.gate_rank_type == GATE_LOW_RANK:
            out = out * (torch.sigmoid(x_gate @ self.g1) @ self.g2)
        return self.o_proj(out)

    def initialise(self) -> None:
        """Fills the parameters that are this class's own and not yet loaded, so that the gate starts quiet."""
        if self.config.gate_rank_type == GATE_FULL:
            init.zeros_(self.gate.weight)
        elif self.config.gate_rank_type == GATE_LOW_RANK:
            init.zeros_(self.g1)
            init.orthogonal_(self.g2, gain=0.1)

    def depth(self) -> float:
        """0 for the first layer, 1 for the last."""
        return self.layer_idx / max(self.config.num_hidden_layers - 1, 1)


def on_gpu(x: torch.Tensor) -> bool:
    """Whether flash-linear-attention's kernels take x: in half precision, on a CUDA device."""
    return x.is_cuda and x.dtype != torch.float32


def split_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, H, K] -> [B, H, T / size, size, K] float32, filled up with zeros, which no state notices."""
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return padded.transpose(1, 2).unflatten(2, (-1, size))


def join_chunks(x: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of the inverse."""
    return x.flatten(2, 3).transpose(1, 2)[:, :length]


def hide_padding(real: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors [B, T, H, K], zero at padding: log decays of zero and keys of zero leave the state as it is."""
    if real is None:
        return tensors
    return tuple(x.masked_fill(~real[..., None, None], 0) for x in tensors)


def rope_tables(config: StudentConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, T, 1, K/2] of every position's angles, float32."""
    rope = config.rope_parameters
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** exponents
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        frequencies = frequencies / rope["factor"]
    elif kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = keep * frequencies + (1 - keep) * frequencies / rope["factor"]
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, context: Context) -> torch.Tensor:
    """Rotates the pairs (x_i, x_{i + K/2}); float32 inside."""
    first, second = x.float().chunk(2, -1)
    cos, sin = context.cos, context.sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
