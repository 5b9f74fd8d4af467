"""Stages that can not be as they are asked for are refused by the settings alone."""

import pytest
from untrained import TEACHER

from radlads_jax import config
from radlads_jax.config import RunConfig, validate
from radlads_jax.distill.stage_checks import check_stages
from radlads_jax.distill.student_config import make_student_config


def run_of(*stages: str, **fields) -> RunConfig:
    chosen = config.defaults()
    chosen.teacher.path, chosen.data.path, chosen.stages = "a/teacher", "text", stages
    chosen.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return validate(chosen)


def check(run: RunConfig) -> None:
    check_stages(run, make_student_config(TEACHER, run), TEACHER)


@pytest.mark.parametrize("stages", [("stage2", "stage1"), ("pretrain", "stage1"), ("stage3", "stage1", "stage2")])
def test_mixers_are_fitted_to_the_teachers_layers_before_these_change(stages):
    with pytest.raises(ValueError, match=rf"stage1 fits the mixers .*{stages[0]} before it.*expected stage1 first"):
        check(run_of(*stages))
    check(run_of(*sorted(stages, key=lambda stage: stage != "stage1")))


def test_nothing_is_learned_of_fresh_weights():
    fresh = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32}
    with pytest.raises(ValueError, match=r"config\.teacher\.scratch .*stage2 would have nothing to learn.*of its own"):
        check(run_of("pretrain", "stage2", teacher__path="", teacher__scratch=fresh))


@pytest.mark.parametrize(
    ("stage", "rates", "named"),
    [
        ("stage1", {"mixer_lr": 0.0, "mixer_lr_final": 0.0}, "config.stage1.mixer_lr 0 nothing"),
        ("stage2", dict.fromkeys(("lr", "lr_final", "mixer_lr", "mixer_lr_final"), 0.0), "lr 0 and .*mixer_lr 0"),
    ],
)
def test_a_rate_of_nothing_is_refused(stage, rates, named):
    fields = {f"{stage}__{name}": value for name, value in rates.items()}
    with pytest.raises(ValueError, match=rf"{named}.* that {stage} trains would move"):
        check(run_of(stage, **fields))


def test_the_mixers_alone_may_stand_still():
    check(run_of("stage2", stage2__mixer_lr=0.0, stage2__mixer_lr_final=0.0))
