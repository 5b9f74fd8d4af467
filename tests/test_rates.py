"""Rates and warm-ups: defaults that follow a stage's length, what preflight says of them, and runs begun before."""

import dataclasses
import importlib
import json
import re

import pytest
from ml_collections import ConfigDict
from untrained import student_of

from radlads_jax.config import RunConfig, StageConfig, validate
from radlads_jax.distill.optim import param_groups
from radlads_jax.distill.program import StagePlan
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models.config import KeptAttention, ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.tree import in_mixer, path_leaves, stack_of
from radlads_jax.recipes import ALIGNING, DISTILLING, paper
from radlads_jax.run import rates
from radlads_jax.run.settings import check_same_config, keep_begun_rules, remember_config, with_whole_paths

TEACHER = ModelConfig("qwen2", 64, 32, 48, 4, 2, 8, (("attention", 2),))
ROW = {"seq_len": 16, "batch_size": 2}


def described(name: str, steps: int, **fields) -> str:
    recipe = StageConfig(**{**ROW, "tokens": steps * 32, **fields})
    run = dataclasses.replace(RunConfig(), stages=(name,), **{name: recipe})
    return rates.described([StagePlan(run, name, make_student_config(TEACHER, run), TEACHER)])


def convert(arg: str = "", **fields) -> ConfigDict:
    config = importlib.import_module("configs.convert").get_config(arg)
    config.teacher.path, config.data.path = "teacher", "text"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@pytest.mark.parametrize("name", ["pretrain", "stage1", "stage2", "stage2a", "stage3"])
@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (13, 1), (61, 4), (1000, 50), (6104, 50)])
def test_a_warmup_that_nobody_sets_is_a_twentieth_of_the_steps(name, steps, expected):
    config = convert(stages=(name,), student__mixer="attention" if name == "pretrain" else "rad_rwkv7")
    config[name].update({**ROW, "tokens": steps * 32})
    assert validate(config).stage(name).warmup_steps == expected
    config[name].warmup_steps = 7
    assert validate(config).stage(name).warmup_steps == 7


def test_warmups_follow_rows_and_their_length_too():
    config = convert()
    assert config.stage2.warmup_steps == 50
    config.stage2.batch_size = 96 * 100
    assert config.stage2.warmup_steps == 6
    config.stage2.seq_len = 512 * 100
    assert config.stage2.warmup_steps == 1


def test_the_papers_warmup_is_that_of_the_paper():
    assert paper("teacher", "rad_rwkv7").stage3.warmup_steps == 50, "of 64 steps"


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [(500_000_000, 1e-5), (50_000_000, 1e-5), (25_000_000, 2e-5), (5_000_000, 1e-4), (100_000, 1e-4), (1, 1e-4)],
)
@pytest.mark.parametrize(("arg", "name"), [("", "stage2"), ("long=true", "stage2a")])
def test_converts_rate_grows_where_tokens_are_few(tokens, rate, arg, name):
    assert DISTILLING.of(tokens) == pytest.approx(rate)
    stage = validate(convert(arg, **{f"{name}__tokens": tokens})).stage(name)
    assert (stage.lr, stage.lr_final, stage.mixer_lr_final) == pytest.approx((rate,) * 3)
    assert stage.mixer_lr == pytest.approx(1e-4 if name == "stage2a" else rate)


@pytest.mark.parametrize(("tokens", "rate"), [(10**8, 1e-3), (3 * 10**6, 1e-3), (2 * 10**6, 1.5e-3), (10**5, 3e-3)])
def test_converts_stage_1_begins_higher_where_tokens_are_few(tokens, rate):
    assert ALIGNING.of(tokens) == pytest.approx(rate)
    stage = validate(convert(stage1__tokens=tokens)).stage1
    assert (stage.lr, stage.lr_final, stage.mixer_lr, stage.mixer_lr_final) == pytest.approx((rate, 1e-5, rate, 1e-5))
    assert validate(convert(stage1__tokens=tokens, stage1__mixer_lr=7e-4)).stage1.mixer_lr == 7e-4


@pytest.mark.parametrize("lr", [1e-5, 3e-4])
def test_a_rate_that_is_given_wins(lr):
    few = {"stage2__tokens": 100_000}
    for config in (convert(f"lr={lr}", **few), convert(**few, stage2__lr=lr)):
        stage = validate(config).stage2
        assert (stage.lr, stage.lr_final, stage.mixer_lr, stage.mixer_lr_final) == (lr,) * 4
    stage = validate(convert(**few, stage2__mixer_lr=lr, stage2__lr_final=1e-6)).stage2
    assert (stage.lr, stage.lr_final, stage.mixer_lr, stage.mixer_lr_final) == (1e-4, 1e-6, lr, 1e-6)


@pytest.mark.parametrize(("name", "rate"), [("stage1", "mixer_lr"), ("stage2", "lr"), ("stage3", "lr")])
def test_preflight_says_what_a_long_warmup_leaves_of_a_rate(name, rate):
    text = described(name, 13, warmup_steps=50, **{rate: 1e-3, f"{rate}_final": 1e-3})
    reached = float(re.search(r"reaches ([\d.e-]+) of 0\.001", text)[1])
    assert reached == pytest.approx(1e-3 * (0.01 + 0.99 * 12 / 50), rel=1e-2)
    assert f"config.{name}.warmup_steps is 50 of 13 steps: 1 fit" in text
    assert "warmup" not in described(name, 100, warmup_steps=50)


def test_preflight_says_which_rate_and_why():
    few = {"tokens": 100_000, "warmup_steps": 0}
    rate = dict.fromkeys(("lr", "lr_final", "mixer_lr", "mixer_lr_final"), 1e-4)
    assert described("stage2", 0, **few, **rate).startswith("stage2 0.0001 (the default for 100,000 tokens")
    assert re.search(r"1e-05 \(low for 100,000 tokens.*\b0\.0001\b", described("stage2", 0, **few))
    assert described("stage2", 0, **few, **dict.fromkeys(rate, 2e-3)) == "stage2 0.002"
    assert described("stage2", 0, tokens=500_000_000) == "stage2 1e-05"
    low = described("stage1", 0, **few, mixer_lr=1e-3)
    assert low.startswith("stage1 0.001 to 1e-05 (low for 100,000 tokens")
    assert low.endswith("0.003, config.stage1.lr 1e-05 trains nothing)")
    assert "default for 100,000 tokens; the paper's 0.001 is for 100M" in described("stage1", 0, **few, mixer_lr=3e-3)
    assert described("stage1", 0, tokens=3_000_000, lr=1e-3, mixer_lr=1e-3) == "stage1 0.001 to 1e-05"
    apart = described("stage2a", 0, tokens=600_000_000, mixer_lr=1e-4)
    assert apart == "stage2a mixers 0.0001 to 1e-05, the rest 1e-05"


def test_softmax_layers_that_stay_have_the_rate_of_the_rest():
    hybrid = student_of(TEACHER, "gdn", (1,))
    turned = dataclasses.replace(hybrid, kept_attention=KeptAttention(rope=False))
    for student, aligned in ((hybrid, {0}), (turned, {0, 1})):
        groups = path_leaves(param_groups(student, abstract_params(student)))
        assert {path for path, group in groups.items() if group == "mixer"} == {
            path for path in groups if in_mixer(path) and stack_of(path) in aligned
        }


def test_a_run_begun_by_other_rules_goes_on_by_them(tmp_path):
    """config.json as it was written when every warm-up was 50, stage 2's rate 1e-5 and switches were words."""
    few = {"stage1__tokens": 13 * 32 * 512, "stage2__tokens": 100_000}
    before = convert(**few, student__use_rope=False).to_dict()
    for name in ("stage1", "stage2", "stage2a", "stage3"):
        before[name]["warmup_steps"] = 50
    before["stage2"] |= dict.fromkeys(("lr", "lr_final", "mixer_lr", "mixer_lr_final"), 1e-5)
    before["student"] |= {"use_rope": "off", "token_shift": "", "group_norm": "", "balance_state": "on"}
    del before["optim"]["name"]
    (tmp_path / "config.json").write_text(json.dumps(before))
    # Stage 2 is on its way; of a stage that is not, the rules are today's.
    (tmp_path / "checkpoints" / "stage2" / "3").mkdir(parents=True)

    def continued(**fields) -> RunConfig:
        config = convert(**few, student__use_rope=False, student__balance_state=True, **fields)
        keep_begun_rules(tmp_path, config)
        run = validate(config)
        check_same_config(tmp_path, with_whole_paths(run).settings())
        return run

    run = continued()
    assert (run.stage1.warmup_steps, run.stage2.lr, run.stage2.mixer_lr_final) == (50, 1e-5, 1e-5)
    with pytest.raises(ValueError, match=r"stage2\.lr\b.*\b1e-05\b.*\b0\.0003\b"):
        continued(stage2__lr=3e-4)
    with pytest.raises(ValueError, match=r"student\.group_norm.*\bNone\b.*\bFalse\b"):
        continued(student__group_norm=False)
    with pytest.raises(ValueError, match=r"student\.use_rope.*\bFalse\b.*\bTrue\b"):
        config = convert(**few, student__use_rope=True, student__balance_state=True)
        check_same_config(tmp_path, config.to_dict())


def test_a_new_run_stores_the_numbers_it_runs_with(tmp_path):
    config = convert(stage2__tokens=10_000_000)
    keep_begun_rules(tmp_path, config)
    remember_config(tmp_path, config.to_dict())
    stored = json.loads((tmp_path / "config.json").read_text())["stage2"]
    assert (stored["lr"], stored["mixer_lr"], stored["warmup_steps"]) == (pytest.approx(5e-5),) * 2 + (11,)
