"""A student's dimensions, from its teacher's and what the run says of it."""

import dataclasses
import math
from typing import Any

from radlads_jax.config import RunConfig
from radlads_jax.distill.stages import STAGES
from radlads_jax.models.config import LEAST_LOG_SCALE, SOFTMAX, KeptAttention, ModelConfig
from radlads_jax.models.mixers import MIXERS, mixer_spec
from radlads_jax.models.spec import MixerSpec
from radlads_jax.student import AUTO, Student

# What is 0 or "" for the mixer's own choice.
_RANKS = ("rank_decay", "rank_iclr", "rank_value", "rank_shift", "rank_gate")
# The map that a rank is of, where a switch may leave it out.
_RANK_OF = {"rank_gate": ("gate", "low_rank"), "rank_shift": ("token_shift", True)}
_VALUES = (*_RANKS, "gate", "kv_heads", "shortest_half_life", "longest_half_life", "conv_qk", "conv_v", "gate_std")


def make_student_config(teacher: ModelConfig, run: RunConfig) -> ModelConfig:
    """The student's dimensions. Raises ValueError for switches that contradict each other or the mixer."""
    chosen, spec = run.student, mixer_spec(run.student.mixer)
    _check_own_layers(chosen, teacher)
    _check_number(chosen, teacher)
    if chosen.mixer == SOFTMAX:
        _check_softmax(chosen)
        needing = [name for name in run.stages if STAGES[name].needs_teacher]
        if needing:
            raise ValueError(
                f"config.student.mixer is 'attention', which leaves {', '.join(needing)} nothing to convert; "
                f"expected {' or '.join(repr(name) for name in MIXERS if name != SOFTMAX)}, or the stages pretrain and "
                "stage3 alone."
            )
        _kept_attention(run, teacher, converts=False)
        return dataclasses.replace(teacher, dtype=run.dtype, param_dtype="float32")
    options = _options(spec, chosen, teacher)
    student = teacher.as_student(chosen.mixer, options, _kept(chosen, teacher))
    student = dataclasses.replace(student, kept_attention=_kept_attention(run, student))
    if not student.converted_layers:
        softmax = teacher.layer_mixers.count(SOFTMAX)
        raise ValueError(
            f"config.student.attention_layers or attention_every names all {softmax} layers of softmax attention, "
            "which leaves nothing to convert; expected one of them left out. Name fewer, or raise attention_every."
        )
    _check_calibration(student, chosen)
    _check_start(spec, chosen, student)
    return dataclasses.replace(student, dtype=run.dtype, param_dtype="float32")


def _check_softmax(student: Student) -> None:
    """Raises ValueError for a setting of converted layers where there are none."""
    # Of these `_kept_attention` says more.
    left = {"attention_rope", "attention_output_gate", "attention_log_scale"}
    default = Student(mixer=SOFTMAX)
    for field in dataclasses.fields(Student):
        value = getattr(student, field.name)
        if field.name not in left and value != getattr(default, field.name):
            raise ValueError(
                f"config.student.{field.name} is {value!r} and config.student.mixer 'attention', which converts no "
                "layer; expected another mixer, or nothing. Change the mixer, or leave the other out."
            )


def _check_own_layers(student: Student, teacher: ModelConfig) -> None:
    """Raises ValueError for what can not be where the teacher has recurrent layers itself, which the student keeps."""
    own = teacher.recurrent_mixer
    if own is None:
        return
    if student.mixer != own:
        raise ValueError(
            f"config.student.mixer is {student.mixer!r} for a teacher with layers of {own} itself, which stay as they "
            f"are; expected {own!r}, for a model has softmax attention and one other mixer. Change it, or point "
            "config.teacher.path at the softmax model that the teacher was made from."
        )
    if student.kv_heads:
        raise ValueError(
            f"config.student.kv_heads is {student.kv_heads!r} for a teacher with layers "
            f"of {own} itself; expected none, for the converted layers have the heads of those. Leave it out."
        )
    if layers_to_choose(student):
        raise ValueError(
            f"config.student.attention_layers is {student.attention_layers[0]!r} for a teacher with layers of {own} "
            "itself; expected layers by their numbers, for only a teacher of softmax attention alone tells which of "
            "its layers are needed. Name them, or set config.student.attention_every."
        )


def _check_start(spec: MixerSpec, chosen: Student, student: ModelConfig) -> None:
    """Raises ValueError where the mixer can not begin from the teacher's softmax layers as it is asked to."""
    if chosen.fresh_qkvo:
        return
    if obstacles := spec.obstacles(student):
        raise ValueError(
            f"the mixer {spec.name} can not begin from softmax layers as the teacher's, which has "
            f"{'; '.join(obstacles)}; expected what the mixer has a place for. Choose another teacher or "
            "config.student.mixer, or let q, k, v and o begin anew (config.student.fresh_qkvo=true)."
        )


def _check_calibration(student: ModelConfig, chosen: Student) -> None:
    """Raises ValueError where the mixer has nothing to calibrate, not what is asked for, or not so."""
    known = mixer_spec(chosen.mixer).calibrations(student)
    if chosen.init == "calibrated" and not known:
        raise ValueError(
            f"config.student.init is 'calibrated', but nothing of the mixer {chosen.mixer} can be; expected "
            "'published'. Leave it out, or choose another config.student.mixer."
        )
    unknown = [name for name in chosen.calibrate if name not in known]
    if unknown or (chosen.calibrate and chosen.init != "calibrated"):
        raise ValueError(
            f"config.student.calibrate is {chosen.calibrate} with config.student.init {chosen.init!r}, the mixer "
            f"{chosen.mixer} and its options {student.mixer}; expected parts out of {', '.join(known) or 'none'}, and "
            "init 'calibrated'. Correct the one that is wrong."
        )
    for name in chosen.calibrate:
        if (needed := known[name].needs) and not set(needed) & set(chosen.calibrate):
            raise ValueError(
                f"config.student.calibrate is {chosen.calibrate}, where {name!r} is no start to train from without "
                f"{' or '.join(needed)}; expected that beside it. Add it, or leave {name!r} out."
            )
    parts = chosen.calibrate or mixer_spec(chosen.mixer).calibrated
    for name in known.keys() & set(parts) if chosen.init == "calibrated" else ():
        asked = [f for f in known[name].replaces if getattr(chosen, f, None) or f in chosen.options]
        if asked:
            raise ValueError(
                f"config.student.{asked[0]} is set, and config.student.init is 'calibrated', whose part {name!r} takes "
                f"its place; expected one of them. Leave it out, or name the parts without {name!r} "
                "(config.student.calibrate)."
            )
    if chosen.init == "calibrated" and chosen.fresh_qkvo:
        raise ValueError(
            "config.student.init is 'calibrated' and config.student.fresh_qkvo is true; expected the teacher's q, k, v "
            "and o, which its attention's statistics are of. Turn one of them off."
        )


def layers_to_choose(student: Student) -> int:
    """How many softmax layers the run chooses by itself; 0 where they are named, or none is kept."""
    named = AUTO.fullmatch(str(student.attention_layers[0])) if student.attention_layers else None
    return int(named[1]) if named else 0


def _check_number(student: Student, teacher: ModelConfig) -> None:
    """Raises ValueError for a number of softmax layers to choose that the teacher or the mixer has no choice of."""
    count, asked = layers_to_choose(student), f"config.student.attention_layers is 'auto:{layers_to_choose(student)}'"
    if not student.attention_layers or not isinstance(student.attention_layers[0], str):
        return
    if student.mixer == SOFTMAX:
        raise ValueError(
            f"{asked}, but config.student.mixer is 'attention', which keeps softmax in all layers; expected a mixer to "
            "convert the others to. Leave attention_layers out, or choose another mixer."
        )
    if not 1 <= count < teacher.num_layers:
        raise ValueError(
            f"{asked} for a teacher of {teacher.num_layers} layers; expected auto:1 to auto:{teacher.num_layers - 1}, "
            "which leaves a layer to keep and one to convert. Change the number."
        )


def _kept(student: Student, teacher: ModelConfig) -> tuple[int, ...]:
    """The layers that stay softmax attention; of those that are to be chosen as many, evenly spaced."""
    if count := layers_to_choose(student):
        return tuple((i + 1) * teacher.num_layers // count - 1 for i in range(count))
    if not student.attention_every:
        return tuple(layer for layer in student.attention_layers if isinstance(layer, int))
    if student.attention_every > teacher.num_layers:
        raise ValueError(
            f"config.student.attention_every is {student.attention_every} for a teacher of {teacher.num_layers} "
            f"layers, none of which would stay softmax attention; expected 2 to {teacher.num_layers}. Lower it, or "
            "leave it out."
        )
    return tuple(range(student.attention_every - 1, teacher.num_layers, student.attention_every))


def _kept_attention(run: RunConfig, student: ModelConfig, *, converts: bool = True) -> KeptAttention | None:
    """What the softmax layers that stay have other than the teacher's; None: nothing.

    Raises ValueError where none stay, or for a gate where the teacher has one.
    """
    chosen = run.student
    scale = chosen.attention_log_scale
    if scale is None:
        scale = 0.0 if chosen.attention_rope else float(max(recipe.seq_len for recipe in run.recipes.values()))
    kept = KeptAttention(chosen.attention_rope, scale, chosen.attention_output_gate)
    if kept == KeptAttention():
        return None
    asked = f"config.student.attention_rope is {kept.rope}, attention_log_scale {kept.log_scale:g} and "
    asked += f"attention_output_gate {kept.output_gate}"
    if not converts or SOFTMAX not in student.layer_mixers:
        raise ValueError(
            f"{asked}, which are of softmax layers that stay beside converted ones, and there are none; expected some. "
            "Name them (config.student.attention_layers or attention_every), or leave these settings out."
        )
    if kept.log_scale and not LEAST_LOG_SCALE <= kept.log_scale < math.inf:
        raise ValueError(
            f"config.student.attention_log_scale is {kept.log_scale:g}; expected 0, or a number of tokens from "
            f"{LEAST_LOG_SCALE:g} on, such as the length of the rows that are trained on."
        )
    if kept.output_gate and student.output_gate:
        raise ValueError(
            "config.student.attention_output_gate is true for a teacher whose softmax heads have a gate each; expected "
            "false, for theirs stay. Leave it out."
        )
    return kept


def _options(spec: MixerSpec, student: Student, teacher: ModelConfig) -> Any:
    """The mixer's options: what the config's fields choose of them, and the sizes of the teacher's own such layers."""
    if doubled := sorted(student.options.keys() & {field.name for field in dataclasses.fields(Student)}):
        raise ValueError(
            f"config.student.options has {', '.join(doubled)}; expected only what config.student has no field of. Set "
            f"config.student.{doubled[0]} in its place."
        )
    switches = {f: getattr(student, f) for f in ("use_rope", "token_shift", "group_norm", "balance_state", "qk_norm")}
    if teacher.qk_norm and switches["qk_norm"] is False and "qk_norm" in spec.choices():
        raise ValueError(
            "config.student.qk_norm is false for a teacher that norms q and k itself; expected true or nothing, for "
            "its weights are made for that. Leave it out."
        )
    if teacher.qk_norm and "qk_norm" in spec.choices():
        # The teacher's are there in any case.
        switches["qk_norm"] = None
    if switches["group_norm"] and switches["balance_state"] is None:
        switches["balance_state"] = False
    chosen = switches | {f: getattr(student, f) or None for f in _VALUES} | student.options
    # A mixer without a switch has it turned off.
    known = spec.choices()
    options = spec.choose(
        teacher.hidden_size,
        teacher.mixer,
        **{f: value for f, value in chosen.items() if f in known or value is not False},
    )
    for rank, (switch, value) in _RANK_OF.items():
        if chosen.get(rank) and getattr(options, switch, value) != value:
            raise ValueError(
                f"config.student.{rank} is {chosen[rank]}, and student.{switch} {getattr(options, switch)!r}, without "
                f"such a map; expected {value!r}. Leave the rank out, or set the other."
            )
    return options
