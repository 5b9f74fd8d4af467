"""The choice of softmax layers by the mixers that a run of stage 1 has trained."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from absl import flags
from untrained import TEACHER, save_teacher, student_of

from radlads_jax import choose
from radlads_jax.decoding.loaded import load_model
from radlads_jax.evaluation import layer_choice
from radlads_jax.evaluation.layer_choice import Sizes
from radlads_jax.models import bind
from radlads_jax.porting.config_keys import read_config
from radlads_jax.run import fingerprint

CFG = dataclasses.replace(TEACHER, stacks=(("attention", 4),), max_position_embeddings=512)


def choose_beside(teacher, student, *more):
    values = flags.FlagValues()
    choose.define_flags(values)
    values(["choose", f"--model={teacher}", "--keep=1", f"--student={student}", *more])
    choose.main(values)


def test_the_mixers_of_a_run_of_stage_1_stand_in_the_layers(tmp_path, capsys):
    teacher = save_teacher(tmp_path, CFG)
    settings = tiny_run.settings(teacher, steps={"stage1": 2})
    tiny_run.convert(tmp_path / "run", settings)
    sizes = ["--prompts=2", "--texts=2", "--tokens=448", "--batch_size=2"]
    choose_beside(teacher, tmp_path / "run", f"--out={tmp_path}", *sizes)
    found = json.loads((tmp_path / "choice.json").read_text())
    assert found["mixer"]["name"] == "rad_rwkv7" and "RAD-RWKV7 in one layer at a time" in capsys.readouterr().out
    # Of the same text: with all layers swapped the student itself.
    loaded = load_model(tmp_path / "run", dtype="float32"), load_model(teacher, dtype="float32")
    batch = layer_choice.text_batch(loaded[1].tokenizer, Sizes(2, 2, 448, 2), None)
    student, own = (bind(m.cfg, m.params) for m in loaded)
    said = [d.logits(d.hidden(jnp.asarray(batch["tokens"]))[0]) for d in (student, own)]
    of_student, of_teacher = (jax.nn.log_softmax(logits) for logits in said)
    kl = jnp.mean(jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_student), -1))
    assert found["none kept"]["kl"] == pytest.approx(float(kl), rel=1e-4)


@pytest.mark.parametrize(
    ("stages", "layers", "more", "words"),
    [
        (None, (), [], r"is no run that is done; expected .*stages=stage1"),
        (["stage1", "stage2"], (), [], r"has trained stage1, stage2; expected"),
        (["stage1"], (2,), [], r"has softmax attention in the layers 2;"),
        (["stage1"], (), ["--window=8"], r"--window and --student are both given"),
        (["stage1"], (), ["--model={place}/other"], r"was made of another teacher than --model .*other"),
    ],
)
def test_a_student_whose_mixers_can_not_stand_there_is_refused(stages, layers, more, words, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(choose, "trained_stages", lambda _: stages)
    model, student = save_teacher(tmp_path, CFG), student_of(CFG, "rad_rwkv7", layers)
    other = shutil.copytree(model, tmp_path / "other") / "config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"rope_theta": 5000.0}))
    read = choose.read_model_config
    monkeypatch.setattr(choose, "read_model_config", lambda path: student if str(path).endswith("/run") else read(path))
    began = {"teacher": fingerprint.of_teacher(model, read_config(model))}
    monkeypatch.setattr(fingerprint, "written", lambda _: began)
    with pytest.raises(ValueError, match=words):
        choose_beside(model, "run", *(word.format(place=tmp_path) for word in more))
