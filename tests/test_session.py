"""A run on machines that are taken away: it is saved to the hub, and fetched by the next of them."""

import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub, Repo
from test_push import hub as hub  # the fixture

from radlads_jax.run import on_hub

ROOT = pathlib.Path(__file__).parent.parent
NAME = "me/mine-run"


@pytest.fixture
def session() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("session", ROOT / "launch" / "session.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def begun(workdir: pathlib.Path) -> pathlib.Path:
    """What a run leaves: texts, arrays' files, and what belongs to this machine."""
    files = {"fingerprint.json": b"{}", ".lock": b"process 1\n", "data/a.bin": bytes(1000)}
    files |= {"checkpoints/stage1/2/state/d/0a": os.urandom(50_000), "checkpoints/stage1/2/_METADATA": b""}
    for name, data in files.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_bytes(data)
    return workdir


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def test_a_saved_run_comes_back_as_it_was(hub: FakeHub, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    workdir = begun(tmp_path / "run")
    on_hub.save(workdir, NAME)
    shutil.move(workdir / "checkpoints" / "stage1" / "2", workdir / "checkpoints" / "stage1" / "4")
    on_hub.save(workdir, NAME)
    saved = contents(workdir)
    del saved[".lock"]
    assert hub.repos[NAME].private and hub.repos[NAME].commits == 3
    there = {name: data for name, data in hub.repos[NAME].files.items() if name != ".gitattributes"}
    assert there == saved, "the checkpoint that made way is gone there too"
    # As another process has it: the addresses of files follow from the hub's when the client is imported.
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert on_hub.bring_back(tmp_path / "again", NAME)
    assert contents(tmp_path / "again") == saved and {*os.listdir(tmp_path)} == {"run", "again", "cache"} - (
        set() if (tmp_path / "cache").exists() else {"cache"}
    )


def test_what_is_no_run_is_neither_saved_nor_fetched_nor_overwritten(hub: FakeHub, tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").mkdir()
    on_hub.save(tmp_path / "run", NAME)
    assert hub.repos == {} and not on_hub.bring_back(tmp_path / "again", NAME)
    hub.repos[NAME] = Repo(private=True)
    assert not on_hub.bring_back(tmp_path / "again", NAME)
    hub.repos[NAME].files["model.safetensors"] = b"precious"
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        on_hub.save(begun(tmp_path / "run"), NAME)
    assert hub.repos[NAME].files["model.safetensors"] == b"precious"


def test_a_saved_run_is_fetched_unless_there_is_one_as_far(
    hub: FakeHub, tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    """What a mounted or an older directory holds does not overwrite it."""
    workdir = begun(tmp_path / "run")
    on_hub.save(workdir, NAME)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    (tmp_path / "empty").mkdir()
    assert on_hub.bring_back(tmp_path / "empty", NAME) and (tmp_path / "empty" / "fingerprint.json").is_file()
    (tmp_path / "other" / "data").mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{NAME} holds a saved run, and .*other other files and no run"):
        on_hub.bring_back(tmp_path / "other", NAME)
    assert not on_hub.bring_back(workdir, NAME), "it is as far"
    shutil.move(workdir / "checkpoints" / "stage1" / "2", workdir / "checkpoints" / "stage1" / "1")
    with pytest.raises(ValueError, match=r"has got to step 2 of stage1 \(1 here\), further than"):
        on_hub.bring_back(workdir, NAME)
    shutil.move(workdir / "checkpoints" / "stage1" / "1", workdir / "checkpoints" / "stage1" / "3")
    assert not on_hub.bring_back(workdir, NAME)


def test_a_hub_that_does_not_answer_is_no_new_run(hub: FakeHub, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"{NAME} .*\bfetched .*\breached\b"):
        on_hub.bring_back(tmp_path / "run", NAME)
    assert os.listdir(tmp_path) == []


# A run of two parts that works until it is stopped, and is done after the last.
PART = """
import pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[-1])
workdir.mkdir(exist_ok=True)
(workdir / "fingerprint.json").write_text("{}")
with (workdir / "parts").open("a") as file:
    file.write("part\\n")
if len((workdir / "parts").read_text().split()) < 2:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    (workdir / "ready").touch()
    time.sleep(60)
sys.exit(CODE)
"""


@pytest.mark.parametrize("code", [0, 1])
def test_a_session_saves_as_it_goes_and_ends_with_its_run(
    hub: FakeHub, tmp_path: pathlib.Path, session: ModuleType, monkeypatch: Any, code: int
) -> None:
    workdir, real = tmp_path / "run", session.run_for
    program = [sys.executable, "-c", PART.replace("CODE", str(code)), str(workdir)]
    monkeypatch.setattr(session, "run_for", lambda command, seconds: real(program, min(seconds, 1.5)))
    assert session.session(workdir, NAME, hours=1, save_every=0.1, rest=[]) == code
    assert (workdir / "parts").read_text() == "part\n" * 2
    assert hub.repos[NAME].commits == 3, "what a run has that fails is saved too"
    assert hub.repos[NAME].files["parts"] == b"part\n" * 2


@pytest.mark.parametrize("code", [1, 128 + signal.SIGKILL])
def test_a_save_that_fails_does_not_hide_how_the_run_failed(
    hub: FakeHub, tmp_path: pathlib.Path, session: ModuleType, monkeypatch: Any, capsys: Any, code: int
) -> None:
    def run_for(*_: Any) -> tuple[int, bool]:
        """In its time the hub goes away."""
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        return codes.pop(0), False

    codes, there = [code, 128 + signal.SIGTERM], "huggingface_hub.constants.ENDPOINT"
    monkeypatch.setattr(session, "run_for", run_for)
    assert session.session(begun(tmp_path / "run"), NAME, hours=1, save_every=0.1, rest=[]) == code
    assert NAME in capsys.readouterr().err
    monkeypatch.setattr(there, hub.url)
    with pytest.raises(ValueError, match=rf"{NAME} could not be looked at"):
        session.session(tmp_path / "run", NAME, hours=1, save_every=0.1, rest=[])
    # Where it does not answer from the beginning, its run may be further than this one.
    with pytest.raises(ValueError, match=rf"{NAME} could not be fetched"):
        session.session(tmp_path / "run", NAME, hours=1, save_every=0.1, rest=[])


def test_what_another_run_is_at_work_in_is_not_saved(
    hub: FakeHub, tmp_path: pathlib.Path, session: ModuleType, monkeypatch: Any, capsys: Any
) -> None:
    """The second run in a directory is refused, and ends with code 1."""
    holds = "import fcntl, sys, time; file = open(sys.argv[1], 'r+'); fcntl.lockf(file, fcntl.LOCK_EX); print(1)"
    lock = begun(tmp_path / "run") / ".lock"
    program = [sys.executable, "-c", f"{holds}; sys.stdout.flush(); time.sleep(60)", str(lock)]
    monkeypatch.setattr(session, "run_for", lambda *_: (1, False))
    with subprocess.Popen(program, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert session.session(tmp_path / "run", NAME, hours=1, save_every=0.1, rest=[]) == 1
        other.kill()
    assert hub.repos == {} and "in use by another run (process 1)" in " ".join(capsys.readouterr().err.split())
    assert session.session(tmp_path / "run", NAME, hours=1, save_every=0.1, rest=[]) == 1
    assert "fingerprint.json" in hub.repos[NAME].files


# What a round writes, by its number: trials and checkpoints are of use to the next, the rest is written by each anew.
WRITES = {
    "metrics.jsonl": lambda number: "{}\n" * number,
    "report/index.html": lambda number: "page" * number,
    ".export.partial/model.safetensors": lambda number: "w" * number,
    "export/model.safetensors": lambda number: "weights",
}


@pytest.mark.parametrize(
    ("grows", "stopped"),
    [(None, [True, True, False]), ("sweep.json", [True] * 4), ("checkpoints/stage1/{}/d", [True] * 4)],
    ids=["nothing", "a trial more", "a checkpoint more"],
)
def test_a_round_that_did_nothing_is_followed_by_one_that_is_not_stopped(
    hub: FakeHub, tmp_path: pathlib.Path, session: ModuleType, monkeypatch: Any, capsys: Any, grows, stopped
) -> None:
    """A trial, or an export and its evaluation, that takes longer than --save_every; the export is there at once."""
    asked: list[bool] = []

    def run_for(command: list[str], seconds: float) -> tuple[int, bool]:
        asked.append(seconds <= 360)
        assert asked[-1] or 35_900 < seconds <= 36_000
        texts = {name: text(len(asked)) for name, text in WRITES.items()}
        texts |= {grows.format(len(asked)): "t" * len(asked)} if grows else {}
        for name, text in texts.items():
            (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "run" / name).write_text(text)
        return (0, False) if len(asked) == len(stopped) else (128 + signal.SIGTERM, True)

    monkeypatch.setattr(session, "run_for", run_for)
    begun(tmp_path / "run")
    assert session.session(tmp_path / "run", NAME, hours=10, save_every=0.1, rest=[]) == 0
    assert asked == stopped
    assert capsys.readouterr().out.count("0.1 h brought nothing to save") == stopped.count(False)


def test_a_session_ends_when_its_hours_are_over(hub: FakeHub, tmp_path: pathlib.Path, session, monkeypatch) -> None:
    asked: list[float] = []

    def run_for(command: list[str], seconds: float) -> tuple[int, bool]:
        assert command[1:] == ["-m", "radlads_jax.launch", "--workdir", str(tmp_path / "run"), "--config=x"]
        asked.append(seconds)
        return 128 + signal.SIGTERM, True

    monkeypatch.setattr(session, "run_for", run_for)
    begun(tmp_path / "run")
    assert session.session(tmp_path / "run", NAME, hours=0.01, save_every=9, rest=["--config=x"]) == 143
    assert len(asked) == 1 and 30 < asked[0] <= 36 and "fingerprint.json" in hub.repos[NAME].files


def test_a_session_that_is_stopped_saves_and_ends(hub: FakeHub, tmp_path: pathlib.Path, session, monkeypatch) -> None:
    """By the notebook's button, or by the machine's SIGTERM, which comes to the same."""
    program = [sys.executable, "-c", PART.replace("CODE", "0"), str(tmp_path / "run")]
    real = session.subprocess.Popen

    def popen(command: list[str]) -> Any:
        child = real(program)
        wait = child.wait
        monkeypatch.setattr(child, "wait", lambda *seconds: stopped(*seconds) if seconds else wait())
        return child

    def stopped(seconds: float) -> None:
        while not (tmp_path / "run" / "ready").exists():
            time.sleep(0.02)
        session._interrupt()

    monkeypatch.setattr(session.subprocess, "Popen", popen)
    assert session.session(tmp_path / "run", NAME, hours=1, save_every=1, rest=[]) == 143
    assert hub.repos[NAME].files["parts"] == b"part\n"


def test_without_a_token_nothing_begins(session: ModuleType, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["session.py", "--workdir=x", f"--repo={NAME}", "--hours=1"])
    monkeypatch.setattr(session, "session", lambda *_: pytest.fail("began"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert session.main() == 1 and "HF_TOKEN is not set" in capsys.readouterr().err
    assert TOKEN not in os.environ.get("HF_TOKEN", "")


def test_a_work_directory_by_another_name(session: ModuleType, monkeypatch: Any, capsys: Any) -> None:
    given: list[pathlib.Path] = []
    monkeypatch.setattr(session, "session", lambda workdir, *_: given.append(workdir) or 0)
    for name in ("gs://bucket/mine", "~/mine"):
        monkeypatch.setattr(sys, "argv", ["session.py", f"--workdir={name}", "--hours=1"])
        assert session.main() == (1 if "://" in name else 0)
    assert given == [pathlib.Path.home() / "mine"]
    assert "--workdir is gs://bucket/mine; expected a directory of this disk" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--hours=0", "--hours=nan", "--save_every=-1"])
def test_a_session_of_no_time_is_refused(session: ModuleType, monkeypatch: Any, capsys: Any, flag: str) -> None:
    monkeypatch.setattr(sys, "argv", ["session.py", "--workdir=runs/mine", "--hours=1", flag])
    assert session.main() == 1 and flag.replace("=", " ") in " ".join(capsys.readouterr().err.split())
