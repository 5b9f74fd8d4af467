"""A whole tiny conversion to Gated DeltaNet: trained, exported as dense Qwen3.5, read back."""

import tiny_run
from untrained import TEACHER, save_teacher

from radlads_jax.decoding.loaded import load_model
from radlads_jax.porting.config_keys import read_config


def test_a_run_ends_in_a_model_that_engines_know(tmp_path):
    settings = tiny_run.settings(save_teacher(tmp_path / "teacher"), "gdn", {"stage1": 4})
    summary = tiny_run.convert(tmp_path / "run", settings | {"student.attention_every": 2})
    assert summary["stages"][0]["last_loss"] < summary["stages"][0]["first_loss"]
    keys = read_config(tmp_path / "run" / "export")
    assert keys["architectures"] == ["Qwen3_5ForCausalLM"] and "auto_map" not in keys
    assert keys["text_config"]["layer_types"] == ["linear_attention", "full_attention"]
    assert "biases of q, k and v" in (tmp_path / "run" / "export" / "README.md").read_text()
    model = load_model(tmp_path / "run", dtype="float32")
    assert model.cfg.num_layers == TEACHER.num_layers and model.cfg.layer_mixers == ("gdn", "attention")
