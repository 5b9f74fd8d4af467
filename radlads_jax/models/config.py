"""What a model is made of: the dimensions of a teacher and the mixer of every layer of a student.

Source: the families' config.json on the Hugging Face hub; RADLADS (arXiv 2505.03005) section 3 for the students.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

_Layer = TypeVar("_Layer")
# The mixer of teachers, and of the layers that a hybrid keeps; all others are recurrent.
SOFTMAX = "attention"
# log(a) divides, and is above 0.
LEAST_LOG_SCALE = 2.0


def runs_of(layers: Iterable[_Layer]) -> tuple[tuple[_Layer, int], ...]:
    """Layers that are alike and follow one another, as (one of them, how many): of mixers, a model's stacks."""
    return tuple((layer, len(list(run))) for layer, run in itertools.groupby(layers))


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequencies changed for longer contexts: kind "linear" (factor only) or "llama3" (all four fields)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class KeptAttention:
    """What the softmax layers that a hybrid keeps have other than its teacher's.

    rope: whether q and k are turned. log_scale: a of the factor log(t + a) / log(a) that a query's logits have at
    inference, t its place in its segment; 0: none. output_gate: every head's query has a gate beside it, as in Qwen3.5.
    """

    rope: bool = True
    log_scale: float = 0.0
    output_gate: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Dimensions and switches of one Decoder.

    stacks: runs of layers with the same mixer, in order, as (mixer, number of layers); each run is one scanned stack.
    zero_centred_norms: a norm multiplies by 1 + its scale. output_gate: of softmax layers, whose q gives every head's
    query and gate. rotary_size: how many of a head's channels RoPE turns, the first ones; None: all.
    mixer: the recurrent mixers' options (MixerSpec.options); None where every layer is softmax attention.
    kept_attention: of a student, what its softmax layers have other than the teacher's; None: nothing.
    copied: of a student, the stacks whose recurrent layers are its teacher's own, not converted ones.
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
    kept_attention: KeptAttention | None = None
    # Not shown: the stacks of both models tell it, and plans are kept under what is.
    copied: tuple[int, ...] = dataclasses.field(default=(), repr=False)
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

    def is_converted(self, stack: int) -> bool:
        """Whether the layers of this stack are a student's converted ones: neither softmax attention nor copied."""
        return self.stacks[stack][0] != SOFTMAX and stack not in self.copied

    def is_changed(self, stack: int) -> bool:
        """Whether the layers of this stack have another mixer than the teacher's: converted ones, and softmax layers
        that have what the teacher's have not."""
        is_kept = self.stacks[stack][0] == SOFTMAX
        return self.kept_attention is not None if is_kept else self.is_converted(stack)

    def is_aligned(self, stack: int) -> bool:
        """Whether the mixers of this stack begin as others than the teacher's, and have to come near to them first: the
        converted ones, and softmax attention without its RoPE. A gate alone begins as the teacher."""
        kept = self.kept_attention
        return self.is_changed(stack) and (self.is_converted(stack) or (kept is not None and not kept.rope))

    @property
    def softmax_layers(self) -> tuple[int, ...]:
        """The numbers of the layers of softmax attention."""
        return tuple(i for i, mixer in enumerate(self.layer_mixers) if mixer == SOFTMAX)

    @property
    def converted_layers(self) -> tuple[int, ...]:
        """The numbers of a student's converted layers."""
        return self._layers_where(self.is_converted)

    @property
    def aligned_layers(self) -> tuple[int, ...]:
        """The numbers of the layers that `is_aligned`."""
        return self._layers_where(self.is_aligned)

    def _layers_where(self, holds: Callable[[int], bool]) -> tuple[int, ...]:
        runs = zip(self.stack_starts, self.stacks, strict=True)
        return tuple(i for s, (start, (_, n)) in enumerate(runs) if holds(s) for i in range(start, start + n))

    @property
    def recurrent_mixer(self) -> str | None:
        """The recurrent mixer's name, None for a model of softmax attention alone."""
        return next((m for m in self.layer_mixers if m != SOFTMAX), None)

    def in_training(self) -> "ModelConfig":
        """The same model as it is trained: logits are scaled at inference alone."""
        kept = self.kept_attention
        if kept is None or not kept.log_scale:
            return self
        return dataclasses.replace(self, kept_attention=dataclasses.replace(kept, log_scale=0.0))

    def as_student(self, mixer: str, options: Any, attention_layers: tuple[int, ...] = ()) -> "ModelConfig":
        """The student of this teacher: `mixer` everywhere but in attention_layers (layer numbers); heads untied.

        options: of the mixer. A teacher's own recurrent layers, which have this mixer, are copied. Raises ValueError
        for layer numbers outside the model, or of layers that are not softmax attention in the teacher.
        """
        outside = [i for i in attention_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"config.student.attention_layers holds {outside}, but the teacher's layers are 0 to "
                f"{self.num_layers - 1}."
            )
        self._require_softmax(attention_layers)
        assert self.recurrent_mixer in (None, mixer), "one model has one recurrent mixer"
        pairs = [(SOFTMAX if i in attention_layers else mixer, own) for i, own in enumerate(self.layer_mixers)]
        runs = runs_of(pairs)
        return dataclasses.replace(
            self,
            stacks=tuple((name, n) for (name, _), n in runs),
            mixer=options if any(name != SOFTMAX for name, _ in pairs) else None,
            copied=tuple(i for i, ((_, own), _) in enumerate(runs) if own != SOFTMAX),
            tie_embeddings=False,
        )

    def _require_softmax(self, layers: tuple[int, ...]) -> None:
        softmax = self.softmax_layers
        if others := [i for i in layers if i not in softmax]:
            raise ValueError(
                f"softmax attention is to stay in the layers {', '.join(map(str, layers))}, but the teacher has it in "
                f"{', '.join(map(str, softmax)) or 'none'} alone; layer {others[0]} is {self.layer_mixers[others[0]]} "
                "already, which is copied as it is. Expected layers out of these, or none: change "
                "config.student.attention_layers or config.student.attention_every."
            )

    def as_teacher_of(self, student: "ModelConfig") -> "ModelConfig":
        """This model cut into stacks at the student's boundaries too, so that both are scanned side by side."""
        of_student = (stack for stack, (_, n) in enumerate(student.stacks) for _ in range(n))
        runs = runs_of(zip(self.layer_mixers, of_student, strict=False))
        return dataclasses.replace(self, stacks=tuple((own, n) for (own, _), n in runs))
