"""The untrained control: the teacher itself, with a window of keys where its student's layers are converted.

A conversion that is not above it has shown nothing: four sinks and 64 keys need no training and a state as constant.
"""

import dataclasses

from radlads_jax.decoding.loaded import Model
from radlads_jax.models import ModelConfig
from radlads_jax.models.window import untrained_control


def check_control(teacher: ModelConfig, student: ModelConfig) -> None:
    """Raises ValueError where there is no control between these two."""
    if student.recurrent_mixer is None:
        raise ValueError(
            "--control is the teacher with a window in the layers that the student has converted, but --model has "
            "softmax attention in all layers; expected a student. Leave --control out."
        )
    if teacher.recurrent_mixer is not None:
        raise ValueError(
            f"--control is the teacher with a window in the layers that the student has converted, but --teacher has "
            f"layers of {teacher.recurrent_mixer} itself; expected softmax attention in all of its layers. Leave "
            "--control out."
        )
    if teacher.num_layers != student.num_layers:
        raise ValueError(
            f"--control is the teacher with a window in the layers that the student has converted, but --teacher has "
            f"{teacher.num_layers} layers and --model {student.num_layers}; expected as many. Give the student's own "
            "teacher, or leave --control out."
        )


def control_of(teacher: Model, student: ModelConfig) -> Model:
    """The teacher's own weights, not copied. It is what `load_model` gives beside this student."""
    return dataclasses.replace(teacher, cfg=untrained_control(teacher.cfg, student))
