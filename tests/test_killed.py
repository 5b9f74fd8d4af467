"""A few of the kills of killed.py, and runs whose output loses its reader or its terminal."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import killed
import processes
import pytest
from untrained import save_teacher

ROOT = Path(__file__).parent.parent


def test_killed_right_before_operations_on_files_a_run_loses_nothing():
    command = [sys.executable, str(ROOT / "tests" / "measure" / "killed.py"), "--short", "--seed=4"]
    environment = processes.environ()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 times ended" in done.stdout


@pytest.mark.slow
def test_a_run_goes_on_behind_head(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    words = killed.flags(teacher, tmp_path / "run", "rad_rwkv7", killed.SHORT)
    command = [sys.executable, "-m", "radlads_jax.launch", *words]
    environment = killed.environment(tmp_path / "cache", processes.xla_flags())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    assert process.stdout is not None and "before the run" in process.stdout.readline()
    process.stdout.close()
    said = process.communicate()[1]
    assert process.returncode == 0 and said.count("nobody reads the output any more") == 1, said
    assert killed.problems(tmp_path / "run", {}, killed.SHORT) == []


# As a shell's foreground job: the terminal is its session's, and closing it sends SIGHUP.
ON_A_TERMINAL = """
import os, runpy, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.open(os.ttyname(0), os.O_RDWR)
runpy.run_module("radlads_jax.launch", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher")
    words = killed.flags(teacher, tmp_path / "run", "rad_rwkv7", {"stage1": 400})
    environment = killed.environment(tmp_path / "cache", processes.xla_flags())
    ours, its = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, *words]
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=its, stdout=its, stderr=its, start_new_session=True
    )
    os.close(its)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        said = os.read(ours, 10_000)
    os.close(ours)
    assert process.wait(600) == 128 + signal.SIGHUP, said.decode(errors="replace")
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints" / "stage1").iterdir())
    assert 3 <= saved < 400 and metrics.read_text().count("\n") == saved
