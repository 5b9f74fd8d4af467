"""What a model is made of: the dimensions of a teacher and the mixer of every layer of a student.

Source: the families' config.json on the Hugging Face hub; RADLADS (arXiv 2505.03005) section 3 for the students.
"""

import dataclasses
import itertools
import math

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
MIXER_NAMES = ("attention", "rad_rwkv6", "rad_rwkv7")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequencies changed for longer contexts: kind "linear" (factor only) or "llama3" (all four fields)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Switches and low-rank sizes of a recurrent mixer; the defaults of `for_student` are the paper's.

    gate: "none", "full" (a sigmoid of a full-rank map) or "low_rank". balance_state and group_norm are the two ways to
    bound the output: with balance_state keys are scaled by the decay and the output by head_dim^-0.5 (RAD-RWKV7
    variant A), with group_norm the output is normalised per head (variant B).
    """

    use_rope: bool
    token_shift: bool
    gate: str
    balance_state: bool
    group_norm: bool
    rank_decay: int
    rank_iclr: int
    rank_value: int
    rank_shift: int
    rank_gate: int

    def __post_init__(self):
        if self.balance_state and self.group_norm:
            raise ValueError(
                "student.balance_state and student.group_norm are both on, but they are two answers to one question "
                "(how the size of the state is bounded). Turn one of them off: balance_state is the paper's default, "
                "group_norm the older variant."
            )
        if self.gate not in ("none", "full", "low_rank"):
            raise ValueError(f"student.gate is {self.gate!r}; expected 'none', 'full' or 'low_rank'.")

    @classmethod
    def for_student(cls, mixer: str, hidden_size: int, **overrides) -> "MixerConfig":
        """The published student of this width; overrides that are not None (or rank 0) replace its fields."""
        is_rwkv7 = mixer == "rad_rwkv7"
        defaults = {
            "use_rope": is_rwkv7,
            "token_shift": not is_rwkv7,
            "gate": "low_rank" if is_rwkv7 else "full",
            "balance_state": True,
            "group_norm": False,
            "rank_decay": low_rank(hidden_size, 0.5, 1.8),
            "rank_iclr": low_rank(hidden_size, 0.5, 1.8),
            "rank_value": low_rank(hidden_size, 0.5, 1.3),
            "rank_shift": low_rank(hidden_size, 0.5, 1.8),
            "rank_gate": low_rank(hidden_size, 0.8, 0.6),
        }
        given = {k: v for k, v in overrides.items() if v is not None and not (k.startswith("rank_") and v == 0)}
        return cls(**(defaults | given))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions and switches of one Decoder.

    stacks: runs of layers with the same mixer, in order, as (mixer, number of layers); each run is one scanned stack.
    mixer: the recurrent mixers' switches; None where every layer is softmax attention.
    dtype: of activations and matmuls ("float32" or "bfloat16"); norms, softmax and recurrence stay float32.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    stacks: tuple[tuple[str, int], ...]
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 32768
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    mixer: MixerConfig | None = None
    dtype: str = "float32"
    param_dtype: str = "float32"

    @property
    def num_layers(self) -> int:
        return sum(n for _, n in self.stacks)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer's name of every layer."""
        return tuple(itertools.chain.from_iterable((mixer,) * n for mixer, n in self.stacks))

    @property
    def stack_starts(self) -> tuple[int, ...]:
        """The first layer's number of every stack."""
        return tuple(itertools.accumulate((n for _, n in self.stacks[:-1]), initial=0))

    @property
    def first_recurrent_layer(self) -> int:
        """The layer whose values are the value residual's v_first; num_layers where there is none."""
        return next((i for i, m in enumerate(self.layer_mixers) if m != "attention"), self.num_layers)

    @property
    def recurrent_mixer(self) -> str | None:
        """The recurrent mixer's name, None for a model of softmax attention alone."""
        return next((m for m in self.layer_mixers if m != "attention"), None)

    def as_student(self, mixer: str, mixer_config: MixerConfig | None, attention_layers: tuple[int, ...] = ()):
        """The student of this teacher: `mixer` everywhere but in attention_layers (layer numbers); heads untied.

        Raises ValueError for an unknown mixer or layer numbers outside the model.
        """
        if mixer not in MIXER_NAMES:
            raise ValueError(f"student.mixer is {mixer!r}; expected one of {', '.join(MIXER_NAMES)}.")
        outside = [i for i in attention_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"student.attention_layers holds {outside}, but the teacher's layers are 0 to {self.num_layers - 1}."
            )
        names = ["attention" if i in attention_layers else mixer for i in range(self.num_layers)]
        stacks = tuple((name, len(list(run))) for name, run in itertools.groupby(names))
        mixer_config = mixer_config if any(n != "attention" for n in names) else None
        return dataclasses.replace(self, stacks=stacks, mixer=mixer_config, tie_embeddings=False)

    def as_teacher_of(self, student: "ModelConfig") -> "ModelConfig":
        """This softmax model cut into stacks at the student's boundaries, so that both are scanned side by side."""
        return dataclasses.replace(self, stacks=tuple(("attention", n) for _, n in student.stacks))


def low_rank(hidden_size: int, exponent: float, multiplier: float) -> int:
    """Rank of a low-rank matrix, a multiple of 32: max(1, round(D^e m / 32)) * 32 (RADLADS section 3)."""
    return max(1, round(math.pow(hidden_size, exponent) * multiplier / 32)) * 32
