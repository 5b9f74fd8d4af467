"""Qwen2's decoder around any mixer: what all students share above their layers' parts."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_student import StudentCache
from .configuration_student import StudentConfig
from .layers_student import (
    MLP,
    Context,
    Linear,
    RecurrentMixer,
    RMSNorm,
    SoftmaxAttention,
    document_starts,
    logit_scale,
    rope_tables,
)


class StudentLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: StudentConfig, layer_idx: int, mixer: nn.Module):
        super().__init__()
        self.self_attn = mixer
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, v_first: torch.Tensor | None, context: Context, past_key_values=None):
        out, v_first = self.self_attn(self.input_layernorm(x), v_first, context, past_key_values)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), v_first


class StudentPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation; mixer_class is the mixer of the layers that were converted."""

    config_class: type[StudentConfig] = StudentConfig
    config: StudentConfig
    mixer_class: type[nn.Module]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StudentLayer"]  # noqa: RUF012 (transformers reads lists from the class)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    # Tokens once read cannot be taken back: transformers then refuses to let an assistant model propose some.
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RecurrentMixer):
            module.initialise()


class StudentModel(StudentPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        softmax = config.softmax_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            StudentLayer(config, i, (SoftmaxAttention if i in softmax else self.mixer_class)(config, i))
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """attention_mask [B, tokens read before + T]: 0 where a token is padding, wherever in its row that stands.

        position_ids [B, T]: where they do not grow a document begins, which knows nothing of those before it; from 0 in
        each, where the configuration scales logits by them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("got both or neither of input_ids and inputs_embeds; expected one of them. Give one.")
        if output_attentions:
            raise ValueError("output_attentions is true; recurrent layers have no attention matrix. Leave it out.")
        # Its name since transformers 5.24.
        past_key_values = kwargs.pop("cache", past_key_values)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if past_key_values is None:
            past_key_values = StudentCache(self.config) if use_cache else None
        elif not isinstance(past_key_values, StudentCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; expected the StudentCache that this model "
                "returns. Leave it out with the first tokens."
            )
        context = self._context(x, attention_mask, position_ids, past_key_values)
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [x]
        v_first = None
        for layer in self.layers:
            x, v_first = layer(x, v_first, context, past_key_values=past_key_values)
            if keep_all:
                hidden_states.append(x)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states[:-1], x) if keep_all else None,
        )

    def _context(self, x, attention_mask, position_ids, cache) -> Context:
        length = x.shape[1]
        before = 0 if cache is None else cache.get_seq_length()
        total = before + length
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            if attention_mask.ndim != 2 or attention_mask.shape[1] not in (length, total):
                raise ValueError(
                    f"attention_mask is {list(attention_mask.shape)}; expected [batch, {total}], with the tokens read "
                    "before. Give one entry a token."
                )
            mask = F.pad(attention_mask.bool(), (total - attention_mask.shape[1], 0), value=True)
        real = None if mask is None else mask[:, before:]
        starts = None
        if position_ids is not None:
            starts = document_starts(position_ids.expand(x.shape[0], length), real, before)
        else:
            counted = torch.arange(total, device=x.device)[None] if mask is None else mask.long().cumsum(1) - 1
            if cache is not None and cache.document_start is not None:
                counted = counted.expand(x.shape[0], total)
                counted = counted - counted.gather(1, cache.document_start[:, None])
            position_ids = counted[:, before:].clamp(min=0)
        first_key = None if cache is None else cache.document_start
        pairs = None
        packed = starts is not None or first_key is not None
        if self.config.softmax_layers and (mask is not None or packed or (before and length > 1)):
            keys = torch.arange(total, device=x.device)
            queries = keys[before:, None]
            pairs = keys <= queries
            if mask is not None:
                # A query that is padding sees itself, for a softmax over nothing is not a number.
                pairs = pairs & (mask[:, None, None] | (keys == queries))
            if packed:
                document = torch.zeros(x.shape[:2], device=x.device) if starts is None else starts.cumsum(1)
                # Of tokens read before, those of the last document there are of this call's first.
                earlier = torch.zeros(x.shape[0], 1, device=x.device) if first_key is None else first_key[:, None]
                documents = torch.cat([-1 * (keys[:before] < earlier), document], 1)
                pairs = pairs & (documents[:, None, None] == document[:, None, :, None])
            pairs = pairs.expand(x.shape[0], 1, length, total)
        if cache is not None:
            cache.note_documents(starts, before)
        scale = logit_scale(self.config, position_ids)
        return Context(*rope_tables(self.config, position_ids), real, pairs, starts, scale)


class StudentForCausalLM(StudentPreTrainedModel, GenerationMixin):
    """The decoder with its head; generate() works as with every causal model, with a state in the cache's place."""

    model_class: type[StudentModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: StudentConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # Asked by generate(), which would go by the class's name, and make a DynamicCache where that has no "rwkv".
        return False

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """labels [B, T]: token ids, -100 where nothing is to be predicted; logits_to_keep: of that many last tokens."""
        past_key_values = kwargs.pop("cache", past_key_values)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
