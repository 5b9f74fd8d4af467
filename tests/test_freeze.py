"""What a recipe leaves untrained: its patterns are held against the student's paths before anything is trained."""

import pathlib
import re

import pytest
import tiny_run
from untrained import TEACHER, save_teacher

from radlads_jax import config
from radlads_jax.config import RunConfig, validate
from radlads_jax.distill.stage_checks import check_trainable
from radlads_jax.distill.student_config import make_student_config

STAGES = ("stage1", "stage2", "stage3")


@pytest.fixture(scope="module")
def student():
    return make_student_config(TEACHER, validate(changed(**{"student.attention_layers": (1,)})))


def changed(**fields):
    chosen = config.defaults()
    chosen.teacher.path, chosen.data.path = "a/teacher", "text"
    chosen.update_from_flattened_dict(fields)
    return chosen


def with_freeze(stage: str, *patterns: str) -> RunConfig:
    return validate(changed(stages=STAGES, **{f"{stage}.freeze": patterns}))


@pytest.mark.parametrize(
    ("stage", "pattern", "nearest"),
    [
        ("stage2", "embed_tokens", "embed/embedding"),
        ("stage3", "down_proj", "mlp/down/kernel"),
        ("stage2", "input_layernorm", "input_norm/scale"),
        ("stage1", "^mixer", "mixer"),
        ("stage2", "mlp.up.weight$", "mlp/up/kernel"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_paths(student, stage, pattern, nearest) -> None:
    with pytest.raises(ValueError, match=rf"config\.{stage}\.freeze .*{re.escape(pattern)}.*{nearest}"):
        check_trainable(with_freeze(stage, "mlp", pattern), student)


@pytest.mark.parametrize(
    ("stage", "patterns"),
    [
        ("stage1", ("mixer",)),
        ("stage2", (".",)),
        ("stage3", ("stacks", "norm", "embed", "head")),
        ("stage2", ("mlp", "")),
    ],
)
def test_a_stage_that_trains_nothing_is_refused(student, stage, patterns) -> None:
    with pytest.raises(ValueError, match=rf"{stage} has nothing to train: .*config\.{stage}\.freeze"):
        check_trainable(with_freeze(stage, *patterns), student)


@pytest.mark.parametrize("patterns", [(), ("mlp", "embed"), ("stacks/0/mixer/k/",), (r"norm/scale$",), ("head",)])
def test_patterns_that_leave_something_are_fine(student, patterns) -> None:
    check_trainable(with_freeze("stage2", *patterns), student)


def test_a_stage_that_is_not_run_may_freeze_what_it_likes(student) -> None:
    check_trainable(validate(changed(stages=("stage1",), **{"stage3.freeze": (".", "no_such")})), student)


def test_it_is_refused_before_the_data_is_read(tmp_path: pathlib.Path) -> None:
    settings = tiny_run.settings(save_teacher(tmp_path)) | {"stage3.freeze": ("embed_tokens",)}
    with pytest.raises(ValueError, match=r"config\.stage3\.freeze"):
        tiny_run.convert(tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()
