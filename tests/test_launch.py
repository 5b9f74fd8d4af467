"""A whole conversion of a tiny teacher: what it leaves behind, and that stopping it anywhere changes nothing."""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from radlads_jax import launch, train
from radlads_jax.checkpoint import Checkpoints
from radlads_jax.config import defaults, validate
from radlads_jax.data import synthetic
from radlads_jax.job import make_job
from radlads_jax.metrics import MetricsLogger, read_metrics
from radlads_jax.models import ModelConfig, bind, init_params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.train_state import path_leaves

TEACHER = ModelConfig(
    "qwen2", 300, 32, 64, 4, 2, 8, (("attention", 2),), qkv_bias=True, tie_embeddings=True, max_position_embeddings=512
)


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("teacher") / "model"
    tokenizer_dir = tmp_path_factory.mktemp("tokenizer")
    synthetic.save_tokenizer(synthetic.train_tokenizer(300, count=200), tokenizer_dir)
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, init_params(TEACHER, 0))
    base = {"model_type": "qwen2", "eos_token_id": 0, "bos_token_id": 0}
    return save_params(params, TEACHER, directory, base_config=base, tokenizer_from=tokenizer_dir)


def tiny_config(teacher_dir, **changes) -> ConfigDict:
    config = defaults()
    config.dtype = config.teacher.dtype = config.export.dtype = "float32"
    config.teacher.path = str(teacher_dir)
    config.data.source, config.data.documents, config.data.eval_rows = "synthetic", 60, 32
    config.train.log_every, config.train.checkpoint_every = 2, 3
    config.train.sample_prompts, config.train.sample_tokens = ("This is a tale of", "What is"), 5
    for name, steps in (("stage1", 5), ("stage2", 4), ("stage3", 3)):
        stage = config[name]
        stage.seq_len, stage.batch_size, stage.tokens, stage.warmup_steps = 32, 4, 32 * 4 * steps, 2
        stage.lr = stage.mixer_lr = 3e-3
    config.update(changes)
    return config


def run(config: ConfigDict, workdir) -> dict:
    return train.convert(make_job(validate(config), workdir))


@pytest.fixture(scope="module")
def finished(teacher_dir, tmp_path_factory):
    """(work directory, summary) of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(tiny_config(teacher_dir), workdir)


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
    assert [s["steps"] for s in summary["stages"]] == [5, 4, 3]
    assert all(s["tokens"] == s["steps"] * 128 and s["tokens_per_second"] > 0 for s in summary["stages"])
    # Three steps on an untrained teacher's text say nothing of stage 3's loss.
    assert all(s["peak_bytes"] > 1e8 for s in summary["stages"])
    assert all(s["last_loss"] < s["first_loss"] for s in summary["stages"][:2])
    assert 0 < summary["student"]["agreement"] <= 1 and summary["student"]["kl"] > 0
    assert summary["relative_top1"] == pytest.approx(summary["student"]["top1"] / summary["teacher"]["top1"])
    assert len(summary["samples"]) == 2 and (workdir / "samples.md").exists()


def test_metrics_hold_every_step_once(finished):
    records = read_metrics(finished[0])
    steps = [(r["stage"], r["step"]) for r in records]
    assert steps == [(name, i + 1) for name, n in (("stage1", 5), ("stage2", 4), ("stage3", 3)) for i in range(n)]
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
        last = checkpoints.restore_params(3, jax.eval_shape(lambda: init_params(cfg, 0)))
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
    assert run(tiny_config(teacher_dir), workdir) == summary
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
    with pytest.raises(train.Interrupted, match=f"stopped by {signal.Signals(signum).name}"):
        run(tiny_config(teacher_dir), tmp_path)
    assert not (tmp_path / "export").exists() and not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(MetricsLogger, "log", log)
    capsys.readouterr()
    summary = run(tiny_config(teacher_dir), tmp_path)
    said = capsys.readouterr().out
    assert "continuing from the checkpoint of step" in said or "steps are done already" in said
    workdir, undisturbed = finished
    assert summary["student"] == undisturbed["student"]
    assert exported(tmp_path) == exported(workdir)
    assert without_times(read_metrics(tmp_path)) == without_times(read_metrics(workdir))


def test_other_settings_do_not_continue_a_run(tmp_path):
    launch.remember_config(tmp_path, {"seed": 0, "train": {"log_every": 1}, "stages": ("stage1",)})
    launch.check_same_config(tmp_path, {"seed": 0, "train": {"log_every": 5}, "stages": ("stage1",)})
    with pytest.raises(ValueError, match=r"config\.seed was 0 and is now 1"):
        launch.check_same_config(tmp_path, {"seed": 1, "train": {"log_every": 5}, "stages": ("stage1",)})


def test_frozen_and_hybrid_and_retied(teacher_dir, tmp_path):
    config = tiny_config(teacher_dir, stages=("stage1", "stage2"))
    config.student.mixer, config.student.attention_layers = "rad_rwkv6", (1,)
    config.stage2.freeze = ("mlp", "embed")
    config.export.retie = True
    run(config, tmp_path)
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
    config = tiny_config(tmp_path / "teacher", stages=("stage2",))
    config.train.max_skipped = 2
    with pytest.raises(train.TooManyNonFinite, match="stage2: the 3 steps from 1 to 3 had"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()
