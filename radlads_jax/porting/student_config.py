"""A student's dimensions, from its teacher's and what the run says of it."""

import dataclasses

from radlads_jax.config import RunConfig, Student
from radlads_jax.models.config import MixerConfig, ModelConfig


def make_student_config(teacher: ModelConfig, run: RunConfig) -> ModelConfig:
    """The student's dimensions. Raises ValueError for switches that contradict each other or the mixer."""
    given = run.student
    if given.mixer == "attention":
        needing = [name for name in run.stages if name not in ("pretrain", "stage3")]
        if needing:
            raise ValueError(
                f"config.student.mixer is 'attention', which leaves {', '.join(needing)} nothing to convert; "
                "expected 'rad_rwkv6' or 'rad_rwkv7', or the stages pretrain and stage3 alone."
            )
        return dataclasses.replace(teacher, dtype=run.dtype, param_dtype="float32")
    student = teacher.as_student(given.mixer, _mixer_config(given, teacher.hidden_size), given.attention_layers)
    if student.recurrent_mixer is None:
        raise ValueError(
            f"config.student.attention_layers names all {teacher.num_layers} layers, which leaves nothing to convert; "
            "leave at least one of them out."
        )
    return dataclasses.replace(student, dtype=run.dtype, param_dtype="float32")


def _mixer_config(given: Student, hidden_size: int) -> MixerConfig:
    if given.mixer == "rad_rwkv7" and given.token_shift:
        raise ValueError(
            "config.student.token_shift is true, but RAD-RWKV7 has none (the paper found it gives nothing there, and "
            "its format has no place for it); use rad_rwkv6, or leave token_shift out."
        )
    switches = {f: getattr(given, f) for f in ("use_rope", "token_shift", "group_norm", "balance_state")}
    if switches["group_norm"] and switches["balance_state"] is None:
        switches["balance_state"] = False
    ranks = {f: getattr(given, f) for f in ("rank_decay", "rank_iclr", "rank_value", "rank_shift", "rank_gate")}
    return MixerConfig.for_student(given.mixer, hidden_size, gate=given.gate or None, **switches, **ranks)
