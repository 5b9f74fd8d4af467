"""A run that goes on with other settings of stages that have not begun, and with more stages."""

import json
import pathlib
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
from untrained import save_teacher

from radlads_jax import config, launch
from radlads_jax.reporting.run_log import read_run
from radlads_jax.run import fingerprint, train
from radlads_jax.run import settings as settings_lib
from radlads_jax.run.job import make_job
from radlads_jax.run.settings import begun_stages, check_same_config, keep_begun_rules, remember_config
from radlads_jax.system import workdir as workdir_lib
from radlads_jax.system.stopping import Interrupted

BOTH = {"stage1": 5, "stage2": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def launched(
    monkeypatch: Any, teacher: pathlib.Path, workdir: pathlib.Path, steps: dict[str, int], **settings: Any
) -> int:
    chosen = config.defaults()
    flat = {name.replace("__", "."): value for name, value in settings.items()}
    chosen.update_from_flattened_dict(tiny_run.settings(teacher, steps=steps) | flat)
    for flag, value in {"CONFIG": chosen, "WORKDIR": str(workdir), "FORCE": True, "PREFLIGHT_ONLY": False}.items():
        monkeypatch.setattr(launch, f"_{flag}", SimpleNamespace(value=value))
    return launch.main(["launch"])


def weights(workdir: pathlib.Path) -> bytes:
    return (workdir / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(teacher: pathlib.Path, tmp_path_factory: Any) -> pathlib.Path:
    """A run of both stages, the second one at another rate, in one go."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patched:
        assert launched(patched, teacher, workdir, BOTH, stage2__lr=4e-3) == 0
    return workdir


def test_a_finished_run_goes_on_with_one_more_stage(
    teacher: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    workdir = tmp_path / "run"
    assert launched(monkeypatch, teacher, workdir, {"stage1": 5}) == 0
    first = json.loads((workdir / "summary.json").read_text())
    (workdir / "evaluation.json").write_text('{"tasks": []}')
    (workdir / "export" / "evaluation.md").write_text("of the export")
    capsys.readouterr()

    # What was exported stays beside its scores until the longer run's take their place.
    def stop(self: Any, step: int) -> Any:
        raise Interrupted(2, f"step {step}")

    with monkeypatch.context() as patched:
        patched.setattr(train._StopPolicy, "ask", stop)
        assert launched(patched, teacher, workdir, BOTH, stage2__lr=4e-3) == 130
    said = capsys.readouterr().out
    assert "config.stage2.lr was 1e-05 and is now 0.004" in said
    assert "config.stages was ['stage1'] and is now ['stage1', 'stage2']" in said
    # It is looked at as one that begins.
    assert "  ok  data" in said
    assert json.loads((workdir / "summary.json").read_text()) == first
    assert json.loads((workdir / "config.json").read_text())["stage2"]["lr"] == 4e-3
    # The page has none of its scores any more, and still what trained its stages.
    log = read_run(workdir)
    assert not log.summary and not log.evaluation
    assert log.stage_summary("stage1") == first["stages"][0] and not log.stage_summary("stage2")

    assert launched(monkeypatch, teacher, workdir, BOTH, stage2__lr=4e-3) == 0
    assert weights(workdir) == weights(whole)
    summary = json.loads((workdir / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == ["stage1", "stage2"]
    assert summary["student"] == json.loads((whole / "summary.json").read_text())["student"]
    assert (workdir / "evaluation-stage1.json").read_text() == '{"tasks": []}'
    assert not (workdir / "evaluation.json").exists()
    assert (workdir / "evaluation-stage1-of-export.md").read_text() == "of the export"
    # And now it is finished.
    capsys.readouterr()
    assert launched(monkeypatch, teacher, workdir, BOTH, stage2__lr=4e-3) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "settings", "said"),
    [
        ({"stage1": 5}, {"stage2__lr": 4e-3}, "config.stages was ['stage1', 'stage2'] and is now ['stage1']"),
        ({"stage2": 4, "stage1": 5}, {"stage2__lr": 4e-3}, "and is now ['stage2', 'stage1']"),
        (BOTH, {"stage2__lr": 5e-3}, "config.stage2.lr was 0.004 and is now 0.005"),
        (BOTH | {"stage3": 1}, {"stage2__lr": 4e-3, "data__eval_rows": 8}, "config.data.eval_rows was 32"),
    ],
)
def test_what_has_begun_stays(
    steps: dict[str, int],
    settings: dict[str, Any],
    said: str,
    teacher: pathlib.Path,
    whole: pathlib.Path,
    monkeypatch: Any,
    capsys: Any,
) -> None:
    before = (whole / "config.json").read_bytes()
    assert launched(monkeypatch, teacher, whole, steps, **settings) == 1
    assert said in capsys.readouterr().err
    assert (whole / "config.json").read_bytes() == before


def begun(workdir: pathlib.Path, *stages: str) -> dict[str, Any]:
    """Settings of which a run has begun these stages."""
    settings = config.defaults().to_dict()
    remember_config(workdir, settings)
    for stage in stages:
        (workdir / "checkpoints" / stage / "7").mkdir(parents=True)
    return settings


def test_a_finished_run_without_its_checkpoints_is_not_trained_anew(
    teacher: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    workdir = pathlib.Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints")
    assert launched(monkeypatch, teacher, workdir, BOTH, stage2__lr=4e-3) == 0
    for steps, settings, said in (
        (BOTH, {"stage2__lr": 5e-3}, "config.stage2.lr was 0.004 and is now 0.005. Repeat its settings"),
        (BOTH | {"stage3": 1}, {"stage2__lr": 4e-3}, "checkpoints of stage1, stage2 are gone"),
    ):
        capsys.readouterr()
        assert launched(monkeypatch, teacher, workdir, steps, **settings) == 1
        assert said in capsys.readouterr().err
    assert weights(workdir) == weights(whole)


def test_conversations_come_with_the_stage_that_reads_them(tmp_path: pathlib.Path) -> None:
    settings = begun(tmp_path, "stage1", "stage2")
    chats = settings | {"stages": ("stage1", "stage2", "stage2c"), "data": settings["data"] | {"chats": "a.jsonl"}}
    assert len(check_same_config(tmp_path, chats)) == 2
    begun(tmp_path, "stage2c")
    with pytest.raises(ValueError, match=r"config\.data\.chats was '' and is now 'a\.jsonl'"):
        check_same_config(tmp_path, chats)


def test_a_setting_of_a_stage_that_does_not_run_is_not_told(tmp_path: pathlib.Path) -> None:
    settings = begun(tmp_path, "stage1")
    assert check_same_config(tmp_path, settings | {"stage2a": settings["stage2a"] | {"lr": 1.0}}) == []


def test_a_warm_up_follows_other_steps(tmp_path: pathlib.Path) -> None:
    """Where its stage has begun, it stays that of the version that began the run."""
    settings = begun(tmp_path, "stage1")
    remember_config(tmp_path, settings | {name: settings[name] | {"warmup_steps": 3} for name in ("stage1", "stage2")})
    chosen = config.defaults()
    chosen.stage2.tokens = 98_304
    keep_begun_rules(tmp_path, chosen)
    assert (chosen.stage1.warmup_steps, chosen.stage2.warmup_steps) == (3, 1)


def test_a_stage_before_one_that_has_begun_is_settled(tmp_path: pathlib.Path) -> None:
    settings = begun(tmp_path, "stage2")
    with pytest.raises(ValueError, match=r"config\.stage1\.lr was 0\.001 and is now 1\.0"):
        check_same_config(tmp_path, settings | {"stage1": settings["stage1"] | {"lr": 1.0}})


def test_an_unfinished_checkpoint_of_a_bucket_is_none(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    begun(tmp_path, "stage1")
    assert begun_stages(tmp_path) == {"stage1"}
    step = tmp_path / "checkpoints" / "stage1" / "7"
    monkeypatch.setattr(settings_lib.storage, "in_bucket", lambda path: True)
    assert not settings_lib._is_whole(step)
    (step / "commit_success.txt").touch()
    assert settings_lib._is_whole(step)


@pytest.mark.parametrize("stages", ['["a"]', '{"name": 1}', "[{}]"])
def test_a_summary_that_no_run_wrote(stages: str, tmp_path: pathlib.Path) -> None:
    begun(tmp_path, "stage1")
    (tmp_path / "summary.json").write_text(f'{{"stages": {stages}}}')
    with pytest.raises(ValueError, match=r"summary\.json: stages is .*Remove the file"):
        check_same_config(tmp_path, config.defaults().to_dict())


def test_a_second_process_looks_again_when_it_has_the_directory(
    teacher: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any
) -> None:
    """Between the first look and the lock another one may have trained what had not begun."""
    workdir, held = tmp_path / "run", workdir_lib.held

    def late(directory: Any) -> Any:
        shutil.copytree(whole, workdir)
        return held(directory)

    monkeypatch.setattr(workdir_lib, "held", late)
    assert launched(monkeypatch, teacher, workdir, BOTH, stage2__lr=5e-3) == 1
    assert "config.stage2.lr was 0.004 and is now 0.005" in capsys.readouterr().err


def test_other_conversations_before_their_stage_has_begun(tmp_path: pathlib.Path, teacher: pathlib.Path) -> None:
    """Until then a file that is not there is an error, and another one takes its place."""
    for name, said in {"a": "yes", "b": "no"}.items():
        turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}]
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 40)

    def job_of(file: str) -> Any:
        chosen = config.defaults()
        flat = tiny_run.settings(teacher, steps={"stage1": 5, "stage2c": 1}) | {"data.chats": str(tmp_path / file)}
        chosen.update_from_flattened_dict(flat)
        return make_job(config.validate(chosen), tmp_path / "run")

    def goes_on(file: str) -> None:
        job = job_of(file)
        fingerprint.begin(job.workdir, job.depends)
        remember_config(job.workdir, job.run.settings())

    goes_on("a.jsonl")
    with pytest.raises(ValueError, match="typo"):
        job_of("typo.jsonl")
    goes_on("b.jsonl")
    (tmp_path / "run" / "checkpoints" / "stage2c" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match="the chats of the run"):
        job_of("a.jsonl")
    # Where they are gone, their tokens are there.
    (tmp_path / "b.jsonl").unlink()
    job_of("b.jsonl")
