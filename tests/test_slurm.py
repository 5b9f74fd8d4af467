"""launch/slurm.sbatch under a real Slurm on this machine: a task is killed, the job is queued again, nothing is lost.

Debian's Slurm and munge, which are installed where they are missing (as root), run with two nodes that are both this
machine, one task on each; the scheduler's files are in a temporary directory, its ports are free ones.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from safetensors.numpy import load_file

from radlads_jax.reporting.metrics_file import read_metrics

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
STEPS = {"stage1": 12, "stage2": 12, "stage3": 6}
ROWS, TOKENS = 4, 64
PATIENCE = 1500.0

# The first node's name is this host's, by which the tasks find the first of them; localhost would not be taken.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldTimeout=300
SlurmdTimeout=300
MessageTimeout=60
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName={host}-second NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes={host},{host}-second Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def install() -> None:
    if all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and only root can install it, with apt-get")
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update"], check=True, env=environ)
    subprocess.run(["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES], check=True, env=environ)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch, squeue and scontrol find a running Slurm."""
    install()
    directory = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname()
    for name in ("state", f"spool-{host}", f"spool-{host}-second"):
        (directory / name).mkdir()
    key = directory / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = directory / "slurm.conf"
    conf.write_text(CONF.format(host=host, directory=directory, ports=free_ports(3)))
    environ = os.environ | {"SLURM_CONF": str(conf)}
    own = [f"--{name}={directory}/munge.{end}" for name, end in (("socket", "socket"), ("key-file", "key"))]
    own += [f"--{name}-file={directory}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", "--force", *own],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", name] for name in (host, f"{host}-second")),
    ]
    daemons = []
    try:
        for words in commands:
            log = (directory / f"{'-'.join(words[:1] + words[-1:])}.out".replace("/", "_")).open("w")
            daemons.append(subprocess.Popen(words, env=environ, stdout=log, stderr=log))
            time.sleep(2)
            assert daemons[-1].poll() is None, pathlib.Path(log.name).read_text()
        await_words(environ, ["sinfo", "--noheader", "--format=%T"], "idle", 120)
        yield environ
    finally:
        subprocess.run(["scancel", "--user=root"], env=environ, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)


def await_words(environ: dict[str, str], words: list[str], wanted: str, seconds: float) -> None:
    """Until a command prints `wanted` and nothing else."""
    end, said = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        done = subprocess.run(words, env=environ, capture_output=True, text=True)
        said = (done.stdout + done.stderr).strip()
        if said == wanted:
            return
        time.sleep(1)
    raise TimeoutError(f"{' '.join(words)} says {said!r} after {seconds:g} s, not {wanted!r}")


def submit(environ: dict[str, str], workdir: pathlib.Path, log: pathlib.Path) -> str:
    """The number of a job that runs the demo, made short, on both nodes."""
    settings = {"mesh.fsdp": 2, "data.documents": 300, "data.eval_rows": 8, "train.checkpoint_every": 2}
    settings |= {"train.log_every": 1, "train.sample_tokens": 2}
    for name, steps in STEPS.items():
        recipe = {"seq_len": TOKENS, "batch_size": ROWS, "tokens": ROWS * TOKENS * steps, "warmup_steps": 2}
        settings |= {f"{name}.{field}": value for field, value in recipe.items()}
    here = {"WORKDIR": str(workdir), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    here |= {"XLA_FLAGS": "", "CONFIG": "configs/demo.py"}
    # What this machine has in the place of a node of GPUs.
    machine = ["--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=60", f"--output={log}"]
    words = ["sbatch", "--parsable", *machine, "launch/slurm.sbatch"]
    words += [f"--config.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(words, env=environ | here, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def await_end(environ: dict[str, str], job: str, log: pathlib.Path) -> None:
    words = ["squeue", "--noheader", "--job", job, "--states=all", "--format=%T"]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        state = subprocess.run(words, env=environ, capture_output=True, text=True).stdout.strip()
        if state == "COMPLETED":
            return
        assert state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", ""), (state, log.read_text())
        time.sleep(1)
    raise TimeoutError(f"job {job} is {state} after {PATIENCE:g} s: {log.read_text()}")


def task(number: int, workdir: pathlib.Path) -> int:
    """The process of one of the job's tasks."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            environ = (process / "environ").read_bytes().split(b"\0")
            is_ours = words[1:3] == [b"-m", b"radlads_jax.launch"] and os.fsencode(workdir) in words
            if is_ours and f"SLURM_PROCID={number}".encode() in environ:
                return int(process.name)
    raise ProcessLookupError(f"no task {number} of {workdir}")


def losses(workdir: pathlib.Path) -> list[tuple[str, int, float]]:
    return [(record["stage"], record["step"], record["loss"]) for record in read_metrics(workdir)]


def test_a_killed_task_is_queued_again_and_loses_nothing(slurm, tmp_path) -> None:
    await_end(slurm, submit(slurm, tmp_path / "whole", tmp_path / "whole.log"), tmp_path / "whole.log")
    workdir, log = tmp_path / "killed", tmp_path / "killed.log"
    job = submit(slurm, workdir, log)
    end = time.monotonic() + PATIENCE
    while len(losses(workdir)) < STEPS["stage1"] + 5:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    os.kill(task(1, workdir), signal.SIGKILL)
    await_end(slurm, job, log)
    said = log.read_text()
    assert "the job is queued again" in said and "stage2: continuing" in said
    assert losses(workdir) == losses(tmp_path / "whole")
    assert [line[:2] for line in losses(workdir)] == [(n, i + 1) for n, count in STEPS.items() for i in range(count)]
    got, expected = (load_file(place / "export" / "model.safetensors") for place in (workdir, tmp_path / "whole"))
    assert got.keys() == expected.keys()
    assert all((got[name] == tensor).all() for name, tensor in expected.items())
