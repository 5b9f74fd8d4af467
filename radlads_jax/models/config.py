"""What a model is made of: the dimensions of a teacher and the mixer of every layer of a student.

Source: the families' config.json on the Hugging Face hub; RADLADS (arXiv 2505.03005) section 3 for the students.
"""

import dataclasses
import itertools
from typing import Any

# The mixer of teachers, and of the layers that a hybrid keeps; all others are recurrent.
SOFTMAX = "attention"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequencies changed for longer contexts: kind "linear" (factor only) or "llama3" (all four fields)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions and switches of one Decoder.

    stacks: runs of layers with the same mixer, in order, as (mixer, number of layers); each run is one scanned stack.
    zero_centred_norms: a norm multiplies by 1 + its scale. output_gate: of softmax layers, whose q gives every head's
    query and gate. rotary_size: how many of a head's channels RoPE turns, the first ones; None: all.
    mixer: the recurrent mixers' options (MixerSpec.options); None where every layer is softmax attention.
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
    zero_centred_norms: bool = False
    output_gate: bool = False
    rotary_size: int | None = None
    tie_embeddings: bool = False
    mixer: Any = None
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
        return next((i for i, m in enumerate(self.layer_mixers) if m != SOFTMAX), self.num_layers)

    def is_recurrent(self, stack: int) -> bool:
        """Whether the layers of this stack are converted, and not softmax attention."""
        return self.stacks[stack][0] != SOFTMAX

    @property
    def recurrent_mixer(self) -> str | None:
        """The recurrent mixer's name, None for a model of softmax attention alone."""
        return next((m for m in self.layer_mixers if m != SOFTMAX), None)

    def as_student(self, mixer: str, options: Any, attention_layers: tuple[int, ...] = ()) -> "ModelConfig":
        """The student of this teacher: `mixer` everywhere but in attention_layers (layer numbers); heads untied.

        options: of the mixer. Raises ValueError for layer numbers outside the model.
        """
        outside = [i for i in attention_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"student.attention_layers holds {outside}, but the teacher's layers are 0 to {self.num_layers - 1}."
            )
        names = [SOFTMAX if i in attention_layers else mixer for i in range(self.num_layers)]
        stacks = tuple((name, len(list(run))) for name, run in itertools.groupby(names))
        options = options if any(n != SOFTMAX for n in names) else None
        return dataclasses.replace(self, stacks=stacks, mixer=options, tie_embeddings=False)

    def as_teacher_of(self, student: "ModelConfig") -> "ModelConfig":
        """This softmax model cut into stacks at the student's boundaries, so that both are scanned side by side."""
        return dataclasses.replace(self, stacks=tuple((SOFTMAX, n) for _, n in student.stacks))
