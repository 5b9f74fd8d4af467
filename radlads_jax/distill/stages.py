"""The stages as data: which loss, which parameters train, whether a teacher is needed."""

import re
from collections.abc import Callable
from typing import NamedTuple

from radlads_jax.distill.align import align_loss
from radlads_jax.distill.losses import LossSums, cross_entropy_loss, kl_loss
from radlads_jax.models.config import ModelConfig

MIXER_PATH = re.compile(r"stacks/(\d+)/mixer/")


class Stage(NamedTuple):
    """trainable(path, student_cfg): whether the parameter trains in this stage (before the recipe's own `freeze`).

    whole_student: False where the loss reads the trainable parameters alone and the rest is the teacher's.
    """

    loss_fn: Callable[..., LossSums]
    trainable: Callable[[str, ModelConfig], bool]
    needs_teacher: bool
    whole_student: bool


def is_recurrent_mixer(path: str, cfg: ModelConfig) -> bool:
    match = MIXER_PATH.match(path)
    return match is not None and cfg.stacks[int(match[1])][0] != "attention"


def everything(path: str, cfg: ModelConfig) -> bool:
    del path, cfg
    return True


STAGES = {
    "pretrain": Stage(cross_entropy_loss, everything, needs_teacher=False, whole_student=True),
    "stage1": Stage(align_loss, is_recurrent_mixer, needs_teacher=True, whole_student=False),
    "stage2": Stage(kl_loss, everything, needs_teacher=True, whole_student=True),
    "stage2a": Stage(kl_loss, everything, needs_teacher=True, whole_student=True),
    "stage3": Stage(cross_entropy_loss, everything, needs_teacher=False, whole_student=True),
}
