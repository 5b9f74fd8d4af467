"""What configs/plans.jsonl keeps of steps that were compiled."""

import dataclasses
from pathlib import Path

import pytest

from radlads_jax.planning import planner as planner_lib
from radlads_jax.planning import plans, table
from radlads_jax.planning import stage as stage_lib

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("name", ["qwen2_5_7b_rad_rwkv6", "qwen2_5_32b_rad_rwkv7", "qwen2_5_7b_gdn", "qwen3_8b_gdn"])
def test_no_step_that_was_compiled_needs_less_than_is_counted_by_hand(name):
    """What can not fit by that count is not compiled."""
    run = dataclasses.replace(table._read_config(CONFIGS / f"{name}.py"), stages=("stage1", "stage2"))
    planned = planner_lib.make_planner(run, {}, CONFIGS / "plans.jsonl").smallest("v5e")
    for stage in planned["stages"]:
        assert 0.4 * stage["temp_bytes"] < stage["temp_bytes_by_hand"] < stage["temp_bytes"]


def test_the_plans_of_the_page_are_known(monkeypatch, capsys):
    """No field that a student has had since changes what was compiled; another jax's plans are said to be such."""
    monkeypatch.setattr(stage_lib, "compiled", lambda plan: pytest.fail(f"{plan.name} is compiled anew"))
    monkeypatch.setattr(plans.jax, "__version__", "0.99")
    run = table._read_config(CONFIGS / "qwen2_5_7b_rad_rwkv7.py")
    planned = planner_lib.make_planner(run, {}, CONFIGS / "plans.jsonl").smallest("v6e")
    assert [stage["name"] for stage in planned["stages"]] == list(run.stages) and planned["usd"] > 0
    assert capsys.readouterr().err.count("0.99") == 1


def test_the_page_says_what_the_kept_plans_do(monkeypatch):
    """docs/PODS.md's large table, row by row, without a compiler."""
    monkeypatch.setattr(stage_lib, "compiled", lambda plan: pytest.fail(f"{plan.name} is compiled anew"))
    page = (CONFIGS.parent / "docs" / "PODS.md").read_text()
    for size in (7, 32, 72):
        for mixer in ("rad_rwkv6", "rad_rwkv7"):
            name = f"qwen2_5_{size}b_{mixer}"
            planner = planner_lib.make_planner(table._read_config(CONFIGS / f"{name}.py"), {}, CONFIGS / "plans.jsonl")
            for chip in table._CHIPS:
                row = f"| {' | '.join(table._row(name, planner.smallest(chip)))} |"
                assert row in page, f"python -m radlads_jax.planning.table prints {row}"
