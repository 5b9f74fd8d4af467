"""A conversion by two processes that loses one: the other ends too and says why, and the job goes on where it was."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import killed
import processes
import pytest
from untrained import save_teacher

pytestmark = pytest.mark.slow

STEPS = {"stage1": 6, "stage2": 4}
# Until a lost process is missed, and the others have ended: the longest that jax's own heartbeats leave it.
BOUND = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with the teacher, and with what the job leaves that is not disturbed."""
    directory = tmp_path_factory.mktemp("hosts")
    save_teacher(directory / "teacher")
    Pair(directory, directory / "undisturbed").finish(0)
    return directory


class Pair:
    """Two processes of one job, joined over gloo, each with one device and its output in a file."""

    def __init__(
        self,
        root: pathlib.Path,
        workdir: pathlib.Path,
        *,
        late: float = 0.0,
        second: tuple[str, ...] = (),
        environ: dict[str, str] | None = None,
    ):
        self.workdir = workdir
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        base = killed.environment(root / "cache", processes.xla_flags())
        words = [*killed.flags(root / "teacher" / "model", workdir, "rad_rwkv7", STEPS), "--config.mesh.fsdp=2"]
        self.logs = [workdir.with_name(f"{workdir.name}.{port}.{i}.log") for i in range(2)]
        self.processes: list[subprocess.Popen] = []
        for i, log in enumerate(self.logs):
            join = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
            command = [sys.executable, "-m", "radlads_jax.launch", *words, *join, *(second if i else ())]
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=base | (environ or {} if i else {}),
                        cwd=killed.ROOT,
                        stdout=output,
                        stderr=output,
                    )
                )
            time.sleep(late if i == 0 else 0.0)

    def finish(self, *codes: int, within: float = 900) -> list[str]:
        """Waits for both; with codes given, each has to have ended with one of them."""
        try:
            ended = [process.wait(within) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        texts = [log.read_text(errors="replace") for log in self.logs]
        assert not codes or set(ended) <= set(codes), (ended, texts)
        return texts

    def wait_for(self, happened: Callable[[], Any]) -> None:
        while not happened():
            assert all(process.poll() is None for process in self.processes), [log.read_text() for log in self.logs]
            time.sleep(0.002)


def a_step(pair: Pair) -> bool:
    metrics = pair.workdir / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= 3


def a_save(pair: Pair) -> bool:
    return any(pair.workdir.glob("checkpoints/*/*orbax-checkpoint-tmp*"))


def the_beginning(pair: Pair) -> bool:
    return "stage1 0/6" in pair.logs[0].read_text()


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("during", [the_beginning, a_step, a_save])
def test_a_lost_process_ends_the_other_and_the_job_goes_on(
    during: Any, lost: int, root: pathlib.Path, tmp_path
) -> None:
    pair = Pair(root, tmp_path / "run")
    pair.wait_for(lambda: during(pair))
    pair.processes[lost].send_signal(signal.SIGKILL)
    other = pair.processes[1 - lost]
    # 1 would be a mistake, which no launcher tries again.
    assert other.wait(BOUND) not in (0, 1)
    pair.finish()
    text = pair.logs[1 - lost].read_text()
    print(f"lost {lost}, {during.__name__}: the other ended with {other.returncode}: {text[-1500:]}")
    assert "error: " in text or "terminat" in text.lower() or "Connection" in text, text
    Pair(root, tmp_path / "run").finish(0)
    assert killed.problems(tmp_path / "run", killed.result(root / "undisturbed", STEPS), STEPS) == []


def test_a_late_process_is_waited_for(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    Pair(root, tmp_path / "run", late=30.0).finish(0)
    assert killed.problems(tmp_path / "run", killed.result(root / "undisturbed", STEPS), STEPS) == []


def test_a_process_that_stands_still_is_waited_for(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pair = Pair(root, tmp_path / "run")
    pair.wait_for(lambda: a_step(pair))
    pair.processes[1].send_signal(signal.SIGSTOP)
    time.sleep(30)
    pair.processes[1].send_signal(signal.SIGCONT)
    pair.finish(0)
    assert killed.problems(tmp_path / "run", killed.result(root / "undisturbed", STEPS), STEPS) == []


def test_a_process_of_other_settings_is_refused(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    texts = Pair(root, tmp_path / "run", second=("--config.stage2.lr=0.5",)).finish(1)
    for text in texts:
        assert re.search(r"process 1 .*config\.stage2\.lr\b.*\b0\.5\b.*process 0 .*\b0\.003\b.*\(1 ", text)
    assert not (tmp_path / "run").exists()


def test_a_process_of_other_packages_is_refused(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "packages" / "optax-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9\n")
    paths = os.pathsep.join([str(other.parent), str(killed.ROOT)])
    for text in Pair(root, tmp_path / "run", environ={"PYTHONPATH": paths}).finish(1):
        assert re.search(r"process 1 .*\boptax\b.*\b9\.9\b.*process 0 ", text)


def test_a_second_job_in_the_directory_is_refused_by_all_its_processes(root: pathlib.Path, tmp_path) -> None:
    first = Pair(root, tmp_path / "run")
    first.wait_for(lambda: (tmp_path / "run" / "config.json").exists())
    texts = Pair(root, tmp_path / "run").finish(1)
    assert "is in use by another run" in texts[0] and "process 0 could not begin" in texts[1]
    for process in first.processes:
        process.kill()
    first.finish()
