"""What all students' layers are built from: norms, MLP, RoPE, softmax attention, the mixers' shared parts.

Arrays are [B, T, heads, head size]; the recurrences and everything summed over tokens are float32.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache

from .configuration_student import GATE_FULL, GATE_LOW_RANK, StudentConfig

# Of a weight matrix, in the product with a single row.
PARTS = 8


class Context(NamedTuple):
    """What every mixer is told of the tokens; real [B, T] is False for padding, pairs [B, 1, T, S] says which keys a
    query sees; both are None where nothing is hidden but the future. starts [B, T] is True where a document begins
    within what is read (rows packed with several); None where none does. logit_scale [B, T, 1, 1]: of every query in
    the softmax layers; None for 1.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    real: torch.Tensor | None
    pairs: torch.Tensor | None
    starts: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None


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
        plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() == self.in_features
        if not plain or torch.is_autocast_enabled("cpu"):
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
    """The parts of the teacher's attention that every mixer keeps: q, k, v, o and, of some families, per-head norms.

    normed: whether there are norms of q and k. gated: whether q_proj has a gate beside every head's query.
    """

    def __init__(self, config: StudentConfig, layer_idx: int, *, normed: bool, gated: bool = False):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width, size, narrow = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = Linear(width, 2 * size if gated else size, bias=config.attention_bias)
        self.k_proj = Linear(width, narrow, bias=config.attention_bias)
        self.v_proj = Linear(width, narrow, bias=config.attention_bias)
        self.o_proj = Linear(size, width, bias=config.attention_output_bias)
        self.gated, self.normed = gated, normed
        if normed:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads K] -> [B, T, heads, K]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def project(self, x_q: torch.Tensor, x_k: torch.Tensor, x_v: torch.Tensor, context: Context, *, use_rope: bool):
        """q [B, T, H, K], k and v [B, T, G, K] of inputs [B, T, D], and the gates [B, T, H, K], None where none are."""
        q = self.q_proj(x_q).unflatten(-1, (self.heads, -1))
        k, v = self.split(self.k_proj(x_k)), self.split(self.v_proj(x_v))
        q, gate = q.chunk(2, -1) if self.gated else (q, None)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if use_rope:
            q, k = rotate(q, context), rotate(k, context)
        return q, k, v, gate


class SoftmaxAttention(Projections):
    """Causal grouped-query attention, in the layers that stay, as the teacher's were but for the config's attn_*."""

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(config, layer_idx, normed=config.qk_norm, gated=config.attn_output_gate)

    def forward(self, x: torch.Tensor, v_first: torch.Tensor | None, context: Context, cache: Cache | None):
        q, k, v, gate = self.project(x, x, x, context, use_rope=self.config.attn_use_rope)
        if context.logit_scale is not None:
            q = (q.float() * context.logit_scale).to(q.dtype)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if cache is not None:
            k, v = cache.layers[self.layer_idx].update(k, v)
        causal = context.pairs is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.pairs, is_causal=causal, enable_gqa=self.heads != self.kv_heads
        )
        out = out.transpose(1, 2)
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.o_proj(out.flatten(2)), v_first


class RecurrentMixer(Projections):
    """What all recurrent mixers share: repeated heads, the gate, GroupNorm."""

    def __init__(self, config: StudentConfig, layer_idx: int):
        super().__init__(config, layer_idx, normed=config.qk_norm or config.mixer_qk_norm)
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
        state = {} if cache is None else cache.layers[self.layer_idx].state
        if "wkv" in state:
            return state["wkv"]
        return x.new_zeros(x.shape[0], self.heads, self.head_dim, self.head_dim, dtype=torch.float32)

    def gated_output(self, out: torch.Tensor, x_gate: torch.Tensor) -> torch.Tensor:
        """The recurrence's output [B, T, H, V] normalised and gated, as o_proj reads it: [B, T, H V]."""
        out = out.flatten(2)
        if self.config.groupnorm_att:
            weight, bias = self.ln_x.weight.float(), self.ln_x.bias.float()
            out = F.group_norm(out.float().flatten(0, 1), self.heads, weight, bias, self.ln_x.eps).view_as(out)
        out = out.to(x_gate.dtype)
        if self.config.gate_rank_type == GATE_FULL:
            out = out * torch.sigmoid(self.gate(x_gate))
        elif self.config.gate_rank_type == GATE_LOW_RANK:
            out = out * (torch.sigmoid(x_gate @ self.g1) @ self.g2)
        return out

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


def in_float32(recurrence):
    """The recurrence with autocast switched off, which would round state and decays to half precision."""

    def run(r, *others):
        # These devices have no switch of their own.
        device = "cpu" if r.device.type in ("meta", "mps") else r.device.type
        with torch.autocast(device, enabled=False):
            return recurrence(r, *others)

    return run


def forget(state: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
    """The states [B, H, K, V], zero in those rows [B] in which a document begins."""
    return state if starts is None else state.masked_fill(starts[:, None, None, None], 0)


def run_kernel(kernel, tensors: tuple, state: torch.Tensor, starts: torch.Tensor | None):
    """One of flash-linear-attention's kernels, which takes the documents of all rows as one row with boundaries."""
    options = {"scale": 1.0, "output_final_state": True}
    if starts is None:
        return kernel(*tensors, initial_state=state, **options)
    rows, length = starts.shape
    begins = starts.clone()
    begins[:, 0] = True
    offsets = begins.flatten().nonzero().flatten()
    first = offsets % length == 0
    states = state.new_zeros(len(offsets), *state.shape[1:])
    states[first] = forget(state, starts[:, 0])
    bounds = nn.functional.pad(offsets, (0, 1), value=rows * length)
    out, last = kernel(*(x.flatten(0, 1)[None] for x in tensors), initial_state=states, cu_seqlens=bounds, **options)
    return out[0].unflatten(0, (rows, length)), last[nn.functional.pad(first[1:], (0, 1), value=True)]


class Slots(NamedTuple):
    """Places [B, T] of tokens where every document begins a chunk, and which chunks [B, N] do."""

    places: torch.Tensor
    fresh: torch.Tensor


def chunk_slots(starts: torch.Tensor | None, size: int) -> Slots | None:
    """The slots of tokens with these starts of documents [B, T]; None where there is but one."""
    if starts is None:
        return None
    numbers = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
    begun = torch.where(starts, numbers, 0).cummax(1).values
    before = F.pad(begun[:, :-1], (1, 0))
    places = numbers + torch.where(starts, (before - numbers) % size, 0).cumsum(1)
    fresh = torch.zeros(starts.shape[0], int(places.max()) // size + 1, dtype=torch.bool, device=starts.device)
    rows, tokens = starts.nonzero(as_tuple=True)
    fresh[rows, places[rows, tokens] // size] = True
    return Slots(places, fresh)


def split_chunks(x: torch.Tensor, size: int, slots: Slots | None = None) -> torch.Tensor:
    """[B, T, H, K] -> [B, H, N, size, K] float32, filled up with zeros, which no state notices."""
    if slots is not None:
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        spread = x.new_zeros(x.shape[0], slots.fresh.shape[1] * size, *x.shape[2:])
        x = spread.index_put((rows, slots.places), x)
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return padded.transpose(1, 2).unflatten(2, (-1, size))


def join_chunks(x: torch.Tensor, length: int, slots: Slots | None = None) -> torch.Tensor:
    """The inverse, of the first `length` tokens."""
    joined = x.flatten(2, 3).transpose(1, 2)
    if slots is None:
        return joined[:, :length]
    return joined[torch.arange(x.shape[0], device=x.device)[:, None], slots.places]


def state_before(state: torch.Tensor, chunk: int, slots: Slots | None) -> torch.Tensor:
    """The state that a chunk begins with, after the chunk before it left this one."""
    return state if slots is None else forget(state, slots.fresh[:, chunk])


def document_starts(positions: torch.Tensor, real: torch.Tensor | None, before: int) -> torch.Tensor | None:
    """Where, in positions [B, T], those of real tokens do not grow: a document begins there. None where none does.

    before: the number of tokens read before, after which a row that goes on at 0 begins anew.
    """
    numbers = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    real = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    latest = F.pad(torch.where(real, numbers, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    previous = positions.gather(1, latest.clamp(min=0))
    begins_again = (positions == 0) & bool(before)
    starts = real & torch.where(latest < 0, begins_again, positions <= previous)
    return starts if bool(starts.any()) else None


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


def logit_scale(config: StudentConfig, positions: torch.Tensor) -> torch.Tensor | None:
    """log(t + a) / log(a) [B, T, 1, 1] for queries at these places t [B, T] of their documents."""
    if not config.attn_log_scale:
        return None
    return ((positions.float() + config.attn_log_scale).log() / math.log(config.attn_log_scale))[..., None, None]


def rotate(x: torch.Tensor, context: Context) -> torch.Tensor:
    """Rotates the pairs (x_i, x_{i + K/2}); float32 inside."""
    first, second = x.float().chunk(2, -1)
    cos, sin = context.cos, context.sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
