"""A whole conversion of a tiny teacher: what it leaves behind, and that stopping it anywhere changes nothing."""

import dataclasses
import json
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from untrained import TEACHER, save_teacher

from radlads_jax.models import abstract_params, bind
from radlads_jax.models.tree import path_leaves
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import train
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.run.settings import check_same_config, remember_config
from radlads_jax.system.stopping import Interrupted

# Stages 1 and 2 then save both in their middle and at their end.
SETTINGS = {"train.log_every": 2, "train.checkpoint_every": 3}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def run(teacher, workdir, **more) -> dict:
    return tiny_run.convert(workdir, tiny_run.settings(teacher) | SETTINGS | more)


@pytest.fixture(scope="module")
def finished(teacher_dir, tmp_path_factory):
    """(work directory, summary) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(teacher_dir, workdir)


def exported(workdir):
    return (workdir / "export" / "model.safetensors").read_bytes()


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def test_summary(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert set(summary["teacher"]) == {"loss", "top1"}
    assert set(summary["student"]) == {"loss", "top1", "kl", "agreement"}
    assert [s["name"] for s in summary["stages"]] == ["stage1", "stage2", "stage3"]
    assert [s["steps"] for s in summary["stages"]] == list(tiny_run.STEPS.values())
    assert all(s["tokens"] == s["steps"] * 128 and s["tokens_per_second"] > 0 for s in summary["stages"])
    # Five steps move stage 1's loss by less than its batches differ.
    assert all(s["peak_bytes"] > 1e8 for s in summary["stages"])
    assert all(s["last_loss"] < s["first_loss"] for s in summary["stages"][1:])
    assert 0 < summary["student"]["agreement"] <= 1 and summary["student"]["kl"] > 0
    assert summary["relative_top1"] == pytest.approx(summary["student"]["top1"] / summary["teacher"]["top1"])
    assert set(summary["control"]) == {"loss", "top1", "kl", "agreement", "relative_top1"}
    # A window of 64 sees all of a row of 32.
    assert summary["control"]["loss"] == pytest.approx(summary["teacher"]["loss"], rel=1e-5)
    assert summary["control"]["kl"] == pytest.approx(0, abs=1e-5) and summary["control"]["relative_top1"] == 1
    assert len(summary["samples"]) == 2 and (workdir / "samples.md").exists()


def test_metrics_hold_every_step_once(finished):
    records = read_metrics(finished[0])
    steps = [(r["stage"], r["step"]) for r in records]
    assert steps == [(name, i + 1) for name, n in tiny_run.STEPS.items() for i in range(n)]
    first = records[0]
    assert [r["tokens"] for r in records[:2]] == [128, 256]
    assert first["finite"] == 1 and len(first["layer_loss"]) == 2
    assert first["loss"] == pytest.approx(np.mean(first["layer_loss"]), rel=1e-5)
    assert list((finished[0] / "tensorboard" / "stage1").glob("events*"))


def test_export_is_the_student(finished):
    """The exported directory read back: the same config and weights as the last checkpoint's."""
    workdir, _ = finished
    cfg = model_config_from_hf(read_config(workdir / "export"))
    params = load_params(workdir / "export", cfg, dtype="float32")
    with Checkpoints(workdir / "checkpoints" / "stage3") as checkpoints:
        last = checkpoints.restore_params(tiny_run.STEPS["stage3"], abstract_params(cfg))
    for path, leaf in path_leaves(last).items():
        np.testing.assert_array_equal(path_leaves(params)[path], leaf, err_msg=path)
    assert cfg.recurrent_mixer == "rad_rwkv7" and not cfg.tie_embeddings
    hidden, _ = bind(dataclasses.replace(cfg, dtype="float32"), params).hidden(jnp.ones((1, 8), jnp.int32))
    assert np.isfinite(hidden).all()
    names = {path.name for path in (workdir / "export").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names


def test_a_finished_run_does_nothing(finished, teacher_dir, capsys):
    workdir, summary = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert run(teacher_dir, workdir) == summary
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.parametrize(
    ("stage", "step", "signum"),
    [("stage1", 1, signal.SIGTERM), ("stage1", 4, signal.SIGINT), ("stage2", 4, signal.SIGTERM)],
)
def test_a_stopped_run_continues_to_the_same_bits(
    finished, teacher_dir, tmp_path, monkeypatch, capsys, stage, step, signum
):
    log = MetricsLogger.log

    def log_and_stop(self, name, at, values):
        log(self, name, at, values)
        if (name, at) == (stage, step):
            signal.raise_signal(signum)

    monkeypatch.setattr(MetricsLogger, "log", log_and_stop)
    with pytest.raises(Interrupted, match=f"stopped by {signal.Signals(signum).name}"):
        run(teacher_dir, tmp_path)
    assert not (tmp_path / "export").exists() and not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(MetricsLogger, "log", log)
    capsys.readouterr()
    summary = run(teacher_dir, tmp_path)
    said = capsys.readouterr().out
    assert "continuing from the checkpoint of step" in said or "steps are done already" in said
    workdir, undisturbed = finished
    assert summary["student"] == undisturbed["student"]
    assert exported(tmp_path) == exported(workdir)
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(workdir))


def test_other_settings_do_not_continue_a_run(tmp_path):
    remember_config(tmp_path, {"seed": 0, "train": {"log_every": 1}, "stages": ("stage1",)})
    check_same_config(tmp_path, {"seed": 0, "train": {"log_every": 5}, "stages": ("stage1",)})
    with pytest.raises(ValueError, match=r"config\.seed was 0 and is now 1"):
        check_same_config(tmp_path, {"seed": 1, "train": {"log_every": 5}, "stages": ("stage1",)})


def test_frozen_and_hybrid_and_retied(teacher_dir, tmp_path):
    hybrid = {"stages": ("stage1", "stage2"), "student.mixer": "rad_rwkv6", "student.attention_layers": (1,)}
    run(teacher_dir, tmp_path, **hybrid, **{"stage2.freeze": ("mlp", "embed"), "export.retie": True})
    base = load_params(teacher_dir, TEACHER, dtype="float32")
    cfg = model_config_from_hf(read_config(tmp_path / "export"))
    assert cfg.tie_embeddings and cfg.layer_mixers == ("rad_rwkv6", "attention")
    student = load_params(tmp_path / "export", cfg, dtype="float32")
    np.testing.assert_array_equal(student["embed"]["embedding"], base["embed"]["embedding"])
    for i in range(2):
        np.testing.assert_array_equal(
            student["stacks"][i]["mlp"]["up"]["kernel"][0], base["stacks"][0]["mlp"]["up"]["kernel"][i]
        )
    kept, original = student["stacks"][1]["mixer"], base["stacks"][0]["mixer"]
    assert not np.array_equal(kept["q"]["kernel"][0], original["q"]["kernel"][1])


def test_non_finite_losses_end_the_run(teacher_dir, tmp_path):
    broken = load_params(teacher_dir, TEACHER, dtype="float32")
    broken["norm"]["scale"] = broken["norm"]["scale"].at[3].set(jnp.nan)
    save_params(broken, TEACHER, tmp_path / "teacher", base_config=read_config(teacher_dir), tokenizer_from=teacher_dir)
    with pytest.raises(train.TooManyNonFinite, match="stage2: the 3 steps from 1 to 3 had"):
        run(tmp_path / "teacher", tmp_path / "run", **{"stages": ("stage2",), "train.max_skipped": 2})
    assert not (tmp_path / "run" / "export").exists()
