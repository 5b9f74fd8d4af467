"""Plans by arithmetic alone, and what is refused before anything is compiled."""

import dataclasses

import pytest

from radlads_jax import plan
from radlads_jax.config import RunConfig, Teacher
from radlads_jax.planning import planner, plans


def test_a_gpu_plan_follows_what_is_computed_again_and_the_dtype():
    run = RunConfig(teacher=Teacher("Qwen/Qwen2.5-7B-Instruct"), stages=("stage2",))

    def planned(**fields):
        recipe = {"remat": fields.pop("remat", "full")}
        of_run = dataclasses.replace(run, stage2=dataclasses.replace(run.stage2, **recipe), **fields)
        return planner.make_planner(of_run, {}).topology("h100:64")["stages"][0]

    full, dots, none = (planned(remat=remat) for remat in ("full", "dots", "none"))
    assert full["peak_bytes"] < dots["peak_bytes"] < none["peak_bytes"]
    # 96 rows of 512 tokens over 64 chips, a part of a row each, 28 layers.
    results = 96 * 512 / 64 * 2 * 28 * (9 * 3584 + 3 * 18944)
    assert dots["peak_bytes"] - full["peak_bytes"] == pytest.approx(results, rel=1e-6)
    assert none["ideal_flops"] == none["model_flops"] < full["ideal_flops"]
    wide = planned(dtype="float32")
    assert wide["peak_bytes"] > full["peak_bytes"] and wide["step_seconds"] == 2 * full["step_seconds"]


def test_a_gpu_plan_counts_what_an_alignment_keeps():
    run = RunConfig(teacher=Teacher("Qwen/Qwen2.5-7B-Instruct"), stages=("stage1",))

    def peak(remat):
        of_run = dataclasses.replace(run, stage1=dataclasses.replace(run.stage1, remat=remat))
        return planner.make_planner(of_run, {}).topology("h100:4")["stages"][0]["peak_bytes"]

    # 32 rows of 512 tokens over 4 chips; no MLP is aligned.
    results = 32 * 512 / 4 * 2 * 28 * 9 * 3584
    assert peak("dots") - peak("full") == pytest.approx(results, rel=1e-6)
    assert peak("none") > peak("dots")


def test_results_that_can_not_be_written_are_told_before_compiling(tmp_path):
    (tmp_path / "taken").write_text("")
    for name, is_fine in (("out/plans.jsonl", True), ("taken/plans.jsonl", False), (".", False)):
        if is_fine:
            assert plan._results_file(str(tmp_path / name)) == tmp_path / name
            assert plans._read_results(tmp_path / name) == {}
        else:
            with pytest.raises(ValueError, match=r"--results is .*, which can not be written"):
                plan._results_file(str(tmp_path / name))
