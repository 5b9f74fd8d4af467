"""A student that begins with the mixers of an earlier run's stage 1."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from untrained import TEACHER, TEACHER_WITH_GDN, save_teacher

from radlads_jax import config
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.models.tree import Params, flatten
from radlads_jax.run import earlier_mixers, softmax_layers
from radlads_jax.run.job import Job, make_job
from radlads_jax.run.settings import check_same_config, remember_config, with_whole_paths
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.run.train import convert, student_after

CFG = dataclasses.replace(TEACHER, stacks=(("attention", 4),), max_position_embeddings=512)
# Its layer 0 is gdn already, and softmax attention around layer 3, which is so too.
OWN = dataclasses.replace(TEACHER_WITH_GDN, stacks=(("gdn", 1), ("attention", 2), ("gdn", 1), ("attention", 1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """Of a teacher in model/ and of a run of stage 1 for each of two mixers; of one more, with layers of gdn itself."""
    place = tmp_path_factory.mktemp("earlier")
    save_teacher(place, CFG)
    for mixer in ("gdn", "rad_rwkv7"):
        run_to_its_end(place / mixer, tiny_run.settings(place / "model", mixer, {"stage1": 3}))
    save_teacher(place / "further", OWN)
    run_to_its_end(place / "further" / "gdn", tiny_run.settings(place / "further" / "model", "gdn", {"stage1": 3}))
    return place


def run_to_its_end(workdir: pathlib.Path, settings) -> dict[str, Any]:
    """As the command does, which keeps the settings."""
    job = job_of(workdir, settings)
    return convert(job, begun=lambda: remember_config(workdir, job.run.settings()))


def settings(place: pathlib.Path, mixer: str = "gdn", stages=("stage2",), **more):
    """Of a student that begins with that run's mixers, one layer of which stays softmax attention."""
    chosen = tiny_run.settings(place / "model", mixer, dict.fromkeys(stages, 2))
    return chosen | {"student.init_from": str(place / mixer), "student.attention_layers": (1,)} | more


def run_of(settings) -> config.RunConfig:
    chosen = config.defaults()
    chosen.update_from_flattened_dict(settings)
    return with_whole_paths(config.validate(chosen))


def job_of(workdir: pathlib.Path, settings) -> Job:
    return make_job(run_of(settings), workdir)


def by_layer(cfg, mixers: Params) -> dict[int, dict]:
    """Every layer's mixer, flat."""
    found = {}
    for i, stack in mixers["stacks"].items():
        for n in range(cfg.stacks[i][1]):
            layer = jax.tree.map(lambda x, n=n: np.asarray(x[n]), stack["mixer"])
            found[cfg.stack_starts[i] + n] = flatten(layer)
    return found


@pytest.mark.parametrize(
    ("where", "mixer", "converted"), [("", "gdn", [0, 2, 3]), ("", "rad_rwkv7", [0, 2, 3]), ("further", "gdn", [2, 4])]
)
def test_every_converted_layer_begins_as_the_earlier_run_left_it(where, mixer, converted, place, tmp_path):
    place = place / where
    job = job_of(tmp_path, settings(place, mixer))
    earlier = job_of(place / mixer, tiny_run.settings(place / "model", mixer, {"stage1": 3}))
    teacher = job.load_teacher("float32")
    now = by_layer(job.student, student_after(job, (), teacher, whole=False))
    of_all = earlier.load_teacher("float32")
    left = by_layer(earlier.student, student_after(earlier, ("stage1",), of_all, whole=False))
    fresh = by_layer(earlier.student, student_after(earlier, (), of_all, whole=False))
    assert sorted(now) == converted
    for layer, mixers in now.items():
        assert mixers.keys() == left[layer].keys()
        for name, value in mixers.items():
            np.testing.assert_array_equal(value, left[layer][name])
        assert any(not np.array_equal(value, fresh[layer][name]) for name, value in mixers.items())


def test_they_lie_on_a_mesh_as_the_students_own(place, tmp_path):
    job = job_of(tmp_path, settings(place))
    whole = earlier_mixers.load(job.earlier, job.student, None)
    mesh = mesh_lib.make_mesh(dataclasses.replace(job.run, mesh=dataclasses.replace(job.run.mesh, fsdp=4, tensor=2)))
    spread = earlier_mixers.load(job.earlier, job.student, mesh)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(spread))
    jax.tree.map(np.testing.assert_array_equal, whole, spread)


def test_a_run_of_stage_2_alone_says_what_it_began_with_and_needs_it_no_more(place, tmp_path, capsys):
    earlier, run = shutil.copytree(place / "gdn", tmp_path / "earlier"), tmp_path / "run"
    chosen = settings(place, **{"student.init_from": str(earlier)})
    summary = run_to_its_end(run, chosen)
    tokens = 3 * tiny_run.ROWS * tiny_run.TOKENS
    said = " ".join(capsys.readouterr().out.split())
    assert summary["earlier"]["tokens"] == tokens and [line["name"] for line in summary["stages"]] == ["stage2"]
    assert f"the converted layers begin with mixers of {earlier}, of {tokens} tokens of stage1" in said
    assert f"the mixers began as {tokens} tokens of an earlier stage 1 left them" in said
    card = (run / "export" / "README.md").read_text()
    row = next(line for line in card.split("\n") if line.startswith("| stage1, of an earlier run |"))
    assert f"| {tokens} | {tiny_run.TOKENS} | {tiny_run.ROWS} | 0.003 to 0.003, 0.003 to 0.003 |" in row
    assert "Its mixers began as an earlier run left them (text: synthetic)." in card
    assert "an earlier run's stage 1" in (run / "report" / "index.html").read_text()
    # To begin without them, or with those of another place, is another run.
    for other in ("", str(place / "gdn")):
        with pytest.raises(ValueError, match=r"config.student.init_from was '.*earlier' and is now '.*'"):
            check_same_config(run, run_of(chosen | {"student.init_from": other}).settings())
    shutil.rmtree(earlier)
    more = tiny_run.settings(place / "model", "gdn", {"stage2": 2, "stage3": 2}) | {
        name: value for name, value in chosen.items() if name.startswith("student.")
    }
    went_on = run_to_its_end(run, more)
    assert went_on["earlier"] == summary["earlier"] and len(went_on["stages"]) == 2
    assert not earlier.exists()
    shutil.rmtree(run / "earlier_mixers")
    (run / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"run/earlier_mixers: it is missing; expected the mixers that the run began"):
        job_of(run, more)


def test_tokens_of_a_run_that_began_with_anothers_are_counted_too(place, tmp_path):
    chosen = tiny_run.settings(place / "model", "gdn", {"stage1": 2}) | {"student.init_from": str(place / "gdn")}
    run_to_its_end(tmp_path / "second", chosen)
    job = job_of(tmp_path / "third", settings(place, **{"student.init_from": str(tmp_path / "second")}))
    assert job.earlier.said["tokens"] == 5 * tiny_run.ROWS * tiny_run.TOKENS


def test_the_softmax_layers_are_chosen_by_these_mixers(place, tmp_path):
    job = job_of(tmp_path / "run", settings(place, **{"student.attention_layers": ("auto:1",)}))
    teacher = TeacherWeights(job)
    decided = softmax_layers.decide(job, teacher)
    choice = json.loads((tmp_path / "run" / "choice.json").read_text())
    assert choice["mixer"]["name"] == "gdn" and list(decided.student.softmax_layers) == choice["layers"]
    convert(decided, teacher)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "forward passes of the teacher, with an earlier run's mixers in the others" in card


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"student.init_from": "{place}/model"},
            r"model is no run that has begun with stage 1 and is done",
        ),
        ({"student.init_from": "{place}/rad_rwkv7"}, r"has config.student.mixer=rad_rwkv7, and this one gdn; expected"),
        ({"student.conv_qk": 0.5}, r"has config.student.conv_qk=0.03, and this one 0.5; expected"),
        ({"student.kv_heads": "cloned"}, r"has config.student.kv_heads=teacher, and this one cloned"),
        ({"student.init": "calibrated"}, r"init_from is .* and config.student.init 'calibrated'; expected one of them"),
        ({"student.fresh_qkvo": True}, r"init_from is .* and config.student.fresh_qkvo is true; expected one of them"),
        ({"stage2.seq_len": 64}, r"held out 1,024 tokens .*eval_rows=32 holds out 2,048: .* \(16 would do\)"),
    ],
)
def test_what_does_not_fit_is_refused(more, words, place, tmp_path):
    more = {name: value.format(place=place) if isinstance(value, str) else value for name, value in more.items()}
    with pytest.raises(ValueError, match=words):
        job_of(tmp_path, settings(place, **more))


def test_what_is_told_of_the_mixers_is_compared_as_it_is_resolved(place, tmp_path):
    assert job_of(tmp_path, settings(place, **{"student.kv_heads": "teacher"})).earlier is not None


def test_mixers_that_are_not_as_they_were_saved_are_refused(place, tmp_path):
    run = shutil.copytree(place / "gdn", tmp_path / "gdn")
    sums = run / "checkpoints" / "stage1" / "3" / "sums" / "metadata"
    document = json.loads(sums.read_text())
    sums.write_text(json.dumps(document | {"arrays": dict.fromkeys(document["arrays"], 1)}))
    job = job_of(tmp_path / "run", settings(place, **{"student.init_from": str(run)}))
    with pytest.raises(ValueError, match=r"stage1: the checksum of .* expected the mixers that the run began with"):
        convert(job)


def rewritten(file: pathlib.Path, change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "summary.json",
            lambda it: it["stages"].insert(0, {"name": "pretrain"}),
            r"is no run that has begun with",
        ),
        ("summary.json", lambda it: it.update(stages=[{"name": "stage1"}]), r"has no checkpoint of its last step \("),
        ("summary.json", lambda it: it["stages"][0].update(steps=9), r"has no checkpoint of its last step .*stage1/9"),
        ("fingerprint.json", lambda it: it["teacher"]["config"].update(rope_theta=5.0), r"was made with another teach"),
        ("fingerprint.json", lambda it: it.update(tokenizer="x"), r"was made with another tokenizer; expected"),
        ("config.json", lambda it: it["stage1"].update(freeze=["mixer/o"]), r"has frozen mixer/o of its mixers, which"),
        ("config.json", lambda it: it["student"].update(attention_every=2), r"has kept softmax attention in some lay"),
    ],
)
def test_an_earlier_run_that_can_not_serve_is_refused(name, change, words, place, tmp_path):
    run = shutil.copytree(place / "gdn", tmp_path / "gdn")
    rewritten(run / name, change)
    with pytest.raises(ValueError, match=words):
        job_of(tmp_path / "run", settings(place, **{"student.init_from": str(run)}))


def test_an_earlier_run_may_have_gone_on_and_is_left_as_it_is(place, tmp_path):
    run = shutil.copytree(place / "gdn", tmp_path / "gdn")
    rewritten(run / "summary.json", lambda it: it["stages"].append({"name": "stage2"}))
    shutil.rmtree(run / "export")
    unfinished = run / "checkpoints" / "stage1" / "6.orbax-checkpoint-tmp"
    unfinished.mkdir()
    chosen = settings(place, **{"student.init_from": str(run)})
    assert earlier_mixers.load(job_of(tmp_path / "run", chosen).earlier, job_of(tmp_path, chosen).student, None)
    assert unfinished.exists()
