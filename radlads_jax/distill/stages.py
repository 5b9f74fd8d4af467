"""The stages as data: which loss, which parameters train, whether a teacher is needed, and how they are told."""

from collections.abc import Callable
from typing import NamedTuple

from radlads_jax.config import RunConfig, StageConfig, add_recipe
from radlads_jax.distill.align import align_loss
from radlads_jax.distill.losses import LossSums, answers_kl_loss, cross_entropy_loss, kl_loss, stored_kl_loss
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.tree import in_mixer, stack_of

# How many stages there were when a seed first chose the order of a stage's rows. It never changes, or every run's
# order would.
_FIRST_STAGES = 5


class Stage(NamedTuple):
    """A stage of a conversion.

    id: chooses the order of its rows with the run's seed; each stage has another, for ever. Take a large one.
    loss_fn: (student_cfg, teacher_cfg, student, teacher, batch, remat=, slice_tokens=) -> LossSums.
    trainable(path, student_cfg): whether the parameter trains in this stage (before the recipe's own `freeze`).
    whole_student: False where the loss reads the trainable parameters alone and the rest is the teacher's, whose layers
    it runs beside them.
    stored_loss_fn: loss_fn where the batch has the teacher's stored logits; None where the teacher itself is needed.
    loss, trains: what the loss is and what trains, as the report and the model card say it.
    recipe: what config.<its name> is where nothing is set.
    reads_chats: its rows are of config.data.chats.
    softens: its loss_fn takes temperature= and top_k= too (config.teacher's).
    flops: (student_cfg, teacher_cfg, seq_len) -> of a token in a training step, where they are others than of what
    trains forward and backward and of its teacher forward (planning/cost.py).
    """

    id: int
    loss_fn: Callable[..., LossSums]
    trainable: Callable[[str, ModelConfig], bool]
    needs_teacher: bool
    whole_student: bool
    loss: str
    recipe: StageConfig
    trains: str = "everything"
    stored_loss_fn: Callable[..., LossSums] | None = None
    reads_chats: bool = False
    softens: bool = False
    flops: Callable[[ModelConfig, ModelConfig, int], float] | None = None

    def order_seed(self, seed: int) -> int:
        """What the order of the stage's rows is drawn from, in a run with this seed."""
        return seed * _FIRST_STAGES + self.id


def is_aligned_mixer(path: str, cfg: ModelConfig) -> bool:
    """Whether the parameter is of a mixer that begins as another than the teacher's (ModelConfig.is_aligned)."""
    stack = stack_of(path)
    return stack is not None and in_mixer(path) and cfg.is_aligned(stack)


def everything(path: str, cfg: ModelConfig) -> bool:
    del path, cfg
    return True


_TO_TEACHER = "KL to the teacher"
_NEXT_TOKEN = "next-token cross-entropy"


def _to_teacher(number: int, recipe: StageConfig) -> Stage:
    return Stage(
        number,
        kl_loss,
        everything,
        needs_teacher=True,
        whole_student=True,
        loss=_TO_TEACHER,
        recipe=recipe,
        stored_loss_fn=stored_kl_loss,
        softens=True,
    )


def _to_next_token(number: int, recipe: StageConfig) -> Stage:
    return Stage(
        number,
        cross_entropy_loss,
        everything,
        needs_teacher=False,
        whole_student=True,
        loss=_NEXT_TOKEN,
        recipe=recipe,
    )


# By the name that a config gives them.
STAGES: dict[str, Stage] = {
    "pretrain": _to_next_token(0, RunConfig.pretrain),
    "stage1": Stage(
        1,
        align_loss,
        is_aligned_mixer,
        needs_teacher=True,
        whole_student=False,
        loss="distance to attention's outputs",
        recipe=RunConfig.stage1,
        trains="the mixers",
    ),
    "stage2": _to_teacher(2, RunConfig.stage2),
    "stage2a": _to_teacher(3, RunConfig.stage2a),
    "stage2c": Stage(
        200_003,
        answers_kl_loss,
        everything,
        needs_teacher=True,
        whole_student=True,
        loss="KL to the teacher where the assistant speaks",
        recipe=RunConfig.stage2c,
        reads_chats=True,
        softens=True,
    ),
    "stage3": _to_next_token(4, RunConfig.stage3),
}


def add_stage(name: str, stage: Stage) -> None:
    """Makes `name` a stage that a run can name, and config.<name> its recipe; to be called before `defaults()`.

    Raises ValueError where the name is a setting's already, or the id another stage's.
    """
    taken = {other.id: known for known, other in STAGES.items() if known != name}
    if stage.id in taken:
        raise ValueError(f"stage {name!r} has the id {stage.id}, which is {taken[stage.id]}'s; expected its own.")
    add_recipe(name, stage.recipe, reads_chats=stage.reads_chats)
    STAGES[name] = stage


def stage_losses() -> dict[str, str]:
    """What each stage's loss is, in words."""
    return {name: stage.loss for name, stage in STAGES.items()}
