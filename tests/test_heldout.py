"""Scores on held-out rows: of the export at the end of a run, and of the student while it trains."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny_run
from untrained import TEACHER, random_params, save_teacher, student_of

from radlads_jax import config
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import ending, heldout
from radlads_jax.run.heldout import exported_student
from radlads_jax.run.job import make_job

STUDENT = student_of(TEACHER, "rad_rwkv7")


@pytest.mark.parametrize("retie", [False, True])
@pytest.mark.parametrize("export_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scored_weights_are_those_of_the_export(tmp_path, dtype, export_dtype, retie):
    cfg = dataclasses.replace(STUDENT, dtype=dtype)
    params = random_params(cfg)
    scored_cfg, scored = exported_student(config.Export(dtype=export_dtype, retie=retie), cfg, params)
    save_params(params, cfg, tmp_path / "export", base_config={}, dtype=export_dtype, retie=retie)
    written = model_config_from_hf(read_config(tmp_path / "export"))
    assert scored_cfg.tie_embeddings == written.tie_embeddings == retie
    expected = load_params(tmp_path / "export", written, dtype=dtype)
    assert ("head" in scored) == (not retie)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), scored, expected)


def test_a_run_scores_its_exported_weights(tmp_path, monkeypatch):
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings(save_teacher(tmp_path)))
    chosen.export.dtype, chosen.export.retie = "bfloat16", True
    job, scored = make_job(config.validate(chosen), tmp_path / "run"), []

    def evaluate(_, cfg, student, teacher):
        scored.append((cfg, student))
        raise RuntimeError("far enough")

    monkeypatch.setattr(ending, "_export", lambda *_: None)
    monkeypatch.setattr(ending, "write_report", lambda *_, **__: None)
    monkeypatch.setattr(heldout, "evaluate_job", evaluate)
    params = random_params(job.student)
    with pytest.raises(RuntimeError, match="far enough"):
        ending.finish(job, params, None, [])
    ((cfg, student),) = scored
    assert cfg.tie_embeddings and "head" in params and "head" not in student
    rounded = params["norm"]["scale"].astype("bfloat16").astype(cfg.dtype)
    np.testing.assert_array_equal(np.asarray(student["norm"]["scale"]), np.asarray(rounded))


def test_retie_of_an_untied_teacher_is_refused_when_the_run_begins(tmp_path):
    teacher = save_teacher(tmp_path, dataclasses.replace(TEACHER, tie_embeddings=False))
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings(teacher) | {"export.retie": True})
    with pytest.raises(ValueError, match=rf"config\.export\.retie .*{re.escape(str(teacher))} .*tie_word_embeddings"):
        make_job(config.validate(chosen), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


STEPS = {"stage1": 4, "stage2": 5, "stage3": 2}
SCORED = {"train.eval_every": 2, "train.log_every": 3, "train.answer_tales": 8}


def test_scores_while_it_trains(tmp_path, capsys):
    """They are those that the same student has at the end, of stages that train it whole, and change nothing of it."""
    settings = tiny_run.settings(save_teacher(tmp_path), steps=STEPS) | {"train.sample_prompts": ()}
    summary = tiny_run.convert(tmp_path / "run", settings | SCORED)
    said = capsys.readouterr().out
    lines = read_metrics(tmp_path / "run")
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines) == sum(STEPS.values())
    assert all({"loss", "time", "grad_norm"} <= line.keys() for line in lines)
    scored = {(line["stage"], line["step"]): line for line in lines if "heldout_loss" in line}
    assert list(scored) == [("stage2", 2), ("stage2", 4), ("stage2", 5), ("stage3", 2)]
    assert {"heldout_kl", "heldout_top1", "heldout_agreement", "heldout_relative_top1"} <= scored["stage2", 5].keys()
    # Stage 3 has no teacher beside it.
    assert "heldout_kl" not in scored["stage3", 2]
    assert scored["stage3", 2]["heldout_loss"] == pytest.approx(summary["student"]["loss"], rel=1e-6)
    assert all(0 < line["heldout_seconds"] < 600 for line in scored.values())
    answered = {score["what"]: score["student"] for score in summary["answers"]["scores"]}
    assert answered["facts recalled"] == scored["stage3", 2]["heldout_facts_recalled"]
    assert f"stage2: after step 4 on held-out text: loss {scored['stage2', 4]['heldout_loss']:.4f}, KL " in said
    assert "Held-out text while training" in (tmp_path / "run" / "report" / "index.html").read_text()

    tiny_run.convert(tmp_path / "plain", settings)
    weights = [(tmp_path / run / "export" / "model.safetensors").read_bytes() for run in ("run", "plain")]
    assert weights[0] == weights[1]
    assert "Held-out text while training" not in (tmp_path / "plain" / "report" / "index.html").read_text()

    short = tiny_run.convert(tmp_path / "short", settings | {"stages": ("stage1", "stage2")})
    assert scored["stage2", 5]["heldout_kl"] == pytest.approx(short["student"]["kl"], rel=1e-5)


def test_a_step_whose_scores_fail_has_its_checkpoint(tmp_path, monkeypatch, capsys):
    """Whatever scoring needs and does not get, the next start goes on behind the step; the run is as if undisturbed."""
    settings = tiny_run.settings(save_teacher(tmp_path), steps={"stage2": 6}) | {
        "train.eval_every": 3,
        "train.checkpoint_every": 3,
    }
    whole = tiny_run.convert(tmp_path / "whole", settings)
    evaluate = heldout.evaluate_in_training
    for step in (3, 6):
        capsys.readouterr()
        monkeypatch.setattr(heldout, "evaluate_in_training", fail)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            tiny_run.convert(tmp_path / "run", settings)
        assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] == step
        assert (tmp_path / "run" / "checkpoints" / "stage2" / str(step)).exists()
        assert ("stage2: step 3 is without its scores" in capsys.readouterr().out) == (step == 6)
    monkeypatch.setattr(heldout, "evaluate_in_training", evaluate)
    assert tiny_run.convert(tmp_path / "run", settings)["student"] == whole["student"]
    assert "stage2: step 6 is without its scores" in capsys.readouterr().out


def fail(*_: object) -> None:
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_scores_where_no_stage_trains_the_student_whole_are_refused(tmp_path):
    chosen = config.defaults()
    chosen.update_from_flattened_dict(
        tiny_run.settings(save_teacher(tmp_path), steps={"stage1": 4}) | {"train.eval_every": 2}
    )
    with pytest.raises(ValueError, match=r"config\.train\.eval_every is 2 .*stage2.*Leave it out"):
        make_job(config.validate(chosen), tmp_path / "run")
