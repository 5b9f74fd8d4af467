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
from untrained import TEACHER, save_teacher

from radlads_jax import config
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.models import ModelConfig
from radlads_jax.models.gdn import GdnOptions
from radlads_jax.models.tree import Params, flatten
from radlads_jax.run import earlier_mixers, softmax_layers
from radlads_jax.run.job import Job, make_job
from radlads_jax.run.settings import check_same_config, remember_config, with_whole_paths
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.run.train import convert, student_after

CFG = dataclasses.replace(TEACHER, stacks=(("attention", 4),), max_position_embeddings=512)
# Its layer 0 is gdn already, and softmax attention around layer 3, which is so too.
OWN = ModelConfig(
    "qwen3_5_text",
    300,
    32,
    48,
    2,
    1,
    16,
    (("gdn", 1), ("attention", 2), ("gdn", 1), ("attention", 1)),
    qk_norm=True,
    zero_centred_norms=True,
    output_gate=True,
    rotary_size=8,
    tie_embeddings=True,
    max_position_embeddings=512,
    mixer=GdnOptions(2, 4, 8, 8),
)


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


def test_a_run_of_stage_2_alone_says_what_it_began_with(place, tmp_path, capsys):
    summary = run_to_its_end(tmp_path / "run", settings(place))
    tokens = 3 * tiny_run.ROWS * tiny_run.TOKENS
    said = " ".join(capsys.readouterr().out.split())
    assert summary["earlier"] == {"tokens": tokens} and [line["name"] for line in summary["stages"]] == ["stage2"]
    assert f"its mixers are those of {place / 'gdn'}, trained on {tokens} tokens of stage 1" in said
    assert f"the mixers began as {tokens} tokens of an earlier stage 1 left them" in said
    assert "earlier run" in said
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert f"Its mixers began as {tokens} more tokens of an earlier run's stage 1 left them." in card
    assert "an earlier run's stage 1" in (tmp_path / "run" / "report" / "index.html").read_text()
    # Where the earlier run lies is not what counts; what it holds is.
    moved = shutil.copytree(place / "gdn", tmp_path / "moved")
    more = settings(place, stages=("stage2", "stage3"), **{"student.init_from": str(moved)})
    assert job_of(tmp_path / "run", more).earlier.contents
    other = tmp_path / "other"
    run_to_its_end(other, tiny_run.settings(place / "model", "gdn", {"stage1": 3}) | {"seed": 7})
    with pytest.raises(ValueError, match=r"the init_from of the run .* is another .* put the mixers back"):
        job_of(tmp_path / "run", more | {"student.init_from": str(other)})
    # To begin without is another run.
    with pytest.raises(ValueError, match=r"config.student.init_from was '.*gdn' and is now ''"):
        check_same_config(tmp_path / "run", run_of(more | {"student.init_from": ""}).settings())
    # A finished run has no need of it any more.
    shutil.rmtree(moved)
    assert job_of(tmp_path / "run", settings(place, **{"student.init_from": str(moved)})).earlier is None


def test_the_softmax_layers_are_chosen_by_these_mixers(place, tmp_path):
    job = job_of(tmp_path / "run", settings(place, **{"student.attention_layers": ("auto:1",)}))
    teacher = TeacherWeights(job)
    decided = softmax_layers.decide(job, teacher)
    choice = json.loads((tmp_path / "run" / "choice.json").read_text())
    assert choice["mixer"]["name"] == "gdn" and list(decided.student.softmax_layers) == choice["layers"]
    convert(decided, teacher)
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "forward passes of the teacher, with these mixers in the others" in card


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"student.init_from": "{place}/model"}, r"init_from .*model is no run that is done; expected a run with"),
        ({"student.init_from": "{place}/rad_rwkv7"}, r"was told config.student.mixer 'rad_rwkv7', and this one 'gdn'"),
        ({"student.conv_qk": 0.5}, r"was told config.student.conv_qk 0.0, and this one 0.5"),
        ({"student.kv_heads": "cloned"}, r"was told config.student.kv_heads '', and this one 'cloned'"),
        ({"student.init": "calibrated"}, r"init_from is .* and config.student.init 'calibrated'; expected one of them"),
        ({"student.fresh_qkvo": True}, r"init_from is .* and config.student.fresh_qkvo is true; expected one of them"),
    ],
)
def test_what_does_not_fit_is_refused(more, words, place, tmp_path):
    more = {name: value.format(place=place) if isinstance(value, str) else value for name, value in more.items()}
    with pytest.raises(ValueError, match=words):
        job_of(tmp_path, settings(place, **more))


def test_mixers_that_are_not_as_they_were_saved_are_refused(place, tmp_path):
    run = shutil.copytree(place / "gdn", tmp_path / "gdn")
    sums = run / "checkpoints" / "stage1" / "3" / "sums" / "metadata"
    document = json.loads(sums.read_text())
    sums.write_text(json.dumps(document | {"arrays": dict.fromkeys(document["arrays"], 1)}))
    job = job_of(tmp_path / "run", settings(place, **{"student.init_from": str(run)}))
    with pytest.raises(ValueError, match=r"init_from .*gdn: the checksum of .* expected its checkpoint of step 3"):
        student_after(job, (), job.load_teacher("float32"), whole=False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("stages", r"has trained stage1, stage2; expected"),
        ("teacher", r"was made of another teacher; expected"),
        ("freeze", r"has frozen mixer/o of its mixers, which no checkpoint holds; expected"),
        ("checkpoint", r"has no .*stage1/3 any more; expected the checkpoint"),
        ("hybrid", r"has softmax attention in the layers 2; expected"),
    ],
)
def test_an_earlier_run_that_can_not_serve_is_refused(changed, words, place, tmp_path, monkeypatch):
    run = shutil.copytree(place / "gdn", tmp_path / "gdn")

    def rewrite(name, change):
        document = json.loads((run / name).read_text())
        change(document)
        (run / name).write_text(json.dumps(document))

    if changed == "stages":
        rewrite("summary.json", lambda summary: summary["stages"].append({"name": "stage2"}))
    elif changed == "teacher":
        rewrite("fingerprint.json", lambda found: found["teacher"]["config"].update(rope_theta=5.0))
    elif changed == "freeze":
        rewrite("config.json", lambda settings: settings["stage1"].update(freeze=["mixer/o"]))
    elif changed == "checkpoint":
        shutil.rmtree(run / "checkpoints" / "stage1" / "3")
    else:
        student = job_of(tmp_path / "run", settings(place)).student
        hybrid = dataclasses.replace(student, stacks=(("gdn", 2), ("attention", 1), ("gdn", 1)))
        monkeypatch.setattr(earlier_mixers, "read_model_config", lambda _: hybrid)
    with pytest.raises(ValueError, match=words):
        job_of(tmp_path / "run", settings(place, **{"student.init_from": str(run)}))
