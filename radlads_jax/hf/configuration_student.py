"""The configuration that all students share: Qwen2's keys and the switches of the mixers."""

import math

import transformers

try:
    from transformers import PreTrainedConfig
except ImportError:
    raise ImportError(
        f"this model's files need transformers 5.0 or newer; got {transformers.__version__}. Run: "
        "pip install --upgrade 'transformers>=5'"
    ) from None

ROPE_TYPES = ("default", "linear", "llama3")
GATE_NONE, GATE_FULL, GATE_LOW_RANK = range(3)


class StudentConfig(PreTrainedConfig):
    """A decoder of softmax attention whose attention layers, all or most, are recurrent mixers now.

    use_rope, mixer_qk_norm: whether the recurrent mixers rotate r and k, and norm them where the teacher does not.
    attn_use_rope, attn_output_gate: whether softmax layers rotate q and k, and have a sigmoid gate beside every head's
    query; attn_log_scale: a, where they scale the logits of the query at place t by log(t + a) / log(a).
    gate_rank_type: 0 none, 1 a full matrix, 2 low rank. balance_state, groupnorm_att: the two ways to bound a mixer's
    output, at most one of them on. num_attention_layers: so many last layers are softmax attention; attention_layers:
    their numbers, where they are not the last. A rank of 0 or None is the published one for hidden_size. Raises
    ValueError for what the models lack.
    """

    # A list: Trainer adds one to it.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    has_token_shift = False
    default_gate = GATE_LOW_RANK
    default_group_norm = False

    def __init__(
        self,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=None,
        hidden_act="silu",
        max_position_embeddings=32768,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        use_cache=True,
        rope_parameters=None,
        attention_bias=True,
        attention_output_bias=False,
        qk_norm=None,
        teacher_model_type="qwen2",
        use_rope=False,
        gate_rank_type=None,
        balance_state=None,
        groupnorm_att=None,
        use_tokenshift=None,
        num_attention_layers=0,
        attention_layers=None,
        mixer_qk_norm=False,
        attn_use_rope=True,
        attn_output_gate=False,
        attn_log_scale=None,
        lora_rank_decay=None,
        lora_rank_iclr=None,
        lora_rank_value_residual_mix=None,
        lora_rank_tokenshift=None,
        lora_rank_gate=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.attention_bias = attention_bias
        self.attention_output_bias = attention_output_bias
        self.teacher_model_type = teacher_model_type
        self.qk_norm = teacher_model_type == "qwen3" if qk_norm is None else qk_norm
        self.use_rope = use_rope
        self.gate_rank_type = self.default_gate if gate_rank_type is None else gate_rank_type
        self.groupnorm_att = self.default_group_norm if groupnorm_att is None else groupnorm_att
        self.balance_state = not self.groupnorm_att if balance_state is None else balance_state
        self.use_tokenshift = self.has_token_shift if use_tokenshift is None else use_tokenshift
        self.num_attention_layers = num_attention_layers
        self.attention_layers = attention_layers
        self.mixer_qk_norm = mixer_qk_norm
        self.attn_use_rope = attn_use_rope
        self.attn_output_gate = attn_output_gate
        self.attn_log_scale = attn_log_scale
        self.lora_rank_decay = lora_rank_decay or published_rank(hidden_size, 0.5, 1.8)
        self.lora_rank_iclr = lora_rank_iclr or published_rank(hidden_size, 0.5, 1.8)
        self.lora_rank_value_residual_mix = lora_rank_value_residual_mix or published_rank(hidden_size, 0.5, 1.3)
        self.lora_rank_tokenshift = lora_rank_tokenshift or published_rank(hidden_size, 0.5, 1.8)
        self.lora_rank_gate = lora_rank_gate or published_rank(hidden_size, 0.8, 0.6)
        # Of the teacher's config: it counts all layers as softmax attention.
        kwargs.pop("layer_types", None)
        # The base class puts the older keys rope_theta and rope_scaling in here.
        self.rope_parameters = None if rope_parameters is None else dict(rope_parameters)
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        # Kept at the top level as well: readers of the published format look for it there.
        self.rope_theta = self.rope_parameters["rope_theta"]
        self._refuse_unsupported()

    @property
    def softmax_layers(self) -> list[int]:
        """The numbers of the layers that are softmax attention."""
        if self.attention_layers is not None:
            return sorted(self.attention_layers)
        return list(range(self.num_hidden_layers - self.num_attention_layers, self.num_hidden_layers))

    def _problems(self) -> dict[str, bool]:
        """What the models lack, and whether it is asked for."""
        rope_type = self.rope_parameters.get("rope_type", "default")
        softmax, count = self.softmax_layers, self.num_attention_layers
        return {
            f"hidden_act {self.hidden_act!r} (silu is)": self.hidden_act != "silu",
            f"rope_type {rope_type!r} ({', '.join(ROPE_TYPES)} are)": rope_type not in ROPE_TYPES,
            "partial_rotary_factor other than 1": self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0,
            f"gate_rank_type {self.gate_rank_type} (0, 1 and 2 are)": self.gate_rank_type not in (0, 1, 2),
            "balance_state together with groupnorm_att": self.balance_state and self.groupnorm_att,
            f"use_tokenshift in {self.model_type}": self.use_tokenshift and not self.has_token_shift,
            f"attn_log_scale {self.attn_log_scale} (numbers from 2 on are)": bool(
                self.attn_log_scale is not None and not 2 <= self.attn_log_scale < math.inf
            ),
            "use_sliding_window": bool(getattr(self, "use_sliding_window", False)),
            "mlp_bias": bool(getattr(self, "mlp_bias", False)),
            f"attention_layers {softmax} outside the {self.num_hidden_layers} layers": any(
                not 0 <= i < self.num_hidden_layers for i in softmax
            ),
            f"attention_layers {softmax} that are not the last {count}": bool(
                count and softmax != list(range(self.num_hidden_layers - count, self.num_hidden_layers))
            ),
        }

    def _refuse_unsupported(self) -> None:
        asked = [problem for problem, present in self._problems().items() if present]
        if asked:
            raise ValueError(
                f"this {self.model_type} configuration asks for what is not supported: {'; '.join(asked)}. Correct "
                "config.json, or choose another checkpoint."
            )


def published_rank(hidden_size: int, exponent: float, multiplier: float) -> int:
    """Rank of a low-rank matrix: max(1, round(hidden_size^exponent multiplier / 32)) 32."""
    return max(1, round(math.pow(hidden_size, exponent) * multiplier / 32)) * 32
