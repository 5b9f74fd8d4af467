"""A sweep of a stage's rates: the best by held-out KL is what trains, trials are made once, and a stop loses none."""

import dataclasses
import json
import shutil
import signal

import jax
import pytest
import tiny_run
from ml_collections import ConfigDict
from untrained import save_teacher

from radlads_jax import config
from radlads_jax.models import sharding
from radlads_jax.planning import stage as planning_stage
from radlads_jax.run import heldout, rates, sweep, train
from radlads_jax.run.job import make_job
from radlads_jax.system.stopping import Interrupted

STEPS = {"stage2": 3}
# A trial of as many steps as the stage has is the stage itself: compiled once.
sweep.make_step = train.make_step


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def job_of(teacher, workdir, steps=STEPS, **more):
    values = config.defaults()
    # A rate at which a third and three times as much differ; the largest is far too high.
    chosen = tiny_run.settings(teacher, "window", steps) | {"train.sample_prompts": (), "data.eval_rows": 8}
    chosen["stage2.warmup_steps"] = 1
    chosen |= {f"stage2.{name}": 0.03 for name in ("lr", "lr_final", "mixer_lr", "mixer_lr_final")}
    flat = {name.replace("__", "."): value for name, value in more.items()}
    values.update_from_flattened_dict(chosen | flat)
    # Narrow enough that rows of 32 tokens tell the student from its teacher.
    values.student.options = ConfigDict({"window": 2, "sinks": 1})
    return make_job(config.validate(values), workdir)


@pytest.fixture(scope="module")
def swept(teacher, tmp_path_factory):
    """The summary and the work directory of a run with a sweep."""
    workdir = tmp_path_factory.mktemp("swept")
    return train.convert(job_of(teacher, workdir, stage2__sweep=True)), workdir


def test_the_rate_of_the_least_held_out_kl_trains(teacher, swept, tmp_path):
    """Trials of as many steps as the stage has are that stage: the KL of each is that of a run with its rate."""
    summary, workdir = swept
    trials = json.loads((workdir / "sweep.json").read_text())["stage2"]["trials"]
    alone = {}
    for factor in config.RATE_FACTORS:
        wanted = dict.fromkeys(("lr", "lr_final", "mixer_lr", "mixer_lr_final"), factor * 0.03)
        run = job_of(teacher, tmp_path / f"{factor:.1f}", **{f"stage2__{name}": rate for name, rate in wanted.items()})
        alone[factor] = train.convert(run)["student"]["kl"]
    assert [trial["factor"] for trial in trials] == list(alone)
    assert [trial["kl"] for trial in trials] == pytest.approx(list(alone.values()), rel=1e-5)
    assert len({round(kl, 3) for kl in alone.values()}) == 3
    assert summary["student"]["kl"] == min(alone.values())
    best = min(alone, key=alone.__getitem__)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr_mixer"] for line in lines][-1] == pytest.approx(0.03 * best)
    assert len(lines) == STEPS["stage2"]
    # What is told of the run are the rates that trained it, also when it is told later.
    assert summary["stages"][-1]["rates"]["mixer_lr"] == pytest.approx(0.03 * best)
    assert f"{0.03 * best:g} to {0.03 * best:g}" in (workdir / "export" / "README.md").read_text()
    shutil.copytree(workdir, tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    told = train.convert(job_of(teacher, tmp_path / "again", stage2__sweep=True))
    assert told["stages"][-1]["rates"] == summary["stages"][-1]["rates"]


def test_a_run_stopped_in_a_trial_makes_the_others_once(teacher, swept, tmp_path, monkeypatch):
    tried = []
    trial = sweep._trial

    def stopped_in_the_second(job, name, teacher, start, stopping):
        if len(tried) == 1:
            stopping = lambda: signal.SIGTERM  # noqa: E731
        tried.append(job.run.stage(name).lr)
        return trial(job, name, teacher, start, stopping)

    monkeypatch.setattr(sweep, "_trial", stopped_in_the_second)
    job = job_of(teacher, tmp_path, stage2__sweep=True)
    with pytest.raises(Interrupted, match=r"SIGTERM .*\btrial of stage2\b"):
        train.convert(job)
    assert tried == pytest.approx([0.01, 0.03])
    summary = train.convert(job)
    assert tried == pytest.approx([0.01, 0.03, 0.03, 0.09])
    assert summary["student"] == swept[0]["student"]


def test_a_stage_that_has_begun_keeps_its_rates(teacher, swept, tmp_path, monkeypatch):
    """Its trials are not made again, and where what they chose is gone it is refused."""
    stopped = iter([None] * 3 * STEPS["stage2"] + [None, signal.SIGINT])
    job = job_of(teacher, tmp_path, stage2__sweep=True)
    run_stage = train._run_stage
    monkeypatch.setattr(
        train, "_run_stage", lambda run, name: run_stage(dataclasses.replace(run, stopping=lambda: next(stopped)), name)
    )
    with pytest.raises(Interrupted, match="step 2 of 3"):
        train.convert(job)
    monkeypatch.undo()
    chosen = (tmp_path / "sweep.json").read_text()
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(ValueError, match=r"sweep\.json .*config\.stage2\.sweep"):
        train.convert(job)
    (tmp_path / "sweep.json").write_text(chosen)
    monkeypatch.setattr(sweep, "_trial", None)
    summary = train.convert(job)
    assert summary["student"] == swept[0]["student"] and summary["stages"][0]["rates"]["lr"] > 0
    # Of a stage that is done nothing depends on the file any more, and its rates are not known.
    assert sweep.taken(job, "stage2") is not None
    (tmp_path / "sweep.json").unlink()
    assert sweep.taken(job, "stage2") is None


def test_trials_of_other_settings_are_none(teacher, swept, tmp_path):
    (tmp_path / "sweep.json").write_bytes((swept[1] / "sweep.json").read_bytes())
    same = job_of(teacher, tmp_path, stage2__sweep=True)
    assert len(sweep._read(same, "stage2", begun=False)) == 3
    other = job_of(teacher, tmp_path, stage2__sweep=True, seed=1)
    assert sweep._read(other, "stage2", begun=False) == []
    (tmp_path / "sweep.json").write_text('{"stage2": {"trials": [{"kl": "low"}]}}')
    with pytest.raises(ValueError, match=r"sweep\.json: stage2 is .*remove it"):
        sweep._read(same, "stage2", begun=False)


def test_no_rate_that_is_finite_is_refused(teacher, tmp_path, monkeypatch):
    scores = {"student": {"kl": float("nan")}}
    monkeypatch.setattr(heldout, "evaluate_job", lambda *_: scores)
    monkeypatch.setattr(sweep, "_trained", lambda *_: None)
    with pytest.raises(ValueError, match=r"0\.01, 0\.03, 0\.09 the held-out KL was not finite.*config\.stage2\.lr"):
        train.convert(job_of(teacher, tmp_path, stage2__sweep=True))


def test_a_stage_that_the_kl_can_not_judge_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"config\.stage3\.sweep .*stage2, stage2a, stage2c"):
        job_of(teacher, tmp_path, {"stage3": 1}, stage3__sweep=True)


def test_preflight_and_plan_know_of_the_trials(teacher, tmp_path):
    steps = {"stage2": 300}
    mesh = sharding.one_device_mesh(jax.devices()[0])
    jobs = [job_of(teacher, tmp_path, steps, stage2__sweep=on, data__documents=1500) for on in (False, True)]
    plain, swept = (dataclasses.replace(job.stage_plan("stage2"), mesh=mesh) for job in jobs)
    assert "third or three times" not in rates.described([plain])
    assert "third or three times as much, by the held-out KL after 30 steps" in rates.described([swept])
    counted = {plan.run.stage2.sweep: planning_stage.by_arithmetic(plan) for plan in (plain, swept)}
    assert counted[True]["steps"] == counted[False]["steps"] + 3 * 30
