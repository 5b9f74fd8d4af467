"""Joining processes: from flags, from a Slurm step, and what is refused. The processes are real, over gloo."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import processes
import pytest

from radlads_jax.system import hosts

ROOT = pathlib.Path(__file__).parent.parent
JOINED = r"""
import jax, sys
from jax.experimental import multihost_utils
from radlads_jax.system import hosts
hosts.start(**eval(sys.argv[1]))
seen = multihost_utils.process_allgather(jax.numpy.int32(10 + jax.process_index()))
lines = [
    f"{jax.process_index()} {jax.process_count()} {jax.device_count()} {seen.tolist()}",
    f"{hosts.agreed(jax.process_index() + 5)} {hosts.is_first()}",
    hosts.said_by_first(["{layers: ü}", "another, and longer"][jax.process_index()]),
]
try:
    hosts.require_same({"config.seed": 1, "config.stage1.lr": jax.process_index()})
except ValueError as error:
    lines.append(str(error))
# In one piece, as gloo prints to the same pipe.
sys.stdout.write("\n".join(lines) + "\n")
"""


TERMINATED = """
import os, signal, sys, time
from radlads_jax.system import hosts, stopping
stopping.leave_on_signals()
hosts.start(**eval(sys.argv[1]))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) != 0


def join(arguments: list[dict], environs: list[dict[str, str]]) -> list[str]:
    """What two processes print after joining by hosts.start with these arguments."""
    base = processes.environ(JAX_PLATFORMS="cpu", XLA_FLAGS=processes.xla_flags(devices=2))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED, repr(options)],
            env=base | environ,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
        )
        for options, environ in zip(arguments, environs, strict=True)
    ]
    try:
        texts = [process.communicate(timeout=120)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), texts
        return texts
    finally:
        for process in started:
            process.kill()


def test_a_task_of_a_slurm_step_and_a_process_by_flags_join() -> None:
    job = next(job for job in range(os.getpid() % hosts.PORTS, 2 * hosts.PORTS) if is_free(port_of(job)))
    step = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
    }
    flags = {"coordinator": f"localhost:{port_of(job)}", "num_processes": 2, "process_id": 1}
    printed = join([{"distributed": "auto"}, flags], [step, {}])
    for i, text in enumerate(printed):
        assert f"{i} 2 4 [10, 11]\n" in text
        assert f"6 {i == 0}\n{{layers: ü}}\n" in text
        assert re.search(r"process 1 .*config\.stage1\.lr\b.*\b1\b.*process 0 .*\b0\b", text)


def port_of(job: int) -> int:
    return 61440 + job % 4096


def test_joining_does_not_take_sigterm_away() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        options = {"coordinator": f"localhost:{free.getsockname()[1]}", "num_processes": 1, "process_id": 0}
    command = [sys.executable, "-c", TERMINATED, repr(options)]
    done = subprocess.run(
        command, cwd=ROOT, env=processes.environ(JAX_PLATFORMS="cpu"), capture_output=True, timeout=120
    )
    assert done.returncode == 128 + signal.SIGTERM and b"leaving at once by SIGTERM" in done.stderr, done.stderr


def test_the_command_line_joins_before_it_makes_a_job(tmp_path: pathlib.Path) -> None:
    words = [sys.executable, "-m", "radlads_jax.launch", "--config=configs/demo.py", f"--workdir={tmp_path / 'run'}"]
    environ = processes.environ(JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [*words, "--process_id=0"], env=environ, cwd=ROOT, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: got --process_id=0 and no --coordinator and no --num_processes; expected")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_started_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    hosts.start()
    hosts.start("off", None, None, None)
    assert jax.process_count() == 1


def test_flags_reach_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name in hosts.SLURM:
        monkeypatch.delenv(name, raising=False)
    hosts.start("off", "node1:8476", 4, 3)
    hosts.start("auto")
    explicit, auto = calls
    assert explicit == {
        "coordinator_address": "node1:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert auto == {}, "jax finds TPU and GKE hosts itself"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("off", "node1:8476", None, None), "no --num_processes and no --process_id"),
        (("off", None, None, 0), "--process_id=0"),
        (("auto", "node1:8476", 2, 0), "expected either --distributed=auto alone"),
        (("off", "node1:8476", 2, 2), "--process_id is 2 and --num_processes 2"),
        (("off", "node1:8476", 2, -1), "--process_id is -1 and --num_processes 2"),
        (("off", "node1", 2, 0), "expected HOST:PORT of process 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    with pytest.raises(ValueError, match=re.escape(said)):
        hosts.start(*arguments)


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (
            ValueError("coordinator_address should be defined."),
            ValueError,
            "--distributed=auto .*coordinator_address.*--coordinator",
        ),
        (RuntimeError("no such host"), ConnectionError, ": no such host"),
    ],
)
def test_what_jax_raises_is_explained(
    raised: Exception, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def initialize(**_: object) -> None:
        raise raised

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(kind, match=said):
        hosts.start("auto")


STEP = {
    "SLURM_JOB_ID": "5000",
    "SLURM_STEP_NODELIST": "gpu[03-07,9]",
    "SLURM_STEP_NUM_NODES": "6",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "2",
}


def test_a_task_per_node_has_all_of_its_devices() -> None:
    step = hosts.slurm_processes(STEP)
    assert step is not None and step["cluster_detection_method"] == "deactivate"
    assert (step["num_processes"], step["process_id"]) == (6, 2)
    assert step["coordinator_address"] == "gpu03:62344"
    assert hosts.slurm_processes(STEP | {"SLURM_NTASKS": "12"}) is None
    assert hosts.slurm_processes({}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-4]", "n1"), ("a-b[007,9-12],c", "a-b007"), ("x.y.z,n[1-2]", "x.y.z")],
)
def test_first_host(nodes: str, first: str) -> None:
    assert hosts.first_host(nodes) == first
    with pytest.raises(ValueError, match=r"SLURM_STEP_NODELIST is ''.*--coordinator"):
        hosts.first_host("")
