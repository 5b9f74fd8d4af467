"""After the last step: what fails leaves what was before it, the next start does the rest; bad input comes first."""

import dataclasses
import json
import math
import pathlib
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import tiny_run
from untrained import save_teacher

from radlads_jax import config, launch
from radlads_jax.run import ending, heldout, preflight, train
from radlads_jax.run import job as job_module
from radlads_jax.run.job import Job, make_job
from radlads_jax.run.settings import check_same_config, remember_config
from radlads_jax.run.teacher_weights import TeacherWeights

STEPS = {"stage1": 5}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def trained(teacher: pathlib.Path, tmp_path_factory: Any) -> pathlib.Path:
    """A run that has failed at the first thing after its last step."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr(ending, "save_params", planted)
        tiny_run.convert(workdir, tiny_run.settings(teacher, steps=STEPS))
    return workdir


@pytest.fixture
def run(trained: pathlib.Path, teacher: pathlib.Path, tmp_path: pathlib.Path) -> Any:
    """Goes on with a copy of it; settings: more of them. Its directory is run.workdir."""
    workdir = pathlib.Path(shutil.copytree(trained, tmp_path / "run"))

    def go_on(**settings: Any) -> dict[str, Any]:
        return tiny_run.convert(workdir, tiny_run.settings(teacher, steps=STEPS) | settings)

    return SimpleNamespace(go_on=go_on, workdir=workdir)


def planted(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


def left(workdir: pathlib.Path) -> set[str]:
    names = ["export/config.json", "export/model.safetensors", "summary.json", "report/index.html", "samples.md"]
    return {name.split("/")[0] for name in names if (workdir / name).is_file()}


FAULTS = {
    "scores": (heldout, "evaluate", {"export", "report"}),
    "card": (ending, "write_model_card", {"export", "summary.json", "report"}),
    "report": (ending, "write_report", {"export", "summary.json"}),
    "samples": (heldout, "generate_greedy", {"export", "summary.json", "report"}),
    "samples' page": (heldout, "samples_page", {"export", "summary.json", "report"}),
    "table": (heldout, "results_table", {"export", "summary.json", "report", "samples.md"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_leaves_what_was_before_it(fault: str, run: Any, monkeypatch: Any) -> None:
    module, name, expected = FAULTS[fault]
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr(module, name, planted)
        run.go_on()
    assert left(run.workdir) == expected
    exported = (run.workdir / "export" / "model.safetensors").stat().st_mtime_ns
    summary = run.go_on()
    assert left(run.workdir) == {"export", "summary.json", "report", "samples.md"}
    assert json.loads((run.workdir / "summary.json").read_text()) == summary and len(summary["samples"]) == 2
    assert "Top-1 relative" in (run.workdir / "export" / "README.md").read_text()
    if fault != "scores":
        assert (run.workdir / "export" / "model.safetensors").stat().st_mtime_ns == exported, "not written again"


def test_nothing_of_a_failed_export_is_there(trained: pathlib.Path) -> None:
    assert left(trained) == set()


def test_other_prompts_are_continued_by_the_export(run: Any, monkeypatch: Any) -> None:
    first = run.go_on()
    # What trained it may be gone by then.
    shutil.rmtree(run.workdir / "checkpoints")
    monkeypatch.setattr(train, "make_step", planted)
    again = run.go_on(**{"train.sample_prompts": ("What is", "A tale")})
    assert [sample["prompt"] for sample in again["samples"]] == ["What is", "A tale"]
    assert again["samples"][0] == first["samples"][1] and "A tale" in (run.workdir / "samples.md").read_text()
    assert again["student"] == first["student"]
    longer = run.go_on(**{"train.sample_prompts": ("What is", "A tale"), "train.sample_tokens": 9})
    assert longer["samples"] != again["samples"] and longer["samples"][0]["prompt"] == "What is"
    assert longer["samples"][0]["student"].startswith(again["samples"][0]["student"])
    assert "samples" not in run.go_on(**{"train.sample_prompts": ()})
    assert not (run.workdir / "samples.md").exists()


def test_answers_of_tales_can_be_asked_for_later(run: Any, teacher: Any, monkeypatch: Any, capsys: Any) -> None:
    assert "answers" not in run.go_on()
    asked = f"radlads_jax.evaluate --model {run.workdir} --teacher {teacher} --tasks=recall"
    assert asked in capsys.readouterr().out, "next tokens flatter"
    assert "--tasks=recall" in (run.workdir / "export" / "README.md").read_text()
    shutil.rmtree(run.workdir / "checkpoints")
    monkeypatch.setattr(train, "make_step", planted)
    summary = run.go_on(**{"train.answer_tales": 8})
    answers = summary["answers"]
    assert answers["tales"] == 8 and answers["scores"][0]["what"] == "facts recalled"
    assert all(0 <= score[name] <= 1 for score in answers["scores"] for name in ("teacher", "control", "student"))
    for page in (run.workdir / "export" / "README.md", run.workdir / "report" / "index.html"):
        assert "facts recalled" in page.read_text() and "--tasks=recall" not in page.read_text()
    assert "--tasks=recall" not in capsys.readouterr().out
    written = (run.workdir / "summary.json").read_text()
    assert json.loads(written) == summary
    monkeypatch.setattr(heldout, "answer", planted)
    assert run.go_on(**{"train.answer_tales": 8}) == summary, "nothing is scored twice"
    assert "answers" not in run.go_on(**{"train.answer_tales": 0})
    assert "facts recalled" not in (run.workdir / "export" / "README.md").read_text()


def test_answers_that_failed_are_scored_by_the_next_start(run: Any, monkeypatch: Any) -> None:
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr(heldout, "answer", planted)
        run.go_on(**{"train.answer_tales": 8})
    assert left(run.workdir) == {"export", "summary.json", "report"}
    assert run.go_on(**{"train.answer_tales": 8})["answers"]["tales"] == 8


def test_a_control_that_always_fails_takes_no_answers_with_it(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(heldout, "untrained_control", planted)
    with pytest.raises(RuntimeError, match="planted"):
        run.go_on(**{"train.answer_tales": 8})
    summary = run.go_on(**{"train.answer_tales": 8})
    assert "control" not in summary and "relative_top1" in summary
    assert all("control" not in score and "teacher" in score for score in summary["answers"]["scores"])


_STOPS = [
    KeyboardInterrupt(),
    OSError(),
    jax.errors.JaxRuntimeError("UNAVAILABLE: Gloo AllGather failed: Connection reset by peer"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes."),
]


@pytest.mark.parametrize("reason", _STOPS, ids=lambda error: type(error).__name__ + str(error)[:11])
def test_a_control_that_was_stopped_is_scored_by_the_next_start(run: Any, monkeypatch: Any, reason: Any) -> None:
    def stopped(*_: Any) -> Any:
        raise reason

    with monkeypatch.context() as patched, pytest.raises(type(reason)):
        patched.setattr(heldout, "untrained_control", stopped)
        run.go_on()
    assert "control" not in json.loads((run.workdir / "summary.json").read_text())
    assert abs(run.go_on()["control"]["kl"]) < 1e-6, "no row is longer than its window"
    assert "| control |" in (run.workdir / "export" / "README.md").read_text()


def test_a_tokenizer_that_does_not_tell_places_in_the_text(job: Job) -> None:
    slow = dataclasses.replace(job, tokenizer=SimpleNamespace(is_fast=False))
    with pytest.raises(ValueError, match=r"answer_tales is 8.*tokenizer\.json"):
        ending.check(with_train(slow, answer_tales=8, sample_prompts=()))


@pytest.fixture(scope="module")
def job(teacher: pathlib.Path, tmp_path_factory: Any) -> Job:
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings(teacher))
    return make_job(config.validate(chosen), tmp_path_factory.mktemp("job") / "run")


def test_a_tokenizer_that_an_export_would_change_is_refused_first(
    teacher: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    def other(source: Any, config: Any) -> None:
        raise ValueError(f"other ids of {source}")

    monkeypatch.setattr(job_module, "check_exportable", other)
    with pytest.raises(ValueError, match=f"other ids of {teacher}"):
        tiny_run.convert(tmp_path / "run", tiny_run.settings(teacher))
    assert not (tmp_path / "run" / "data").exists()


def with_train(job: Job, **fields: Any) -> Job:
    run = dataclasses.replace(job.run, train=dataclasses.replace(job.run.train, **fields))
    return dataclasses.replace(job, run=run)


@pytest.mark.parametrize("prompt", ["", " \n", "half \ud83d of one", "long " * 600])
def test_a_prompt_that_can_not_be_continued_is_refused_first(prompt: str, job: Job) -> None:
    asked = with_train(job, sample_prompts=("What is", prompt))
    weights = TeacherWeights(asked)
    for check in (ending.check, lambda job: preflight.check(job, weights), train.convert):
        with pytest.raises(ValueError, match=r"config\.train\.sample_prompts holds") as caught:
            check(asked)
        str(caught.value).encode()


def test_a_prompt_of_which_the_tokenizer_makes_nothing(job: Job, monkeypatch: Any) -> None:
    monkeypatch.setattr(heldout, "prompt_tokens", lambda *_: [])
    with pytest.raises(ValueError, match=r"sample_prompts.*'What is'.*tokenizer"):
        ending.check(with_train(job, sample_prompts=("What is",)))


def test_more_sample_tokens_than_the_model_has_places_for(job: Job) -> None:
    with pytest.raises(ValueError, match=r"sample_tokens.*\b600\b.*max_position.*\b512\b"):
        ending.check(with_train(job, sample_tokens=600))


def test_held_out_rows_without_a_next_token(job: Job, monkeypatch: Any) -> None:
    rows = [{"loss_mask": batch["loss_mask"] * 0} for batch in heldout.batches(job)]
    monkeypatch.setattr(heldout, "batches", lambda _: rows)
    with pytest.raises(ValueError, match=r"config\.data\.eval_rows"):
        ending.check(job)


@pytest.mark.parametrize("name", ["export", "report", "samples.md/x", "summary.json/x", "export/notes/x"])
def test_a_place_that_is_taken(name: str, job: Job) -> None:
    taken = job.workdir / name
    taken.parent.mkdir(parents=True, exist_ok=True)
    taken.touch()
    try:
        with pytest.raises(ValueError, match=f"{job.workdir / name.split('/')[0]} (is a|exists and is)"):
            ending.check(job)
    finally:
        taken.unlink()
        if "/" in name:
            shutil.rmtree(job.workdir / name.split("/")[0])
    ending.check(job)


@pytest.mark.parametrize("size", [0.0, 1e-10, math.inf, math.nan])
def test_no_size_of_a_shard(size: float, teacher: pathlib.Path) -> None:
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings(teacher) | {"export.max_shard_gb": size})
    with pytest.raises(ValueError, match=r"config\.export\.max_shard_gb is"):
        config.validate(chosen)


def test_sample_settings_are_free(tmp_path: pathlib.Path) -> None:
    before = {"seed": 0, "train": {"sample_prompts": [""], "sample_tokens": 3}}
    remember_config(tmp_path, before)
    check_same_config(tmp_path, before | {"train": {"sample_prompts": ["a"], "sample_tokens": 4}})


def launched(monkeypatch: Any, teacher: pathlib.Path, workdir: pathlib.Path, **settings: Any) -> int:
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings(teacher, steps=STEPS) | settings)
    monkeypatch.setattr(launch, "_CONFIG", SimpleNamespace(value=chosen))
    monkeypatch.setattr(launch, "_WORKDIR", SimpleNamespace(value=str(workdir)))
    monkeypatch.setattr(launch, "_PREFLIGHT_ONLY", SimpleNamespace(value=False))
    monkeypatch.setattr(launch, "_FORCE", SimpleNamespace(value=True))
    return launch.main(["launch"])


def test_config_json_appears_when_nothing_can_be_refused_any_more(
    teacher: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    """A step that does not fit into memory, or another of no use, leaves the directory to smaller settings."""

    def no_room(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with monkeypatch.context() as patched:
        patched.setattr(train, "make_step", lambda *_: no_room)
        assert launched(patched, teacher, tmp_path / "run") == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "allocating 9 bytes" in said and "<stage>.accumulate=0" in said
        assert not (tmp_path / "run" / "config.json").exists()

    def broken(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: a mistake")

    with monkeypatch.context() as patched, pytest.raises(jax.errors.JaxRuntimeError, match="a mistake"):
        patched.setattr(train, "make_step", lambda *_: broken)
        launched(patched, teacher, tmp_path / "run")

    def stop(self: Any, step: int) -> Any:
        assert (tmp_path / "run" / "config.json").exists()
        raise ValueError("far enough")

    with monkeypatch.context() as patched:
        patched.setattr(train._StopPolicy, "ask", stop)
        assert launched(patched, teacher, tmp_path / "run", seed=1) == 1
        assert "far enough" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1
