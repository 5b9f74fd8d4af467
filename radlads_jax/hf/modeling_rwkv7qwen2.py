"""RAD-RWKV7: the generalised delta rule in the place of softmax attention.

r = RoPE(x W_q)     k = RoPE(x W_k)     v' = x W_v     (k and v' repeated to all heads)
iclr = sigmoid(a0 + x a1 a2)            log_w = -exp(-1/2) sigmoid(w0 + tanh(x w1) w2)
v = v' + (v_first - v') sigmoid(v0 + x v1 v2)          v_first: v' of the first recurrent layer
S_t = (diag(w_t) - (kk_t iclr_t) kk_t^T) S_{t-1} + k_t v_t^T     p_t = S_t^T r_t     out = (g p) W_o
balance_state:  kk = k / |k|,          k <- k (1 - w + iclr),         p <- p head_dim^-1/2
otherwise:      kk = k k_k / |k k_k|,  k <- k (1 + (iclr - 1) k_a),   p <- GroupNorm(p) with groupnorm_att
"""

import math

import torch
from torch import nn
from transformers import initialization as init

# Unused here: transformers 5.6 and earlier copy from a directory only the files that this one itself imports.
from .cache_student import StudentCache as StudentCache
from .configuration_rwkv7qwen2 import RWKV7Qwen2Config
from .layers_student import (
    RecurrentMixer,
    chunk_slots,
    forget,
    hide_padding,
    in_float32,
    join_chunks,
    on_gpu,
    run_kernel,
    split_chunks,
    state_before,
)
from .modeling_student import StudentForCausalLM, StudentModel, StudentPreTrainedModel

try:
    from fla.ops.rwkv7 import chunk_rwkv7
except ImportError:
    chunk_rwkv7 = None

LOG_W_BOUND = -math.exp(-0.5)
# Times LOG_W_BOUND, the largest exponent that a chunk's pairs of tokens are taken apart with.
CHUNK_SIZE = 32


@in_float32
def wkv7(r, log_w, k, v, a, b, state, starts=None):
    """All outputs S_t^T r_t [B, T, H, V] of S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T, and the last
    state [B, H, K, V]. starts [B, T]: where S_{t-1} is zero, for a document begins.
    """
    if r.shape[1] == 1:
        return wkv7_step(r, log_w, k, v, a, b, state if starts is None else forget(state, starts[:, 0]))
    if chunk_rwkv7 is not None and on_gpu(r):
        k, v, a, b = (x.to(r.dtype) for x in (k, v, a, b))
        return run_kernel(chunk_rwkv7, (r, log_w.float(), k, v, a, b), state, starts)
    return wkv7_chunked(r, log_w, k, v, a, b, state, starts=starts)


def wkv7_step(r, log_w, k, v, a, b, state):
    """The recurrence for one token."""
    r, log_w, k, v, a, b = (x[:, 0].float() for x in (r, log_w, k, v, a, b))
    removed = a[..., None, :] @ state
    state = torch.addcmul(log_w.exp()[..., None] * state, b[..., None], removed)
    state = torch.addcmul(state, k[..., None], v[..., None, :])
    return (r[..., None, :] @ state).transpose(1, 2), state


def wkv7_chunked(r, log_w, k, v, a, b, state, size: int = CHUNK_SIZE, starts=None):
    """The recurrence as matrix products over chunks of `size` tokens.

    With U the rows a_t^T S_{t-1} of a chunk, U = W S + Y where (I - tril(a b^T, -1)) [W, Y] = [a, tril(a k^T, -1) v],
    each factor times its decay; the state then goes from chunk to chunk by one affine map.
    """
    length, slots = r.shape[1], chunk_slots(starts, size)
    r, log_w, k, v, a, b = (split_chunks(x, size, slots) for x in (r, log_w, k, v, a, b))
    total = log_w.cumsum(-2)
    whole = total[..., -1:, :]
    k_end, b_end = k * (whole - total).exp(), b * (whole - total).exp()
    r, a, k, b = r * total.exp(), a * (total - log_w).exp(), k * (-total).exp(), b * (-total).exp()
    eye = torch.eye(size, device=r.device)
    solved = torch.linalg.solve_triangular(
        eye - (a @ b.mT).tril(-1), torch.cat([a, (a @ k.mT).tril(-1) @ v], -1), upper=False, unitriangular=True
    )
    w, y = solved.split([a.shape[-1], v.shape[-1]], -1)
    kept = torch.diag_embed(whole[..., 0, :].exp()) + b_end.mT @ w
    written = b_end.mT @ y + k_end.mT @ v
    states = []
    for n in range(r.shape[2]):
        state = state_before(state, n, slots)
        states.append(state)
        state = kept[:, :, n] @ state + written[:, :, n]
    before = torch.stack(states, 2)
    out = r @ before + (r @ b.mT).tril() @ (w @ before + y) + (r @ k.mT).tril() @ v
    return join_chunks(out, length, slots), state


def low_rank(width: int, rank: int, size: int) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """The vector and the two matrices of y = vector + f(x first) second."""
    vector, first, second = torch.zeros(1, 1, size), torch.zeros(width, rank), torch.zeros(rank, size)
    return nn.Parameter(vector), nn.Parameter(first), nn.Parameter(second)


class RWKV7Qwen2Mixer(RecurrentMixer):
    """The mixer; r_k belongs to the format and is unused, k_k and k_a are used without balance_state alone."""

    def __init__(self, config: RWKV7Qwen2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        width, size = config.hidden_size, self.heads * self.head_dim
        self.w0, self.w1, self.w2 = low_rank(width, config.lora_rank_decay, size)
        self.a0, self.a1, self.a2 = low_rank(width, config.lora_rank_iclr, size)
        self.v0, self.v1, self.v2 = low_rank(width, config.lora_rank_value_residual_mix, size)
        self.k_k = nn.Parameter(torch.zeros(1, 1, size))
        self.k_a = nn.Parameter(torch.zeros(1, 1, size))
        self.r_k = nn.Parameter(torch.zeros(self.heads, self.head_dim))

    def initialise(self) -> None:
        super().initialise()
        rising = torch.linspace(0, 1, self.w0.shape[-1], device=self.w0.device)
        init.copy_(self.w0, (-6.5 + 5 * rising ** (0.85 + math.sqrt(self.depth()))).view(1, 1, -1))
        init.zeros_(self.a0)
        init.ones_(self.v0)
        for first, second in ((self.w1, self.w2), (self.a1, self.a2), (self.v1, self.v2)):
            init.zeros_(first)
            init.orthogonal_(second, gain=0.1 * max(1.0, math.sqrt(second.shape[0] / second.shape[1])))
        init.constant_(self.k_k, 0.85)
        init.ones_(self.k_a)
        init.zeros_(self.r_k)

    def forward(self, x, v_first, context, cache):
        r, k, v, _ = self.project(x, x, x, context, use_rope=self.config.use_rope)
        out, v_first, state = self.recurrence(x, r, k, v, v_first, context, cache)
        if cache is not None:
            cache.layers[self.layer_idx].store(x.shape[1], wkv=state)
        return self.o_proj(out), v_first

    def recurrence(self, x, r, k, v, v_first, context, cache):
        """Of x's projections r [B, T, H, K] and k, v [B, T, G, K]: what o_proj reads, v_first, the last state."""
        k, v = self.repeat(k), self.repeat(v)
        log_w = self.split(LOG_W_BOUND * torch.sigmoid(self.w0.float() + torch.tanh(x @ self.w1) @ self.w2))
        iclr = self.split(torch.sigmoid(self.a0.float() + x @ self.a1 @ self.a2))
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * self.split(torch.sigmoid(self.v0.float() + x @ self.v1 @ self.v2)).to(v.dtype)
        kk, k = self._keys(k.float(), log_w, iclr)
        a, b, k = (y.to(r.dtype) for y in (-kk, kk * iclr, k))
        log_w, k, b = hide_padding(context.real, log_w, k, b)
        out, state = wkv7(r, log_w, k, v, a, b, self.initial_state(x, cache), context.starts)
        out = out if self.config.groupnorm_att else out * self.head_dim**-0.5
        return self.gated_output(out, x), v_first, state

    def _keys(self, k, log_w, iclr):
        """The removal key, of unit length, and the key that is written, [B, T, H, K] float32."""
        if self.config.balance_state:
            return nn.functional.normalize(k, dim=-1), k * (iclr - torch.expm1(log_w))
        k_k, k_a = self.split(self.k_k.float()), self.split(self.k_a.float())
        return nn.functional.normalize(k * k_k, dim=-1), k * (1 + (iclr - 1) * k_a)


class RWKV7Qwen2PreTrainedModel(StudentPreTrainedModel):
    config_class = RWKV7Qwen2Config
    mixer_class = RWKV7Qwen2Mixer


class RWKV7Qwen2Model(RWKV7Qwen2PreTrainedModel, StudentModel):
    """The decoder without its head."""


class RWKV7Qwen2ForCausalLM(RWKV7Qwen2PreTrainedModel, StudentForCausalLM):
    """The decoder with its head."""

    model_class = RWKV7Qwen2Model
