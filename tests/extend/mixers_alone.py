"""A stage as a stranger would add it: the mixers alone learn the teacher's logits, in an order of rows of their own."""

from radlads_jax.config import StageConfig
from radlads_jax.distill.losses import kl_loss
from radlads_jax.distill.stages import Stage, is_aligned_mixer

NAME = "mixers_alone"
STAGE = Stage(
    70_001,
    kl_loss,
    is_aligned_mixer,
    needs_teacher=True,
    whole_student=True,
    loss="KL to the teacher, by the mixers",
    trains="the mixers",
    recipe=StageConfig(tokens=1_000_000, batch_size=8, lr=1e-4, lr_final=1e-5, mixer_lr=1e-4, mixer_lr_final=1e-5),
)
