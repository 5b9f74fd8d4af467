"""What the two RAD-RWKV mixers share: switches, the tensors of gate and GroupNorm, and their keys in config.json."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from radlads_jax.models import starts
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.spec import Calibration, Tensor, linear_tensors, low_rank_tensors

_NORM = (("scale", "weight"), ("bias", "bias"))
_GATES = ("none", "full", "low_rank")


@dataclasses.dataclass(frozen=True)
class RwkvOptions:
    """use_rope: of r and k. gate: "none", "full" (a sigmoid of a full-rank map) or "low_rank".

    balance_state and group_norm are the two ways to bound the output: with balance_state keys are scaled by the decay
    and the output by head_dim^-0.5 (RAD-RWKV7 variant A), with group_norm the output is normalised per head (variant
    B). qk_norm: an RMSNorm of every head's r and k where the family has none. Raises ValueError where they contradict
    each other.
    """

    use_rope: bool
    gate: str
    rank_decay: int
    rank_gate: int
    balance_state: bool = True
    group_norm: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.balance_state and self.group_norm:
            raise ValueError(
                "config.student.balance_state and config.student.group_norm are both on, but they are two answers to "
                "one question (how the size of the state is bounded). Turn one of them off: balance_state is the "
                "paper's default, group_norm the older variant."
            )
        if self.gate not in _GATES:
            raise ValueError(f"config.student.gate is {self.gate!r}; expected one of {', '.join(_GATES)}.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("rank_") and value < 1:
                raise ValueError(f"config.student.{field.name} is {value}; expected at least 1.")

    @classmethod
    def for_width(cls, hidden_size: int) -> "RwkvOptions":
        """The published student of this width."""
        raise NotImplementedError


def has_norms(cfg: ModelConfig) -> bool:
    """Whether r and k are normed: as the teacher's q and k are, or by choice."""
    return cfg.qk_norm or cfg.mixer.qk_norm


def first_norms(cfg: ModelConfig, layers: dict[str, Any]) -> dict[str, Any]:
    """For norms of q and k that the teacher has not: one scale a layer, which leaves every head's direction as it was.

    The teacher's root mean square over the layer's heads and channels, for inputs whose channels are independent and
    as large as the norm before the mixer makes them on average. Without data no more is known.
    """
    if cfg.qk_norm or not cfg.mixer.qk_norm:
        return {}
    assert not cfg.zero_centred_norms  # a family that has such has norms of q and k
    scale = layers["input_norm"]["scale"].astype(jnp.float32)

    def of(projection: dict[str, Array]) -> dict[str, Array]:
        squares = jnp.square(projection["kernel"].astype(jnp.float32) * scale[..., None]).sum(-2)
        if "bias" in projection:
            squares += jnp.square(projection["bias"].astype(jnp.float32))
        rms = jnp.sqrt(squares.mean(-1, keepdims=True))
        return {"scale": jnp.broadcast_to(rms, (*rms.shape[:-1], cfg.head_dim))}

    return {f"{name}_norm": of(layers["mixer"][name]) for name in "qk"}


def low_rank_size(hidden_size: int, exponent: float, multiplier: float) -> int:
    """Rank of a low-rank matrix, a multiple of 32: max(1, round(D^e m / 32)) * 32 (RADLADS section 3)."""
    return max(1, round(math.pow(hidden_size, exponent) * multiplier / 32)) * 32


def gate_and_norm_tensors(cfg: ModelConfig, *, multiplies: Any = "input") -> list[Tensor]:
    """The tensors of the output gate and of GroupNorm, as far as the options have them."""
    width, size, options = cfg.hidden_size, cfg.num_heads * cfg.head_dim, cfg.mixer
    gates = {
        "none": [],
        "full": linear_tensors("gate", "gate", width, size, multiplies=multiplies),
        "low_rank": low_rank_tensors("gate", ("g1", "g2"), width, options.rank_gate, size, multiplies=multiplies),
    }
    norm = [Tensor(f"ln_x/{name}", f"ln_x.{disk}", (size,), axes=("tensor",)) for name, disk in _NORM]
    return gates[options.gate] + (norm if options.group_norm else [])


def gate_and_output_calibrations(cfg: ModelConfig) -> dict[str, Calibration]:
    """The parts of a calibrated start behind the recurrence.

    A full-rank gate has no bias to open it by: it is 1/2 at the start, which o makes up for. One of low rank begins
    near 0. Keys are written as long as they are, so that an open gate lets through whatever a state has grown to,
    unless o is fitted to it; and an o that is solved for a gate near 0 is too large to be trained.
    """
    parts = {"output": starts.SCALED_OUTPUT, "projection": starts.SOLVED_OUTPUT}
    if cfg.mixer.gate != "low_rank":
        return parts
    gate = Calibration(starts.low_rank_gate_at_one, needs=tuple(parts))
    return {"gate": gate} | parts | {"projection": dataclasses.replace(starts.SOLVED_OUTPUT, needs=("gate",))}


# config.json's gate_rank_type.
_GATE_TYPES = {0: "none", 1: "full", 2: "low_rank"}


def read_switches(keys: Any, *, gate: str, group_norm: bool) -> dict[str, Any]:
    """The shared switches of a student's config.json; gate, group_norm: what published readers take for absent keys.

    Raises ValueError where both ways to bound the output are on.
    """
    numbers = {name: number for number, name in _GATE_TYPES.items()}
    gate_type = keys.integer("gate_rank_type", numbers[gate], low=0, high=2)
    group_norm = keys.flag("groupnorm_att", group_norm)
    balance_state = keys.flag("balance_state", not group_norm)
    if balance_state and group_norm:
        raise ValueError(
            "config.json: balance_state and groupnorm_att are both true; expected one of them, because either alone "
            "bounds the mixer's output. Choose a checkpoint that was trained with one."
        )
    return {
        "use_rope": keys.flag("use_rope", False),
        "gate": _GATE_TYPES[gate_type],
        "balance_state": balance_state,
        "group_norm": group_norm,
        "qk_norm": keys.flag("mixer_qk_norm", False),
    }


def read_ranks(keys: Any, names: dict[str, str]) -> dict[str, int | None]:
    """Low-rank sizes by the option's name; None (absent, null or 0): the published one."""
    return {name: keys.integer(key, 0, low=0) or None for name, key in names.items()}


def write_switches(options: RwkvOptions, *, token_shift: bool, ranks: dict[str, str]) -> dict[str, Any]:
    """config.json's keys for a student's options; every rank is written, for a null breaks published readers."""
    numbers = {name: number for number, name in _GATE_TYPES.items()}
    return {
        "use_rope": options.use_rope,
        "gate_rank_type": numbers[options.gate],
        "balance_state": options.balance_state,
        "groupnorm_att": options.group_norm,
        "use_tokenshift": token_shift,
        # Not of the published format: only where it says something.
        **({"mixer_qk_norm": True} if options.qk_norm else {}),
    } | {key: getattr(options, name) for name, key in ranks.items()}


def card_facts(cfg: ModelConfig, *, token_shift: bool) -> dict[str, str]:
    """Lines of the model card."""
    options = cfg.mixer
    bound = "state balancing" if options.balance_state else "GroupNorm" if options.group_norm else "nothing"
    return {
        "RoPE in the recurrent layers": "yes" if options.use_rope else "no",
        "gate": options.gate.replace("_", " "),
        "output bounded by": bound,
        "token shift": "yes" if token_shift else "no",
        **({"norms of q and k in the recurrent layers": "yes"} if has_norms(cfg) else {}),
    }
