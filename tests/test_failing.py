"""What one of two processes meets alone ends both, at once and with its exit code; the processes are real."""

import os
import pathlib
import socket
import subprocess
import sys

import processes
import pytest
from test_many_hosts import command, finish, start
from untrained import save_teacher

ROOT = pathlib.Path(__file__).parent.parent
ENDED = """
import jax, os, sys
from radlads_jax.system import failing, hosts
hosts.start(**eval(sys.argv[1]))
hosts.barrier()
if jax.process_index() == int(sys.argv[2]):
    failing.end_all(int(sys.argv[3]))
hosts.barrier()
"""
# The disk of process 0 is full when it logs its third step.
FULL = """
import errno
import jax
from radlads_jax import launch
from radlads_jax.run.metrics import MetricsLogger
log = MetricsLogger.log
def full(self, stage, step, values):
    if step == 3 and jax.process_index() == 0:
        raise OSError(errno.ENOSPC, "no room")
    log(self, stage, step, values)
MetricsLogger.log = full
launch.command_line()
"""
OTHER = "error: process {} could not go on, and says why.\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.parametrize(("ending", "code"), [(0, 1), (1, 75), (2, 0)], ids=["first", "second", "none"])
def test_all_end_with_its_code(ending: int, code: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        join = {"coordinator": f"localhost:{free.getsockname()[1]}", "num_processes": 2}
    environ = processes.environ(JAX_PLATFORMS="cpu", XLA_FLAGS=processes.xla_flags())
    arguments = [[repr(join | {"process_id": i}), str(ending), str(code)] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [sys.executable, "-c", ENDED]
    texts = finish([subprocess.Popen([*words, *more], cwd=ROOT, env=environ, **pipes) for more in arguments], code)
    assert [OTHER.format(ending) in text for text in texts] == [ending == 1, ending == 0]


def test_a_text_that_the_first_alone_reads(teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a tale"}\nno JSON\n')
    words = command(teacher, tmp_path / "run", "fsdp=2", ("stage1",), "rad_rwkv7")
    words = [word for word in words if "data.documents" not in word]
    words += ["--config.data.source=jsonl", f"--config.data.path={tmp_path / 'text.jsonl'}"]
    first, second = finish(start(words, 2, 1), 1)
    assert "text.jsonl" in first and OTHER.format(0) in second and "Traceback" not in first + second


@pytest.mark.slow
def test_a_disk_of_the_first_is_full(teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = command(teacher, tmp_path / "run", "fsdp=2", ("stage1",), "rad_rwkv7")
    first, second = finish(start([sys.executable, "-c", FULL, *words[3:]], 2, 1), 1)
    assert "no room" in first and OTHER.format(0) in second


def test_another_work_directory_is_refused(teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = command(teacher, tmp_path / "run", "fsdp=2", ("stage1",), "rad_rwkv7")
    texts = finish(start(words, 2, 1, more=[f"--workdir={tmp_path / name}" for name in ("run", "other")]), 1)
    for text in texts:
        assert (
            f"process 1 was started with --workdir = {tmp_path / 'other'}, process 0 with {tmp_path / 'run'} " in text
        )
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()


def test_a_work_directory_that_they_do_not_share_is_refused(teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Of a run that goes on too: the second process would find no checkpoint, and begin."""
    words = command(teacher, pathlib.Path("/proc/self/cwd/run"), "fsdp=2", ("stage1",), "rad_rwkv7")
    disks = [tmp_path / "first", tmp_path / "second"]
    for disk in disks:
        disk.mkdir()
    (disks[0] / "run" / "checkpoints" / "stage1").mkdir(parents=True)
    for text in finish(start(words, 2, 1, places=disks), 1):
        assert "what process 0 wrote to /proc/self/cwd/run is not there for all processes" in text
    assert sorted(os.listdir(disks[0] / "run")) == [".lock", "checkpoints"] and os.listdir(disks[1]) == []
