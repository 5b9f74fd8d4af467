"""A path that a user names is the same place for whoever reads it, and from whichever directory it is read."""

import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
from etils import epath
from untrained import save_teacher

from radlads_jax import config, evaluate, export, launch, plan, report
from radlads_jax.config import validate
from radlads_jax.decoding.loaded import model_directory
from radlads_jax.decoding.prompts import read_prompts
from radlads_jax.porting.hub import resolve_model_dir
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import preflight, train
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.job import Job
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.run.settings import check_same_config, remember_config, with_whole_paths
from radlads_jax.system import storage
from radlads_jax.system.command import parse_flags
from radlads_jax.system.workdir import held


@pytest.fixture(autouse=True)
def home(tmp_path: pathlib.Path, monkeypatch: Any) -> pathlib.Path:
    """The user's home; the commands are started in `here`, a directory beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])
@pytest.mark.parametrize(
    ("named", "meant"),
    [("~/a b", "home/a b"), ("x/y", "here/x/y"), ("../z", "here/../z"), ("~", "home"), ("./~/x", "here/~/x")],
)
def test_one_reading_of_a_path(kind: Any, named: str, meant: str, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    if kind is not str and named.startswith("./"):
        pytest.skip("such a path drops the leading dot itself")
    place = storage.as_path(kind(named))
    assert place == tmp_path / meant and type(place) is type(tmp_path)
    assert storage.as_path(place) == place
    monkeypatch.chdir("/")
    assert storage.as_path(str(place)) == place


def test_a_home_that_is_nobodys_is_refused() -> None:
    with pytest.raises(ValueError, match=r"~nobody-here/run: nobody-here .*\./~nobody-here/run"):
        storage.as_path("~nobody-here/run")


def test_urls_and_hub_ids_are_left_as_they_are(tmp_path: pathlib.Path) -> None:
    for name in ("gs://bucket/~/x", "", "s3://bucket/x"):
        assert storage.whole_name(name) == storage.whole_name_or_id(name) == name
    assert storage.whole_name_or_id("Qwen/Qwen2.5") == "Qwen/Qwen2.5"
    (tmp_path / "here" / "Qwen" / "Qwen2.5").mkdir(parents=True)
    assert storage.whole_name_or_id("Qwen/Qwen2.5") == str(tmp_path / "here" / "Qwen" / "Qwen2.5")
    assert storage.whole_name_or_id("./nothing/here/") == str(tmp_path / "here" / "nothing/here")
    for door in (resolve_model_dir, model_directory):
        with pytest.raises(ValueError, match=r"'no-such/model'.*download"):
            door("no-such/model")


@pytest.mark.parametrize("named", ["~/runs/mine", "../home/runs/mine"])
def test_everything_of_a_run_goes_to_one_directory(named: str, home: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(named)
    with held(named), Checkpoints(path / "checkpoints" / "stage1") as checkpoints:
        assert checkpoints.directory.parts[-3:] == ("mine", "checkpoints", "stage1")
        with MetricsLogger(named) as logger:
            logger.begin("stage1", 0, 1, tokens_per_step=1)
            logger.log("stage1", 1, {"loss": 1.0})
    assert read_metrics(path) and report.write_report(named).is_file()
    names = {file.name for file in (home / "runs" / "mine").iterdir()}
    assert names == {".lock", "checkpoints", "metrics.jsonl", "tensorboard", "report"}
    assert list((tmp_path / "here").iterdir()) == []


def test_every_door_knows_the_home(home: pathlib.Path, teacher: pathlib.Path) -> None:
    (home / "model").symlink_to(teacher)
    (home / "prompts.txt").write_text("one\ntwo\n")
    (home / "task.yaml").write_text("task: mine\n")
    assert model_directory("~/model") == resolve_model_dir("~/model") == home / "model"
    assert [prompt.content for prompt in read_prompts(storage.as_path("~/prompts.txt"))] == ["one", "two"]
    assert evaluate.output_directory("~/model", "~/results") == home / "results"
    assert evaluate.expand_tasks(["~/task.yaml", "arc_easy"]) == [str(home / "task.yaml"), "arc_easy"]
    assert plan._results_file("~/plans.jsonl") == home / "plans.jsonl"
    assert export._file("~/mine.gguf") == home / "mine.gguf"


def test_a_config_file_in_the_home(home: pathlib.Path, monkeypatch: Any) -> None:
    (home / "my.py").write_text("")
    read: list[list[str]] = []
    monkeypatch.setattr(type(launch.flags.FLAGS), "__call__", lambda _, argv: read.append(argv) or argv)
    parse_flags(["launch", "--config=~/my.py:lr=1", "--workdir=~/x", "--config.data.path=~/y"])
    assert read[-1] == ["launch", f"--config={home}/my.py:lr=1", "--workdir=~/x", "--config.data.path=~/y"]


def chosen(**fields: Any) -> Any:
    settings = config.defaults()
    settings.teacher.path, settings.data.path = "a/teacher", "text.txt"
    settings.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return settings


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data__path": "text.txt"}, {"data.path": "here/text.txt"}),
        ({"data__path": "~/text.txt", "data__source": "jsonl"}, {"data.path": "home/text.txt"}),
        ({"data__path": "tokens", "data__source": "binidx"}, {"data.path": "here/tokens"}),
        ({"teacher__path": "~/teacher", "data__tokenizer": "./tok"}, {"teacher.path": "home/teacher"}),
        ({"stages": ("stage2c",), "data__chats": "~/chats"}, {"data.chats": "home/chats"}),
    ],
)
def test_settings_keep_whole_paths(fields: dict, expected: dict[str, str], tmp_path: pathlib.Path) -> None:
    run = with_whole_paths(validate(chosen(**fields)))
    for name, place in expected.items():
        group, field = name.split(".")
        assert getattr(getattr(run, group), field) == str(tmp_path / place)


def test_settings_keep_what_is_no_path() -> None:
    hub = {"teacher__path": "Qwen/Qwen2.5", "data__path": "owner/set", "data__source": "hf", "data__tokenizer": "o/t"}
    for fields in (hub, {"data__path": "", "data__source": "synthetic"}, {"data__path": "gs://b/x"}):
        run = validate(chosen(**fields))
        assert with_whole_paths(run) == run


def test_the_same_words_elsewhere_are_another_run(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    def settings(**fields: Any) -> dict:
        return with_whole_paths(validate(chosen(**fields))).settings()

    remember_config(tmp_path / "run", settings())
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        check_same_config(tmp_path / "run", settings(data__path=str(tmp_path / "here" / "text.txt")))
    with pytest.raises(ValueError, match=r"data\.path.*\bhere/text.*\belsewhere/text"):
        check_same_config(tmp_path / "run", settings())


def test_what_is_told_by_contents_may_lie_elsewhere(tmp_path: pathlib.Path) -> None:
    """Where the run knows the contents of conversations and stored logits; without logits it is another run."""

    def settings(**fields: Any) -> dict:
        fields = {"stages": ("stage2", "stage2c"), "data__chats": "/a/chats", "teacher__logits": "/a/logits"} | fields
        return with_whole_paths(validate(chosen(**fields))).settings()

    (tmp_path / "run" / "checkpoints" / "stage2c" / "7").mkdir(parents=True)
    remember_config(tmp_path / "run", settings())
    moved = settings(data__chats="/b/chats", teacher__logits="/b/logits")
    with pytest.raises(ValueError, match=r"data\.chats.*teacher\.logits"):
        check_same_config(tmp_path / "run", moved)
    (tmp_path / "run" / "fingerprint.json").write_text("{}")
    check_same_config(tmp_path / "run", moved)
    with pytest.raises(ValueError, match=r"teacher\.logits was '/a/logits' and is now ''"):
        check_same_config(tmp_path / "run", settings(teacher__logits=""))


def test_what_an_earlier_version_kept_as_it_was_typed_continues(tmp_path: pathlib.Path) -> None:
    typed = chosen(data__tokenizer="~/tok").to_dict()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(typed))
    run = validate(chosen(data__tokenizer="~/tok"))
    check_same_config(tmp_path / "run", with_whole_paths(run).settings())


def test_a_number_of_documents_that_an_earlier_version_took_beside_text_changes_nothing(tmp_path: pathlib.Path) -> None:
    taken = chosen().to_dict()
    taken["data"]["documents"] = 100
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(taken))
    check_same_config(tmp_path / "run", with_whole_paths(validate(chosen())).settings())


def test_the_command_runs_in_the_home(
    home: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    (tmp_path / "here" / "text.txt").write_text("\n\n\n".join(f"The number {n} follows." for n in range(300)))
    (home / "teacher").symlink_to(teacher)
    fields = {"teacher__path": "~/teacher", "stages": ("stage1",), "data__eval_rows": 2, "stage1__tokens": 128}
    fields |= {"stage1__seq_len": 32, "stage1__batch_size": 2, "data__separator": "\n\n\n", "export__dtype": "float32"}
    monkeypatch.setattr(launch, "_CONFIG", SimpleNamespace(value=chosen(**fields)))
    monkeypatch.setattr(launch, "_WORKDIR", SimpleNamespace(value="~/runs/mine"))
    for name in ("_PREFLIGHT_ONLY", "_FORCE"):
        monkeypatch.setattr(launch, name, SimpleNamespace(value=False))
    begun: list[Job] = []
    monkeypatch.setattr(preflight, "check", lambda *_, **__: None)
    monkeypatch.setattr(train, "convert", lambda job, _, write: (begun.append(job), write()))
    assert launch.main(["launch"]) == 0
    assert begun[0].workdir == home / "runs" / "mine" and begun[0].source == home / "teacher"
    stored = json.loads((home / "runs" / "mine" / "config.json").read_text())
    assert stored["teacher"]["path"] == str(home / "teacher")
    assert stored["data"]["path"] == str(tmp_path / "here" / "text.txt")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["text.txt"]
