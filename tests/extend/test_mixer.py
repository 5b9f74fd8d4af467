"""A mixer of a stranger's, registered and nothing else: the whole house serves it."""

import dataclasses
import json
import signal

import ema
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from untrained import TEACHER, random_params, save_teacher, student_of

from radlads_jax import config
from radlads_jax.decoding.generation import generate
from radlads_jax.decoding.loaded import load_model, state_bytes
from radlads_jax.models import MIXERS, bind, init_state
from radlads_jax.models.mixers import mixer_titles
from radlads_jax.planning.planner import make_planner
from radlads_jax.porting.model_card import write_model_card
from radlads_jax.porting.writers import writer_for
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.reporting.sections import write_report
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.system.stopping import Interrupted

STEPS = {"stage1": 8, "stage2": 2}
MORE = {"train.checkpoint_every": 2, "student.attention_layers": (1,)}


@pytest.fixture(autouse=True, scope="module")
def registered():
    MIXERS["ema"] = ema.SPEC
    yield
    del MIXERS["ema"]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def run(teacher, workdir, **more):
    return tiny_run.convert(workdir, tiny_run.settings(teacher, "ema", STEPS) | MORE | more)


@pytest.fixture(scope="module")
def finished(teacher_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run(teacher_dir, workdir)


def test_decoding_token_by_token_is_the_prefill():
    cfg = student_of(TEACHER, "ema", (1,))
    decoder = bind(cfg, random_params(cfg))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 300, (2, 12)), jnp.int32)
    segments = jnp.asarray([[1] * 12, [1] * 5 + [2] * 7], jnp.int32)
    whole, _ = decoder.hidden(tokens, segment_ids=segments)
    state, parts = init_state(cfg, 2, 12), []
    assert {x.ndim for x in state["stacks"][0].values()} == {4, 3}, "two arrays of different rank, layers leading"
    for t in range(12):
        part, state = decoder.hidden(tokens[:, t : t + 1], segment_ids=segments[:, t : t + 1], state=state)
        parts.append(part)
    # Positions count on in a state, and start anew in no segment: both calls are told nothing of them.
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=2e-5, atol=2e-6)


def test_it_is_converted_and_reported(finished):
    workdir, summary = finished
    assert [line["steps"] for line in summary["stages"]] == list(STEPS.values())
    assert summary["stages"][0]["last_loss"] < summary["stages"][0]["first_loss"]
    (workdir / "config.json").write_text(json.dumps({"student": {"mixer": "ema"}}))
    assert "moving average" in write_report(workdir, mixers=mixer_titles()).read_text()
    card = (workdir / "export" / "README.md").read_text()
    assert "# moving average student" in card and "half-life at the start | 8 tokens" in card


def test_it_is_read_back_and_continues_text(finished):
    workdir, _ = finished
    model = load_model(workdir, dtype="float32")
    assert model.cfg.mixer == ema.EmaOptions() and model.cfg.layer_mixers == ("ema", "attention")
    steps = list(generate(model, [[5, 6, 7]], max_tokens=4))
    assert 0 < sum(len(step.tokens[0]) for step in steps) <= 4
    # One recurrent layer: a mean of 4 heads x 8 and a last value of 32, both float32; keys and values beside it.
    grows = 2 * 4 * TEACHER.num_kv_heads * TEACHER.head_dim
    assert state_bytes(model.cfg, 10) == 4 * 32 + 4 * 32 + 10 * grows


def test_eight_devices_learn_what_one_does(finished, teacher_dir, tmp_path):
    mesh = {f"mesh.{axis}": 2 for axis in ("data", "fsdp", "tensor")}
    run(teacher_dir, tmp_path, **mesh, **{"train.sample_prompts": ()})
    losses = [[record["loss"] for record in read_metrics(directory)] for directory in (finished[0], tmp_path)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_a_stopped_run_continues_to_the_same_bits(finished, teacher_dir, tmp_path, monkeypatch):
    log = MetricsLogger.log

    def log_and_stop(self, name, at, values):
        log(self, name, at, values)
        if (name, at) == ("stage2", 1):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLogger, "log", log_and_stop)
    with pytest.raises(Interrupted):
        run(teacher_dir, tmp_path)
    monkeypatch.setattr(MetricsLogger, "log", log)
    run(teacher_dir, tmp_path)
    exports = [(directory / "export" / "model.safetensors").read_bytes() for directory in (finished[0], tmp_path)]
    assert exports[0] == exports[1]


def test_it_is_planned(teacher_dir):
    chosen = config.defaults()
    settings = tiny_run.settings(teacher_dir, "ema", STEPS) | {f"{name}.batch_size": 8 for name in STEPS}
    chosen.update_from_flattened_dict(settings)
    plan = make_planner(config.validate(chosen), {}).topology("h100:8")
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert stages.keys() == STEPS.keys() and all(stage["fits"] and stage["usd"] > 0 for stage in stages.values())
    assert stages["stage1"]["parameter_bytes"] > 0


def test_a_students_settings_are_checked_and_its_reader_is_named():
    with pytest.raises(ValueError, match=r"gate.*ema"):
        MIXERS["ema"].choose(32, gate="full")
    with pytest.raises(ValueError, match="half_life"):
        MIXERS["ema"].choose(32, half_life=0)
    cfg = student_of(TEACHER, "ema", half_life=3)
    read_by = writer_for(cfg).readers(cfg)
    assert not read_by["radlads_jax"] and "no torch code" in read_by["transformers"][0]
    card = write_model_card(cfg, use=writer_for(cfg).use(cfg))
    assert "3 tokens" in card and "radlads_jax.generate" in card
    assert jax.tree.leaves(dataclasses.asdict(cfg.mixer)) == [3, False]
    assert json.dumps(ema.SPEC.published.write(cfg.mixer))
