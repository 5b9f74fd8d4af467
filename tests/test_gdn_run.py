"""A whole tiny conversion to Gated DeltaNet: trained, exported as dense Qwen3.5, read back."""

import pytest
import tiny_run
from untrained import TEACHER, save_teacher

from radlads_jax.decoding.loaded import load_model
from radlads_jax.porting.config_keys import read_config
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run.metrics import MetricsLogger


def test_a_run_ends_in_a_model_that_engines_know(tmp_path):
    settings = tiny_run.settings(save_teacher(tmp_path / "teacher"), "gdn", {"stage1": 4})
    settings |= {"student.attention_every": 2, "student.init": "calibrated", "student.kv_heads": "cloned"}
    summary = tiny_run.convert(tmp_path / "run", settings)
    assert summary["stages"][0]["last_loss"] < summary["stages"][0]["first_loss"]
    keys = read_config(tmp_path / "run" / "export")
    assert keys["architectures"] == ["Qwen3_5ForCausalLM"] and "auto_map" not in keys
    assert keys["layer_types"] == ["linear_attention", "full_attention"]
    assert "biases of q, k and v" in (tmp_path / "run" / "export" / "README.md").read_text()
    model = load_model(tmp_path / "run", dtype="float32")
    assert model.cfg.num_layers == TEACHER.num_layers and model.cfg.layer_mixers == ("gdn", "attention")


class Killed(Exception):
    """In the place of a machine that is taken away."""


@pytest.mark.slow
def test_every_stage_in_bfloat16_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """With a layer's values kept, its products alone, or nothing; losses are those without the stop, bit for bit."""
    stages = ("stage1", "stage2", "stage2a", "stage3")
    settings = tiny_run.settings(save_teacher(tmp_path / "teacher"), "gdn", dict.fromkeys(stages, 3))
    settings |= {"student.attention_every": 2, "student.init": "calibrated"}
    settings |= dict.fromkeys(("dtype", "teacher.dtype", "export.dtype"), "bfloat16")
    settings |= {"stage1.remat": "none", "stage2.remat": "dots", "stage3.accumulate": 2}
    tiny_run.convert(tmp_path / "whole", settings)
    log = MetricsLogger.log

    def log_and_die(self, name, step, values):
        log(self, name, step, values)
        if (name, step) == ("stage2a", 3):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", log_and_die)
        with pytest.raises(Killed):
            tiny_run.convert(tmp_path / "parts", settings)
    summary = tiny_run.convert(tmp_path / "parts", settings)
    whole, parts = (
        [(row["stage"], row["step"], row["loss"]) for row in read_metrics(tmp_path / run)] for run in ("whole", "parts")
    )
    assert parts == whole and len(whole) == 12
    assert [stage["name"] for stage in summary["stages"]] == list(stages)
    assert (tmp_path / "parts" / "report" / "index.html").exists()
