"""RAD-RWKV7 behind a window: softmax attention to the first and the latest keys, the recurrence for all others.

near_t = softmax over the keys in sight (modeling_windowqwen2.py) of q = r, k, v, which both have
far = g p of modeling_rwkv7qwen2.py     m = sigmoid(x share), one number a head     out = ((1 - m) near + far) W_o
"""

import torch
from transformers import initialization as init

# Unused here: transformers 5.6 and earlier copy from a directory only the files that this one itself imports.
from .cache_student import StudentCache as StudentCache
from .configuration_windowrwkv7qwen2 import WindowRWKV7Qwen2Config
from .layers_student import Linear
from .modeling_rwkv7qwen2 import RWKV7Qwen2Mixer
from .modeling_student import StudentForCausalLM, StudentModel, StudentPreTrainedModel
from .modeling_windowqwen2 import window_attention

# The share of the recurrence at the start: of sigmoid, 1.8%.
QUIET = -4.0


class WindowRWKV7Qwen2Mixer(RWKV7Qwen2Mixer):
    """The mixer; what it has beside RAD-RWKV7's parameters is share."""

    config: WindowRWKV7Qwen2Config

    def __init__(self, config: WindowRWKV7Qwen2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.share = Linear(config.hidden_size, self.heads)

    def initialise(self) -> None:
        super().initialise()
        init.zeros_(self.share.weight)
        init.constant_(self.share.bias, QUIET)
        init.zeros_(self.g2)

    def forward(self, x, v_first, context, cache):
        r, k, v, _ = self.project(x, x, x, context, use_rope=True)
        layer = None if cache is None else cache.layers[self.layer_idx]
        near, kept = window_attention(self.config, r, k, v, context, {} if layer is None else layer.state)
        far, v_first, wkv = self.recurrence(x, r, k, v, v_first, context, cache)
        if layer is not None:
            layer.store(x.shape[1], wkv=wkv, **kept)
        share = torch.sigmoid(self.share(x).float())[..., None].to(near.dtype)
        return self.o_proj((near * (1 - share)).flatten(2) + far), v_first


class WindowRWKV7Qwen2PreTrainedModel(StudentPreTrainedModel):
    config_class = WindowRWKV7Qwen2Config
    mixer_class = WindowRWKV7Qwen2Mixer


class WindowRWKV7Qwen2Model(WindowRWKV7Qwen2PreTrainedModel, StudentModel):
    """The decoder without its head."""


class WindowRWKV7Qwen2ForCausalLM(WindowRWKV7Qwen2PreTrainedModel, StudentForCausalLM):
    """The decoder with its head."""

    model_class = WindowRWKV7Qwen2Model
