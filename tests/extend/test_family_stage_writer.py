"""A family, a stage and an export format of a stranger's, registered and nothing else."""

import dataclasses
import json

import mixers_alone
import numpy as np
import plain
import pytest
import tern
import tiny_run
from safetensors.numpy import load_file
from untrained import TEACHER, random_params, save_teacher, student_of

from radlads_jax import config
from radlads_jax.decoding.loaded import load_model
from radlads_jax.distill.stages import STAGES, add_stage
from radlads_jax.models import bind
from radlads_jax.models.tree import path_leaves
from radlads_jax.planning.cost import model_flops
from radlads_jax.planning.planner import make_planner
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.families import FAMILIES
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.porting.writers import WRITERS
from radlads_jax.run.exporting import export_again
from radlads_jax.run.job import make_job

TERN = dataclasses.replace(TEACHER, family="tern", qkv_bias=False, qk_norm=True, max_position_embeddings=64)
STEPS = {"stage1": 2, mixers_alone.NAME: 3}


@pytest.fixture(autouse=True, scope="module")
def registered():
    FAMILIES["tern"], WRITERS["plain"] = tern.FAMILY, plain.WRITER
    add_stage(mixers_alone.NAME, mixers_alone.STAGE)
    yield
    del FAMILIES["tern"], STAGES[mixers_alone.NAME], WRITERS["plain"]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"), TERN)


@pytest.fixture(scope="module")
def finished(teacher_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, tiny_run.convert(workdir, tiny_run.settings(teacher_dir, "rad_rwkv6", STEPS))


def test_a_teacher_of_the_family_is_read_under_its_own_names(teacher_dir):
    stored = load_file(teacher_dir / "model.safetensors")
    assert "tern.blocks.1.self_attn.q_norm.weight" in stored and "tern.embed_tokens.weight" in stored
    written = read_config(teacher_dir)
    assert (written["architectures"], written["tern_wings"]) == (["TernForCausalLM"], 2)
    cfg = model_config_from_hf(written)
    assert cfg == TERN
    read = path_leaves(load_params(teacher_dir, cfg, dtype="float32"))
    for path, value in path_leaves(random_params(TERN, 0.08)).items():
        np.testing.assert_array_equal(read[path], value, err_msg=path)


@pytest.mark.parametrize("cfg", [student_of(TERN, "gdn", (1,)), TERN], ids=["hybrid", "softmax"])
def test_a_gdn_student_of_the_family_is_written_as_engines_read_it(cfg, tmp_path):
    """Under Qwen3.5's names, and without the family's own keys; with all layers softmax too."""
    params = random_params(cfg)
    served = save_params(
        params, cfg, tmp_path / "served", base_config={"model_type": "tern", "tern_wings": 2}, writer="qwen3_5"
    )
    assert "tern_wings" not in read_config(served)
    back = model_config_from_hf(read_config(served))
    assert back.family == "qwen3_5_text"
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24))
    first, second = (bind(of, values) for of, values in ((cfg, params), (back, load_params(served, back))))
    expected, got = (np.asarray(decoder.logits(decoder.hidden(tokens)[0]), np.float64) for decoder in (first, second))
    assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) < 1e-5


def test_what_the_family_refuses_is_told(teacher_dir):
    with pytest.raises(ValueError, match="tern_wings"):
        model_config_from_hf(read_config(teacher_dir) | {"tern_wings": 3})


def test_the_stage_trains_what_it_says(finished):
    workdir, summary = finished
    assert [line["name"] for line in summary["stages"]] == list(STEPS)
    assert summary["stages"][1]["loss"] == mixers_alone.STAGE.loss
    assert mixers_alone.STAGE.loss in (workdir / "report" / "index.html").read_text()
    assert f"| {mixers_alone.NAME} | the mixers, KL to the teacher" in (workdir / "export" / "README.md").read_text()
    # Nothing but the mixers has moved from the teacher's values.
    model = load_model(workdir, dtype="float32")
    assert (model.cfg.family, model.cfg.qk_norm) == ("tern", True)
    before = path_leaves(random_params(TERN, 0.08))
    after = path_leaves(model.params)
    same = {path for path, value in after.items() if path in before and np.array_equal(value, before[path])}
    assert {path for path in after if "/mixer/" not in path and not path.startswith("head")} <= same
    assert "stacks/0/mixer/q/kernel" not in same


def test_a_new_stage_reorders_no_run(teacher_dir, tmp_path):
    first = ("pretrain", "stage1", "stage2", "stage2a", "stage3")
    assert [STAGES[name].order_seed(3) for name in first] == [15, 16, 17, 18, 19]
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings(teacher_dir, "rad_rwkv6", STEPS))
    job = make_job(config.validate(chosen), tmp_path)
    first, own = (next(job.batches(name))["tokens"] for name in STEPS)
    assert not np.array_equal(first, own)


def test_the_stage_is_planned(teacher_dir):
    chosen = config.defaults()
    settings = tiny_run.settings(teacher_dir, "rad_rwkv6", STEPS) | {f"{name}.batch_size": 8 for name in STEPS}
    chosen.update_from_flattened_dict(settings)
    stages = make_planner(config.validate(chosen), {}).topology("h100:8")["stages"]
    assert [stage["name"] for stage in stages] == list(STEPS) and all(stage["fits"] for stage in stages)


def test_its_settings_are_checked_as_any_stages(teacher_dir):
    chosen = config.defaults()
    assert chosen[mixers_alone.NAME].batch_size == 8
    chosen.update_from_flattened_dict(tiny_run.settings(teacher_dir, "rad_rwkv6", STEPS))
    chosen[mixers_alone.NAME].accumulate = 3
    with pytest.raises(ValueError, match=rf"config\.{mixers_alone.NAME}\.accumulate"):
        config.validate(chosen)
    with pytest.raises(ValueError, match="tokesn"):
        config.check_override(f"{mixers_alone.NAME}.tokesn", "5")


def test_a_setting_and_another_stages_id_are_no_stages():
    with pytest.raises(ValueError, match="'mesh'"):
        add_stage("mesh", mixers_alone.STAGE._replace(id=70_002))
    with pytest.raises(ValueError, match=rf"{STAGES['stage2'].id}, which is stage2's"):
        add_stage("another", mixers_alone.STAGE._replace(id=STAGES["stage2"].id))
    assert not {"mesh", "another"} & STAGES.keys() and "another" not in config.defaults()


def test_a_stage_may_count_its_own_flops(teacher_dir, monkeypatch):
    teacher = model_config_from_hf(read_config(teacher_dir))
    of_trained = model_flops(teacher, teacher, mixers_alone.NAME, 16)
    monkeypatch.setitem(STAGES, mixers_alone.NAME, mixers_alone.STAGE._replace(flops=lambda s, t, length: 5.0 * length))
    assert of_trained != model_flops(teacher, teacher, mixers_alone.NAME, 16) == 80.0


def test_a_stage_may_read_conversations(teacher_dir, tmp_path):
    """Then config.data.chats is its, which no other stage reads."""
    name, stage = "mixers_on_chats", mixers_alone.STAGE._replace(id=70_002, reads_chats=True)
    add_stage(name, stage)
    try:
        settings = tiny_run.settings(teacher_dir, "rad_rwkv6", {name: 1})
        chosen = config.defaults()
        chosen.update_from_flattened_dict(settings)
        with pytest.raises(ValueError, match=r"config\.data\.chats .* mixers_on_chats or stage2c"):
            config.validate(chosen)
        chosen.update_from_flattened_dict({"data.chats": "talk.jsonl"})
        assert config.validate(chosen).data.chats == "talk.jsonl"
        chosen.stages = ("stage1",)
        with pytest.raises(ValueError, match=r"config\.data\.chats .* nothing elsewhere"):
            config.validate(chosen)
    finally:
        del STAGES[name], config._ADDED[name]
        config.CHAT_STAGES.discard(name)


def test_the_writer_writes_its_own_format(finished, tmp_path):
    workdir, _ = finished
    target = export_again(workdir / "export", tmp_path / "plain", writer="plain")
    stored = load_file(target / "model.safetensors")
    model = load_model(workdir, dtype="float32")
    leaves = {path.replace("/", "."): value for path, value in path_leaves(model.params).items()}
    assert stored.keys() == {name for name in leaves if not name.startswith("head")}
    for name, value in stored.items():
        np.testing.assert_array_equal(value, leaves[name])
    assert json.loads((target / "config.json").read_text())["mixer"] == "rad_rwkv6"
    assert (target / "tokenizer.json").is_file()
    # Nobody is told to load it by transformers.
    assert "AutoModelForCausalLM" not in (target / "README.md").read_text()


def test_what_it_has_no_place_for_is_told_before_anything_is_written(tmp_path):
    deep = student_of(dataclasses.replace(TEACHER, stacks=(("attention", 3),)), "rad_rwkv6")
    with pytest.raises(ValueError, match=r"plain.*3 layers.*two layers"):
        save_params(random_params(deep), deep, tmp_path / "out", base_config={}, writer="plain")
    assert not (tmp_path / "out").exists()
