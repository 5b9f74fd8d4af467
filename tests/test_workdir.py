"""One run at a time in a work directory, by a lock no dead process keeps; signals, broken pipes, closed terminals."""

import errno
import fcntl
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from radlads_jax import config, launch
from radlads_jax.system.stopping import SIGNALS, stop_signals
from radlads_jax.system.workdir import held

ROOT = pathlib.Path(__file__).parent.parent
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.write("process 7 on here since yesterday\\n")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: pathlib.Path) -> Any:
    """Another process that has the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: pathlib.Path, holder: Any) -> None:
    said = rf"{re.escape(str(tmp_path))} .*\(process 7 on here since yesterday\).*--workdir"
    with pytest.raises(ValueError, match=said), held(tmp_path):
        pytest.fail("entered")
    holder.kill()
    holder.wait()
    with held(tmp_path):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
        again = subprocess.run(command, capture_output=True, text=True)
        assert "BlockingIOError" in again.stderr or "PermissionError" in again.stderr
    with (tmp_path / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_command_line_asks_for_the_lock(tmp_path: pathlib.Path, holder: Any, monkeypatch: Any, capsys: Any) -> None:
    chosen = config.defaults()
    chosen.teacher.path, chosen.data.source = "no-such-teacher/at-all", "synthetic"
    monkeypatch.setattr(launch, "_CONFIG", SimpleNamespace(value=chosen))
    monkeypatch.setattr(launch, "_WORKDIR", SimpleNamespace(value=str(tmp_path)))
    assert launch.main(["launch"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert re.search(rf"{re.escape(str(tmp_path))} .*\(process 7 on here since yesterday\)", message)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_run_that_never_began_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: Any, capsys: Any) -> None:
    chosen = config.defaults()
    chosen.teacher.path, chosen.data.source = "./no-such-teacher", "synthetic"
    monkeypatch.setattr(launch, "_CONFIG", SimpleNamespace(value=chosen))
    monkeypatch.setattr(launch, "_WORKDIR", SimpleNamespace(value=str(tmp_path / "runs" / "one")))
    assert launch.main(["launch"]) == 1
    assert "no-such-teacher" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_stays_of_an_empty_and_of_a_used_directory(tmp_path: pathlib.Path) -> None:
    with held(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert list(tmp_path.iterdir()) == [], "it was there before, and so it stays"
    with held(tmp_path / "run"):
        (tmp_path / "run" / "data").mkdir()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "data"}


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    lockf, removed = fcntl.lockf, []

    def removed_before(file: Any, how: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", removed_before)
    with held(tmp_path):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")]
        again = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "BlockingIOError" in again.stderr or "PermissionError" in again.stderr


def test_what_cannot_be_written_or_locked(tmp_path: pathlib.Path, monkeypatch: Any, caplog: Any) -> None:
    (tmp_path / "file").touch()
    # Nobody, root neither, can make a directory in either.
    for place in (tmp_path / "file" / "run", pathlib.Path("/proc/run")):
        with pytest.raises(ValueError, match=rf"--workdir {place} .*\[Errno \d"), held(place):
            pytest.fail("entered")

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with held(tmp_path / "run"):
        assert "on a file system without locks" in caplog.text


def test_leftovers_are_removed_and_named(tmp_path: pathlib.Path, caplog: Any) -> None:
    left = [".a.json.partial", "metrics.tmp", "report/.index.html.partial", "data/a.tmp-7.bin", ".export.partial/x"]
    kept = ["summary.json", "data/text-1.bin", "report/index.html", "export/config.json", "notes.partial"]
    for name in [*left, *kept]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with held(tmp_path):
        remaining = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert remaining == {*kept, ".lock"}
    for name in left:
        assert f"removing the unfinished {tmp_path / name.removesuffix('/x')}: its writing was" in caplog.text


# Its main thread waits in compiled code, as for a device, where Python runs no handler.
BLOCKED = """
import contextlib, ctypes, signal
from radlads_jax.system.stopping import leave_on_signals, stop_signals
signal.signal(signal.SIGHUP, signal.{hangup})
{before}
with {context}:
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_ctrl_c_leaves_at_once(first: int) -> None:
    command = [sys.executable, "-c", BLOCKED.format(hangup="SIG_DFL", before="", context="stop_signals()")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(first)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert "leaving at once" in process.communicate()[1]
    finally:
        process.kill()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("signum", SIGNALS)
def test_before_and_after_training_the_first_leaves_at_once(signum: int, after: bool) -> None:
    before = "leave_on_signals()" + after * "\nwith stop_signals(): pass"
    code = BLOCKED.format(hangup="SIG_DFL", before=before, context="contextlib.nullcontext()")
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signum)
        assert process.wait(60) == 128 + signum
        said = f"leaving at once by {signal.Signals(signum).name}; the same command continues from what is saved."
        assert said.encode() in process.communicate()[1]
    finally:
        process.kill()


@pytest.mark.parametrize("context", ["contextlib.nullcontext()", "stop_signals()"])
def test_a_run_that_nohup_started_ignores_sighup(context: str) -> None:
    code = BLOCKED.format(hangup="SIG_IGN", before="leave_on_signals()", context=context)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        if context == "stop_signals()":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.communicate()


# A shell's foreground job: the terminal is its session's, and closing it sends SIGHUP.
ON_A_TERMINAL = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.open(os.ttyname(0), os.O_RDWR)
from radlads_jax.system.stopping import leave_on_signals, outlive_readers, stop_signals
leave_on_signals()
outlive_readers()
with stop_signals() as stopping:
    print("ready")
    while (signum := stopping()) is None:
        time.sleep(0.01)
    print("saving", file=sys.stderr)
    print("saved")
open(sys.argv[1], "w").write(signal.Signals(signum).name)
"""


def test_a_run_whose_terminal_is_closed_saves(tmp_path: pathlib.Path) -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "result")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    try:
        assert os.read(ours, 100).strip() == b"ready"
        os.close(ours)
        assert process.wait(60) == 0 and (tmp_path / "result").read_text() == "SIGHUP"
    finally:
        process.kill()
        process.wait()


def test_a_signal_that_nobody_asked_for_is_passed_on() -> None:
    passed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, _: passed.append(signum))
    try:
        with stop_signals() as stopping:
            stopping()
            signal.raise_signal(signal.SIGTERM)
        assert passed == [signal.SIGTERM]
        with stop_signals() as stopping:
            signal.raise_signal(signal.SIGTERM)
            assert stopping() == signal.SIGTERM
        assert passed == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


TALKING = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from radlads_jax.system.stopping import outlive_readers
outlive_readers()
print("first", flush=True)
sys.stdin.readline()
for number in range(3):
    print("more", number, file=sys.stderr if number == 1 else sys.stdout, flush=True)
os.write(1, b"from compiled code")
open(sys.argv[1], "w").write("all done")
"""


@pytest.mark.parametrize("both", [False, True])
def test_readers_of_the_output_may_leave(both: bool, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", TALKING, str(tmp_path / "result")]
    errors = subprocess.STDOUT if both else subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
    )
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    said = "" if process.stderr is None else process.stderr.read()
    assert process.wait(60) == 0 and (tmp_path / "result").read_text() == "all done"
    assert said == ("" if both else "nobody reads the output any more; going on without it.\nmore 1\n")


@pytest.mark.parametrize("broken", ["reader", "connection"])
def test_a_command_ends_with_its_readers_and_not_with_a_connection(broken: str) -> None:
    code = "import os, sys\nfrom radlads_jax.system.stopping import leave_with_readers\nleave_with_readers()\n"
    written = {"reader": "print('to nobody')", "connection": "r, w = os.pipe()\nos.close(r)\nos.write(w, b'1')"}
    code += f"sys.stdin.readline()\n{written[broken]}\nprint('not here', file=sys.stderr)"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    process.stdout.close()
    process.stdin.close()
    said, code = process.stderr.read(), process.wait(60)
    if broken == "reader":
        assert (code, said) == (128 + signal.SIGPIPE, b"")
    else:
        assert b"BrokenPipeError" in said


def test_the_first_signal_is_told_and_handlers_come_back() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with stop_signals() as stopping:
        assert stopping() is None
        signal.raise_signal(signal.SIGTERM)
        assert stopping() == signal.SIGTERM
    assert [signal.getsignal(signum) for signum in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
