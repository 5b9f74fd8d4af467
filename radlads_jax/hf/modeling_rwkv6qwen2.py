"""RAD-RWKV6: gated linear attention with a decay for every channel in the place of softmax attention.

s = x_{t-1} - x_t     z = x + s time_maa_x     m = tanh(z time_maa_w1), five streams, each times its time_maa_w2
x_i = x + s (time_maa_i + m_i)                 r = x_r W_q     k~ = x_k W_k     v = x_v W_v     (repeated to all heads)
log_w = max(-exp(time_decay + tanh(x_w time_decay_w1) time_decay_w2), -5)     k = k~ (1 - w)    g = sigmoid(x_g W_gate)
S_t = diag(w_t) S_{t-1} + k_t v_t^T            p_t = head_dim^-1/2 S_t^T r_t  out = (g p) W_o
"""

import torch
from torch import nn
from transformers import initialization as init

# Unused here: transformers 5.6 and earlier copy from a directory only the files that this one itself imports.
from .cache_student import StudentCache as StudentCache
from .configuration_rwkv6qwen2 import RWKV6Qwen2Config
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
    from fla.ops.gla import chunk_gla
except ImportError:
    chunk_gla = None

LOG_W_MIN = -5.0
STREAMS = "rkvwg"
# Half of it times LOG_W_MIN is the largest exponent that a chunk's pairs of tokens are taken apart with.
CHUNK_SIZE = 16


@in_float32
def wkv6(r, log_w, k, v, state, starts=None):
    """All outputs S_t^T r_t [B, T, H, V] of S_t = diag(w_t) S_{t-1} + k_t v_t^T, and the last state [B, H, K, V].

    starts [B, T]: where S_{t-1} is zero, for a document begins.
    """
    if r.shape[1] == 1:
        return wkv6_step(r, log_w, k, v, state if starts is None else forget(state, starts[:, 0]))
    if chunk_gla is not None and on_gpu(r):
        return run_kernel(chunk_gla, (r, k.to(r.dtype), v.to(r.dtype), log_w.float()), state, starts)
    return wkv6_chunked(r, log_w, k, v, state, starts=starts)


def wkv6_step(r, log_w, k, v, state):
    """The recurrence for one token."""
    r, log_w, k, v = (x[:, 0].float() for x in (r, log_w, k, v))
    state = torch.addcmul(log_w.exp()[..., None] * state, k[..., None], v[..., None, :])
    return (r[..., None, :] @ state).transpose(1, 2), state


def wkv6_chunked(r, log_w, k, v, state, size: int = CHUNK_SIZE, starts=None):
    """The recurrence as matrix products over chunks of `size` tokens, one state a chunk.

    e^(sum of log_w from j to i) is split into a factor of i and one of j, both counted from the chunk's middle.
    """
    length, slots = r.shape[1], chunk_slots(starts, size)
    r, log_w, k, v = (split_chunks(x, size, slots) for x in (r, log_w, k, v))
    ones = torch.ones(size, size, device=r.device)
    until, after = ones.tril(), ones.triu(1)
    centred = until - until[size // 2]
    from_middle, from_start, to_end = (m @ log_w for m in (centred, until, after))
    inner = ((r * from_middle.exp()) @ (k * (-from_middle).exp()).mT).tril()
    written = (k * to_end.exp()).mT @ v
    kept = from_start[..., -1, :, None].exp()
    states = []
    for n in range(r.shape[2]):
        state = state_before(state, n, slots)
        states.append(state)
        state = torch.addcmul(written[:, :, n], kept[:, :, n], state)
    out = (r * from_start.exp()) @ torch.stack(states, 2) + inner @ v
    return join_chunks(out, length, slots), state


def previous_inputs(x, before, real, starts=None):
    """The last real input before every token, [B, T, D], zero where a document starts, and the last of all, [B, D].

    `before` precedes the first.
    """
    joined = torch.cat([before[:, None], x], 1)
    if starts is not None:
        previous, last = previous_inputs(x, before, real)
        return previous.masked_fill(starts[..., None], 0), last
    if real is None:
        return joined[:, :-1], joined[:, -1]
    counted = torch.arange(1, x.shape[1] + 1, device=x.device)
    latest = nn.functional.pad((real * counted).cummax(1).values, (1, 0))
    previous = joined.gather(1, latest[..., None].expand_as(joined))
    return previous[:, :-1], previous[:, -1]


class RWKV6Qwen2Mixer(RecurrentMixer):
    """The mixer."""

    def __init__(self, config: RWKV6Qwen2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        width, size = config.hidden_size, self.heads * self.head_dim
        if config.use_tokenshift:
            self.time_maa_x = nn.Parameter(torch.zeros(1, 1, width))
            for name in STREAMS:
                setattr(self, f"time_maa_{name}", nn.Parameter(torch.zeros(1, 1, width)))
            rank = config.lora_rank_tokenshift
            self.time_maa_w1 = nn.Parameter(torch.zeros(width, len(STREAMS) * rank))
            self.time_maa_w2 = nn.Parameter(torch.zeros(len(STREAMS), rank, width))
        self.time_decay = nn.Parameter(torch.zeros(1, 1, size))
        self.time_decay_w1 = nn.Parameter(torch.zeros(width, config.lora_rank_decay))
        self.time_decay_w2 = nn.Parameter(torch.zeros(config.lora_rank_decay, size))

    def initialise(self) -> None:
        super().initialise()
        if self.config.use_tokenshift:
            init.ones_(self.time_maa_x)
            for stream in STREAMS:
                init.zeros_(getattr(self, f"time_maa_{stream}"))
            init.zeros_(self.time_maa_w1)
            init.uniform_(self.time_maa_w2, -0.01, 0.01)
        rising = torch.linspace(0, 1, self.time_decay.shape[-1], device=self.time_decay.device)
        init.copy_(self.time_decay, (-6 + 5 * rising ** (0.7 + 1.3 * self.depth())).view(1, 1, -1))
        init.zeros_(self.time_decay_w1)
        init.uniform_(self.time_decay_w2, -0.01, 0.01)

    def forward(self, x, v_first, context, cache):
        x_r = x_k = x_v = x_w = x_g = x
        shifted = {}
        if self.config.use_tokenshift:
            (x_r, x_k, x_v, x_w, x_g), shifted["last_input"] = self._shifted(x, context, cache)
        r, k, v, _ = self.project(x_r, x_k, x_v, context, use_rope=self.config.use_rope)
        k, v = self.repeat(k), self.repeat(v)
        decay = self.time_decay.float() + torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        log_w = self.split(torch.clamp(-torch.exp(decay), min=LOG_W_MIN))
        if self.config.balance_state:
            k = (k * -torch.expm1(log_w)).to(r.dtype)
        log_w, k = hide_padding(context.real, log_w, k)
        out, state = wkv6(r, log_w, k, v, self.initial_state(x, cache), context.starts)
        if cache is not None:
            cache.layers[self.layer_idx].store(x.shape[1], wkv=state, **shifted)
        return self.o_proj(self.gated_output(out * self.head_dim**-0.5, x_g)), v_first

    def _shifted(self, x, context, cache):
        """The five mixes of every token with the one before it, in the order r, k, v, w, g, and the last input."""
        state = {} if cache is None else cache.layers[self.layer_idx].state
        before = state["last_input"] if state else torch.zeros_like(x[:, 0])
        previous, last = previous_inputs(x, before, context.real, context.starts)
        s = previous - x
        streams = torch.tanh((x + s * self.time_maa_x) @ self.time_maa_w1).chunk(len(STREAMS), -1)
        lerps = (getattr(self, f"time_maa_{name}") for name in STREAMS)
        mixes = [lerp + m @ b for lerp, m, b in zip(lerps, streams, self.time_maa_w2, strict=True)]
        return [x + s * mix for mix in mixes], last


class RWKV6Qwen2PreTrainedModel(StudentPreTrainedModel):
    config_class = RWKV6Qwen2Config
    mixer_class = RWKV6Qwen2Mixer


class RWKV6Qwen2Model(RWKV6Qwen2PreTrainedModel, StudentModel):
    """The decoder without its head."""


class RWKV6Qwen2ForCausalLM(RWKV6Qwen2PreTrainedModel, StudentForCausalLM):
    """The decoder with its head."""

    model_class = RWKV6Qwen2Model
