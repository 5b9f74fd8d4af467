"""What a run is told of its student (config.student): its mixer, which layers keep softmax attention, how it begins."""

import dataclasses
import re
from typing import Any

from radlads_jax.fields import bounded, require

_GATES = ("none", "full", "low_rank")
_INITS = ("published", "calibrated")
# Of the softmax layers: so many are to be chosen.
AUTO = re.compile(r"auto:(\d+)")


@dataclasses.dataclass(frozen=True)
class Student:
    """mixer: a name of models.mixers.MIXERS; "attention" is no conversion. attention_layers keep softmax; ("auto:N",)
    chooses N of them by the teacher's forward passes (evaluation/layer_choice.py).
    attention_every: N keeps every N-th layer, those with (i + 1) % N == 0, in place of attention_layers; 0 = off.

    use_rope, token_shift, group_norm, balance_state: None = the mixer's published choice; gate: "" = the same, else one
    of _GATES. qk_norm: whether the mixers norm q and k; None = as the teacher does. attention_rope,
    attention_output_gate: whether the softmax layers that are kept have RoPE, and a gate that the teacher has not.
    attention_log_scale: a of the factor log(t + a) / log(a) of their logits at inference; 0 = none; None = the run's
    longest rows where they have no RoPE, else none. rank_*: 0 = from the width. kv_heads: of gdn's k and v, "teacher"
    (as many as the teacher's) or "cloned" (as many as of q). shortest_half_life, longest_half_life, conv_qk, conv_v,
    gate_std: of gdn's start (models.gdn.GdnOptions); 0 and "" = the mixer's choice. fresh_qkvo: q, k, v, o start fresh
    in place of the teacher's. init: "published", or "calibrated" by what the teacher does on one batch; calibrate:
    which parts (docs/METHOD.md; none = the mixer's choice). init_from: the work directory of a run whose stage 1 has
    converted every layer of the same teacher to the same mixer; the converted layers begin with its mixers, and auto:N
    chooses by them. options: what has no field here, by the name of the mixer's option.
    """

    mixer: str = "rad_rwkv7"
    attention_layers: tuple[int | str, ...] = ()
    attention_every: int = bounded(0, least=0)
    use_rope: bool | None = None
    token_shift: bool | None = None
    gate: str = bounded("", one_of=("", *_GATES))
    group_norm: bool | None = None
    balance_state: bool | None = None
    qk_norm: bool | None = None
    attention_rope: bool = True
    attention_output_gate: bool = False
    attention_log_scale: float | None = None
    fresh_qkvo: bool = False
    rank_decay: int = bounded(0, least=0)
    rank_iclr: int = bounded(0, least=0)
    rank_value: int = bounded(0, least=0)
    rank_shift: int = bounded(0, least=0)
    rank_gate: int = bounded(0, least=0)
    kv_heads: str = bounded("", one_of=("", "teacher", "cloned"))
    shortest_half_life: float = bounded(0.0, least=0)
    longest_half_life: float = bounded(0.0, least=0)
    conv_qk: float = bounded(0.0, least=0)
    conv_v: float = bounded(0.0, least=0)
    gate_std: float = bounded(0.0, least=0)
    init: str = bounded("published", one_of=_INITS)
    calibrate: tuple[str, ...] = ()
    init_from: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def check_student(student: Student) -> None:
    """Raises ValueError for settings that contradict each other, whatever the teacher."""
    if student.group_norm and student.balance_state:
        raise ValueError(
            "config.student.group_norm and config.student.balance_state are both true; expected one of them, because "
            "either alone bounds the mixer's output. Set the other to false."
        )
    if student.init_from and (student.init != "published" or student.fresh_qkvo):
        other = "fresh_qkvo is true" if student.fresh_qkvo else f"init {student.init!r}"
        raise ValueError(
            f"config.student.init_from is {student.init_from!r} and config.student.{other}; expected one of them, for "
            "both say how the converted layers begin. Leave one out."
        )
    kept = student.attention_layers
    chosen = len(kept) == 1 and AUTO.fullmatch(str(kept[0])) is not None
    wrong = None if chosen else next((layer for layer in kept if isinstance(layer, str)), None)
    require(wrong is None, "config.student.attention_layers", wrong, "int, as in 3,7,11, or auto:N alone")
    if student.attention_every and kept:
        raise ValueError(
            f"config.student.attention_every is {student.attention_every} and config.student.attention_layers {kept}; "
            "expected one of them, for both say which layers stay softmax attention. Leave one out."
        )
