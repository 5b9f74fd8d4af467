"""Sliding-window attention with sinks: softmax attention to a document's first keys and to the latest ones.

out_t = W_o sum_j softmax_j(q_t k_j^T K^-1/2) v_j     over j <= t with t - j < attention_window or j < attention_sinks
t and j are places in the document, counted over its real tokens; RoPE is at the tokens' own positions.
"""

import torch
import torch.nn.functional as F

# Unused here: transformers 5.6 and earlier copy from a directory only the files that this one itself imports.
from .cache_student import StudentCache as StudentCache
from .configuration_windowqwen2 import WindowQwen2Config
from .layers_student import Context, Projections
from .modeling_student import StudentForCausalLM, StudentModel, StudentPreTrainedModel

# The least and the most queries that are scored at once, each against its block's keys and those that are kept.
BLOCKS = (128, 512)


def window_attention(config: WindowQwen2Config, q, k, v, context: Context, state: dict[str, torch.Tensor]):
    """softmax(q k^T K^-1/2) v [B, T, H, K] over the keys in sight, and what is kept after the last token.

    q [B, T, H, K]; k, v [B, T, G, K]. Block after block, so that time and memory are linear in T.
    state: {} before the first token; then, of every row's last document, the keys and values [B, S, G, K] that tokens
    to come see, at most attention_sinks + attention_window - 1 whatever the length, their places [B, S], -1 where there
    is none, and the number of its tokens, seen [B].
    """
    rows, length = q.shape[:2]
    none = torch.zeros(rows, length, dtype=torch.bool, device=q.device)
    real = ~none if context.real is None else context.real
    starts = none if context.starts is None else context.starts
    if not state:
        places = torch.zeros(rows, 0, dtype=torch.long, device=q.device)
        state = {"k": k[:, :0], "v": v[:, :0], "places": places, "seen": places.sum(1)}
    size = min(max(config.attention_window, BLOCKS[0]), BLOCKS[1])
    outs = []
    for block in zip(*(x.split(size, 1) for x in (q, k, v, real, starts)), strict=True):
        out, state = attend_block(config, state, *block)
        outs.append(out)
    return torch.cat(outs, 1), state


def attend_block(config: WindowQwen2Config, state: dict[str, torch.Tensor], q, k, v, real, starts):
    """As window_attention, of one block; real, starts [B, T] as Context has them."""
    sinks, window = config.attention_sinks, config.attention_window
    # Of padding, the place of the token before it.
    counted = real.cumsum(1) - 1
    places = counted - torch.where(starts, counted, -state["seen"][:, None]).cummax(1).values
    documents = starts.cumsum(1)

    k, v = torch.cat([state["k"], k], 1), torch.cat([state["v"], v], 1)
    before = state["k"].shape[1]
    key_places = torch.cat([state["places"], places.where(real, -1)], 1)
    # What is kept is of the document that goes on.
    key_documents = F.pad(documents, (before, 0))
    t, j = places[:, :, None], key_places[:, None]
    own = documents[:, :, None] == key_documents[:, None]
    visible = own & (j >= 0) & (j <= t) & ((t - j < window) | (j < sinks))
    # A query that is padding sees itself, for a softmax over nothing is not a number.
    numbers = torch.arange(k.shape[1], device=k.device)
    visible = visible | (numbers == numbers[before:, None])
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    is_grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], enable_gqa=is_grouped)

    seen = places[:, -1] + 1
    near = (key_places > seen[:, None] - window) | (key_places < sinks)
    kept = (key_documents == documents[:, -1:]) & (key_places >= 0) & near
    key_places = key_places.where(kept, -1)
    # The kept ones first; a row with fewer than there is room for has others behind them, without a place.
    at = kept.int().argsort(dim=1, descending=True, stable=True)[:, : sinks + window - 1]
    row = torch.arange(len(at), device=at.device)[:, None]
    return out.transpose(1, 2), {"k": k[row, at], "v": v[row, at], "places": key_places[row, at], "seen": seen}


class WindowQwen2Mixer(Projections):
    """The mixer, of softmax attention's parameters alone."""

    config: WindowQwen2Config

    def __init__(self, config: WindowQwen2Config, layer_idx: int):
        super().__init__(config, layer_idx, normed=config.qk_norm)

    def forward(self, x, v_first, context, cache):
        q, k, v, _ = self.project(x, x, x, context, use_rope=True)
        layer = None if cache is None else cache.layers[self.layer_idx]
        out, kept = window_attention(self.config, q, k, v, context, {} if layer is None else layer.state)
        if layer is not None:
            layer.store(x.shape[1], **kept)
        return self.o_proj(out.flatten(2)), v_first


class WindowQwen2PreTrainedModel(StudentPreTrainedModel):
    config_class = WindowQwen2Config
    mixer_class = WindowQwen2Mixer


class WindowQwen2Model(WindowQwen2PreTrainedModel, StudentModel):
    """The decoder without its head."""


class WindowQwen2ForCausalLM(WindowQwen2PreTrainedModel, StudentForCausalLM):
    """The decoder with its head."""

    model_class = WindowQwen2Model
