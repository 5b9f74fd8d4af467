"""What the rest of the house asks of a mixer: one MixerSpec a mixer, at the end of the mixer's file.

decoder, decoding state, placement over a mesh, names on disk, config.json, model card, preflight, planning and report
read it; none of them names a mixer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sharded import Axes
from radlads_jax.fields import typed
from radlads_jax.models.config import ModelConfig

Layout = Literal["same", "transposed", "vector"]
# Torch files for transformers' remote code: they are copied into an export, and never imported here.
_TORCH_FILES = Path(__file__).parent.parent / "hf"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of one layer (or of the model), here and on disk.

    path: of the parameter, joined with slashes. name: on disk. shape: here, without the stack's axis and without the
    axis that `row` selects where several tensors on disk are the rows of one parameter. layout: on disk "same",
    "transposed" ([out, in]) or "vector" ([1, 1, d]).

    axes: of the mesh, for each of the parameter's dimensions but the stack's. split_by: what the axis `tensor` cuts it
    by where it is used, "heads", "kv_heads" or "width"; where it does not divide their number, and for "nothing", every
    device of the axis uses all of it.
    multiplies: as a matrix, the mixer's own "input" or something "inner"; "" for what is none.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    layout: Layout = "same"
    row: int | None = None
    axes: tuple[Axes, ...] = ()
    split_by: Literal["heads", "kv_heads", "width", "nothing"] = "heads"
    multiplies: Literal["", "input", "inner"] = ""


@dataclasses.dataclass(frozen=True)
class StateArray:
    """An array of one layer's decoding state, batch leading. axes: of the mesh, for each dimension.

    by_position: it holds something of every token read (keys, values), which is masked by segments; all else is set to
    zero where a sequence's segment ends.
    """

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    axes: tuple[Axes, ...] = ()
    by_position: bool = False


@dataclasses.dataclass(frozen=True)
class Operator:
    """The recurrence that a mixer runs: its implementations by name, as pallas_kernels.dispatch takes them.

    cycles: of a v6e, for a token and 128 columns of the first result, by the name of a kernel in the compiled program
    (`python -m pallas_kernels.static_cost` at B=1 T=8192 H=16 K=128, bfloat16).
    """

    name: str
    implementations: Mapping[str, Callable[..., Any]]
    cycles: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PublishedFormat:
    """How config.json says that a model has this mixer.

    read(keys, hidden_size) -> options, from a porting.config_keys.ConfigKeys; write(options) -> keys. architecture:
    the class of its causal language model. files: the torch files that an export carries, which hold that class.
    """

    model_type: str
    architecture: str
    read: Callable[[Any, int], Any]
    write: Callable[[Any], dict[str, Any]]
    files: tuple[Path, ...] = ()


class TeacherStatistics(NamedTuple):
    """What a stack's attention layers do on a few thousand tokens, layers leading; float32.

    look_back: tokens between a query and its keys, on average; entropy: of its keys, nats; both without the segment's
    first keys. output_rms: of what o reads, by head. constant: x @ constant is nearest to 1 for what the mixer reads.
    """

    look_back: Float[Array, "L H"]
    entropy: Float[Array, "L H"]
    output_rms: Float[Array, "L H"]
    constant: Float[Array, "L D"]


class LayerOutputs(NamedTuple):
    """What one layer's attention and its mixer give for the same inputs, float32.

    attention, mixer: what o reads, heads side by side; target: attention's o of it, without the bias; counted: 1, or 0
    for padding.
    """

    attention: Float[Array, "B T d"]
    mixer: Float[Array, "B T d"]
    target: Float[Array, "B T D"]
    counted: Float[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One part of a mixer's start by its teacher: (cfg, fresh parameters, what was seen) -> those that change.

    of_attention: of a stack's parameters, with its axis, and TeacherStatistics. of_outputs: of one layer's and its
    LayerOutputs, when all parts of the first kind are there. needs: parts of which one has to come with it. replaces:
    the mixer's options of a start that it overwrites.
    """

    of_attention: Callable[[ModelConfig, dict[str, Any], TeacherStatistics], dict[str, Any]] | None = None
    of_outputs: Callable[[ModelConfig, dict[str, Any], LayerOutputs], dict[str, Any]] | None = None
    needs: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """A mixer.

    module: (cfg, layer_id, rngs=) -> an nnx.Module whose call is (x, context, layer_id, state) -> (out, state).
    options: a frozen dataclass, with the rules between its fields, whose classmethod for_width(hidden_size) gives the
    published ones; None where there are none to choose. It is found as cfg.mixer.
    tensors(cfg), state(cfg, batch, max_length): its parameters and its decoding state, by name.
    flops(cfg, seq_len): of a token's forward pass through scores or states, beside the matrices.
    bytes_per_column: that a step's backward pass holds for each token and column of r (planning.memory); columns(cfg):
    how many those are.
    shares_values: later layers find as context.v_first what the first recurrent one's first_values(x) [B, T, d] gives.
    calibrations(cfg): by name, the parts that may begin as the teacher says. calibrated: those that
    config.student.init=calibrated takes, as far as they are there, unless told which.
    obstacles(cfg): why it can not begin from a teacher's softmax layers of these dimensions, by what these have.
    adopt(cfg, parameters of a stack of the teacher's layers) -> those of its own that are made of theirs, where it has
    not q, k, v, o and the norms of q and k by these names and in these shapes.
    facts(cfg): further lines of the model card.
    disk_prefix: what its tensors' names on disk begin with, behind the layer's.
    export_format: the one of porting.writers that a run exports its student in.
    """

    name: str
    title: str
    module: Callable[..., Any]
    tensors: Callable[[ModelConfig], list[Tensor]]
    state: Callable[[ModelConfig, int, int], dict[str, StateArray]]
    flops: Callable[[ModelConfig, int], float]
    bytes_per_column: int
    options: Any = None
    operator: Operator | None = None
    published: PublishedFormat | None = None
    shares_values: bool = False
    calibrations: Callable[[ModelConfig], Mapping[str, Calibration]] = lambda cfg: {}
    calibrated: tuple[str, ...] = ()
    columns: Callable[[ModelConfig], int] = lambda cfg: cfg.num_heads * cfg.head_dim
    obstacles: Callable[[ModelConfig], list[str]] = lambda cfg: ["an output gate in each head"] * cfg.output_gate
    adopt: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] = lambda cfg, layers: {}
    facts: Callable[[ModelConfig], dict[str, str]] = lambda cfg: {}
    disk_prefix: str = "self_attn"
    export_format: str = "huggingface"

    def choose(self, hidden_size: int, of: Any = None, **chosen: Any) -> Any:
        """The mixer's options: the published ones for this width, but for what is chosen (and not None).

        of: those of layers that the teacher has of this mixer, whose sizes the others take.
        Raises ValueError for what is none of its options, is none of a user's, or has another type.
        """
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if self.options is None and not chosen:
            return None
        fields = self.choices()
        if unknown := sorted(chosen.keys() - set(fields)):
            shown = ", ".join(f"config.student.{name}" for name in unknown)
            raise ValueError(
                f"{shown} can not be chosen for the mixer {self.name}; expected options out of "
                f"{', '.join(fields) or 'none'}. Leave it out, or choose another config.student.mixer."
            )
        options = dataclasses.replace(
            self.options.for_width(hidden_size), **typed(self.options, chosen, "config.student")
        )
        if of is None:
            return options
        sizes = {field.name for field in dataclasses.fields(of)} - set(self.choices())
        return dataclasses.replace(options, **{name: getattr(of, name) for name in sizes})

    def choices(self) -> list[str]:
        """The options that a user may choose."""
        fields = dataclasses.fields(self.options) if self.options is not None else ()
        return [field.name for field in fields if "checkpoint" not in field.metadata]


def torch_files(*model_types: str) -> tuple[Path, ...]:
    """The torch files that a student's export carries: those of its model type and of the types it is built from."""
    own = [f"{kind}_{model_type}" for model_type in model_types for kind in ("configuration", "modeling")]
    names = ("cache_student", "configuration_student", "layers_student", "modeling_student", *own)
    return tuple(_TORCH_FILES / f"{name}.py" for name in names)


def of_checkpoint(default: Any) -> Any:
    """An option's field that a checkpoint's config.json says, and no user."""
    return dataclasses.field(default=default, metadata={"checkpoint": True})


def linear_tensors(
    path: str,
    name: str,
    fan_in: int,
    fan_out: int,
    *,
    bias: bool = False,
    out: bool = False,
    split_by: Literal["heads", "kv_heads", "width"] = "heads",
    multiplies: Literal["input", "inner"] = "input",
) -> list[Tensor]:
    """The weight of a linear layer, and its bias; `out`: it leads back to the width, which lies over fsdp."""
    axes: tuple[Axes, ...] = ("tensor", "fsdp") if out else ("fsdp", "tensor")
    shape = (fan_in, fan_out)
    weight = Tensor(
        f"{path}/kernel", f"{name}.weight", shape, "transposed", axes=axes, split_by=split_by, multiplies=multiplies
    )
    if not bias:
        return [weight]
    return [weight, Tensor(f"{path}/bias", f"{name}.bias", (fan_out,), axes=() if out else axes[1:], split_by=split_by)]


def low_rank_tensors(
    path: str,
    names: tuple[str, ...],
    width: int,
    rank: int,
    size: int,
    *,
    multiplies: Literal["input", "inner"] = "input",
) -> list[Tensor]:
    """A low-rank map's factors, and its base where there are three names: (base, first factor, second)."""
    *base, first, second = names
    split: tuple[Axes, ...] = (("fsdp", "tensor"),)
    return [
        *(Tensor(f"{path}/base", name, (size,), "vector", axes=("tensor",)) for name in base),
        Tensor(f"{path}/a", first, (width, rank), axes=split, split_by="nothing", multiplies=multiplies),
        Tensor(f"{path}/b", second, (rank, size), axes=(None, ("tensor", "fsdp")), multiplies="inner"),
    ]
