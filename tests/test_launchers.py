"""The scripts in launch/: they parse, their commands exist, and they do the right thing after every kind of end."""

import math
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
from typing import Any

import pytest
import yaml
from absl import flags

from radlads_jax import launch
from radlads_jax.config import check_override
from radlads_jax.system import command

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("setup_env.sh", "slurm.sbatch", "three_stages.sh", "tpu_pod.sh")
JOBSETS = ("jobset.yaml", "jobset_gpu.yaml")
GPU = ("gpu_check.sh", "gpu_pack.sh")
IMAGE = ("Dockerfile", "Dockerfile.dockerignore")
# With tests of their own: test_session.py, test_notebooks.py.
BORROWED = ("colab.ipynb", "kaggle.ipynb", "session.py")
# What stands in a script between the module's name and the user's own flags.
COMMAND = re.compile(r"-m radlads_jax\.(\w+)((?:[ =\"']+(?:--[\w.]+|\"?\$\{?\w+\}?\"?|[\w./$()]+))*)")


def text(name: str) -> str:
    return (LAUNCH / name).read_text(encoding="utf-8")


def jobset(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(name))


def pod(name: str) -> dict[str, Any]:
    return jobset(name)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(module, its flags) of every command of ours in a file, header included."""
    if name in JOBSETS:
        words = pod(name)["containers"][0]["command"]
        return [(words[2].removeprefix("radlads_jax."), words[3:])]
    lines = text(name).replace("\\\n", " ")
    return [(match[1], re.findall(r"--[\w.]+(?:=[\w./]+)?", match[2])) for match in COMMAND.finditer(lines)]


def test_all_of_them_are_looked_at() -> None:
    assert sorted(path.name for path in LAUNCH.iterdir()) == sorted((*SCRIPTS, *GPU, *JOBSETS, *IMAGE, *BORROWED))


@pytest.mark.parametrize("name", (*SCRIPTS, *GPU))
def test_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert (LAUNCH / name).stat().st_mode & stat.S_IXUSR


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", (*SCRIPTS, *GPU))
def test_shellcheck(name: str) -> None:
    done = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", (*SCRIPTS, *GPU, *JOBSETS, IMAGE[0]))
def test_a_header_says_how_to_run_it_and_what_to_change(name: str) -> None:
    header = re.match(r"(#.*\n)+", text(name))
    assert header and re.search(r"^# Run: ", header[0], re.M) and re.search(r"^# Change: ", header[0], re.M)
    assert all(len(line) <= 120 for line in text(name).splitlines())


@pytest.mark.parametrize("name", (*SCRIPTS[1:], *JOBSETS))
def test_commands_exist(name: str) -> None:
    shown = commands(name)
    assert shown
    known = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[launch.__name__]}
    assert {"config", "workdir", "distributed"} <= known
    for module, words in shown:
        assert module == "launch" and words
        settings = {word for word in words if word.startswith("--config.")}
        assert {word[2:].partition("=")[0] for word in {*words} - settings} <= known


@pytest.mark.parametrize("name", (*SCRIPTS, *GPU, *JOBSETS, *IMAGE, *BORROWED))
def test_files_and_settings_named_in_them_exist(name: str) -> None:
    for path in re.findall(r"\b((?:configs|launch|constraints)/[\w./-]+\w)", text(name)):
        assert (ROOT / path).exists(), path
    for path, value in re.findall(r"--config\.([\w.]+)=(\d[\w.+-]*)?", text(name)):
        check_override(path, value or None)


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets(name: str) -> None:
    whole = jobset(name)
    assert (whole["apiVersion"], whole["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec, job = whole["spec"], whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0 and pod(name)["restartPolicy"] == "Never", "what a podFailurePolicy needs"
    container = pod(name)["containers"][0]
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [command.EXIT_FAILED],
    }
    refused = {"name": "refused", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert spec["failurePolicy"]["rules"] == [refused]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod(name)["volumes"]}
    workdir = next(word for word in container["command"] if word.startswith("--workdir="))
    assert workdir.removeprefix("--workdir=").startswith(mounted["runs"])


@pytest.mark.parametrize(("name", "platforms"), [("jobset.yaml", "tpu,cpu"), ("jobset_gpu.yaml", "cuda")])
def test_a_pod_without_its_devices_is_refused(name: str, platforms: str) -> None:
    """Here there are none of them; a run by the hosts' CPUs would bill on."""
    variables = {each["name"]: each["value"] for each in pod(name)["containers"][0]["env"]}
    assert variables["JAX_PLATFORMS"] == platforms
    words = "from radlads_jax.system import backend; backend.require()"
    # On a machine that has some, none is to be seen.
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TPU_VISIBLE_CHIPS": "", "TPU_SKIP_MDS_QUERY": "1"}
    env = os.environ | variables | hidden
    done = subprocess.run([sys.executable, "-c", words], env=env, capture_output=True, text=True)
    assert f"JAX_PLATFORMS is '{platforms}', and jax can not use that here" in done.stderr


@pytest.mark.parametrize("name", JOBSETS)
def test_jobs_are_of_kubernetes_own_schema(name: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    job = jobset(name)["spec"]["replicatedJobs"][0]["template"]
    job |= {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hosts"}}
    validator.validate(job, desired_version="1.30", strict=True)
    job["spec"]["completion"] = 1
    with pytest.raises(validator.ValidationError, match="completion"):
        validator.validate(job, desired_version="1.30", strict=True)


def test_tpu_hosts_cover_the_topology() -> None:
    job = jobset("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]
    chips = math.prod(map(int, pod("jobset.yaml")["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert chips == job["parallelism"] * pod("jobset.yaml")["containers"][0]["resources"]["limits"]["google.com/tpu"]


def machine_types() -> dict[str, tuple[str, int, list[str]]]:
    """jobset.yaml's table: machine type -> (accelerator, chips, topologies)."""
    row = re.compile(r"^# +(tpu[\w-]+) +([\w-]+) +(\d) +((?:\d+x[\dx]+(?:, )?)+)", re.M)
    rows = row.findall(text("jobset.yaml"))
    return {name: (kind, int(chips), re.findall(r"[\dx]+", made)) for kind, name, chips, made in rows}


def test_tpu_machine_types_have_that_many_chips() -> None:
    """A type's own name ends in its chips; the one that makes the node pool is the one that the pods ask for."""
    table = machine_types()
    assert len(table) == 6
    assert all(name.endswith(f"-{chips}t") for name, (_, chips, _) in table.items())
    for _, chips, topologies in table.values():
        assert all(math.prod(map(int, made.split("x"))) % chips == 0 for made in topologies)
    name = re.search(r"--num-nodes=(\d) \\\n# +--machine-type=([\w-]+)", text("jobset.yaml"))
    assert name
    accelerator, chips, topologies = table[name[2]]
    selector = pod("jobset.yaml")["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] in topologies
    assert pod("jobset.yaml")["containers"][0]["resources"]["limits"]["google.com/tpu"] == chips
    assert jobset("jobset.yaml")["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] == int(name[1])


@pytest.mark.parametrize("name", JOBSETS)
def test_pods_get_tokens_from_a_secret(name: str) -> None:
    secret = pod(name)["containers"][0]["envFrom"][0]["secretRef"]
    assert secret["optional"] and f"kubectl create secret generic {secret['name']} " in text(name)


@pytest.mark.parametrize(("name", "devices"), [*zip(JOBSETS, ("tpu", "cuda"), strict=True)])
def test_the_image_is_what_the_pods_expect(name: str, devices: str) -> None:
    """The repository in their working directory, the environment where their command is."""
    lines = dict(line.split(" ", 1) for line in text("Dockerfile").splitlines() if re.match(r"[A-Z]+ ", line))
    assert {line.split(" ")[0] for line in text("Dockerfile").splitlines() if re.match(r"[A-Z]+ ", line)} == {*lines}
    container = pod(name)["containers"][0]
    assert lines["WORKDIR"] == container["workingDir"] and lines["COPY"] == ". ."
    assert lines["RUN"].endswith('launch/setup_env.sh "$DEVICES"') and container["command"][0] == ".venv/bin/python"
    assert container["image"].endswith(f":{devices}") and f"DEVICES={devices}" in text("Dockerfile")
    assert (ROOT / "constraints" / "py312.txt").exists() and lines["FROM"].endswith("python:3.12-slim")
    ignored = text("Dockerfile.dockerignore").splitlines()
    assert {".venv*", ".git", "runs"} <= {*ignored} and "launch" not in ignored


def test_the_gpu_coordinator_is_the_first_pod() -> None:
    whole = jobset("jobset_gpu.yaml")
    replicated, name = whole["spec"]["replicatedJobs"][0], whole["metadata"]["name"]
    words = dict(word.split("=", 1) for word in pod("jobset_gpu.yaml")["containers"][0]["command"][3:])
    assert words["--coordinator"] == f"{name}-{replicated['name']}-0-0.{name}:8476"
    assert words["--num_processes"] == str(replicated["template"]["spec"]["parallelism"])


def stub(directory: pathlib.Path, name: str, body: str = "") -> None:
    """A program that adds its name and arguments to directory/calls, and then does `body`."""
    path, calls = directory / name, shlex.quote(str(directory / "calls"))
    note = f"{{ printf '%s\\x1f' {name} \"$@\"; printf '\\x1e'; }} >> {calls}"
    path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
    path.chmod(0o755)


def run(name: str, stubs: pathlib.Path, *arguments: str, **environ: str) -> tuple[int, list[list[str]], str]:
    """(exit code, the stubs' calls as words, what was printed)."""
    env = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"} | environ
    line = ["bash", LAUNCH / name, *arguments]
    done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    calls = (stubs / "calls").read_text().split("\x1e")[:-1] if (stubs / "calls").exists() else []
    return done.returncode, [call.split("\x1f")[:-1] for call in calls], done.stdout + done.stderr


@pytest.mark.parametrize("code", [0, 1, 143])
def test_three_stages_is_the_run(tmp_path: pathlib.Path, code: int) -> None:
    stub(tmp_path, "python", f"echo $$; exit {code}")
    words = ("configs/convert.py:lr=1e-4", "runs/a b", "--config.data.path=x y", "--config.seed=1")
    returned, calls, _ = run("three_stages.sh", tmp_path, *words, PYTHON=str(tmp_path / "python"))
    expected = ["python", "-m", "radlads_jax.launch", "--config", words[0], "--workdir", words[1], *words[2:]]
    assert (returned, calls) == (code, [expected])
    (tmp_path / "calls").unlink()
    _, calls, _ = run("three_stages.sh", tmp_path, PYTHON=str(tmp_path / "python"))
    assert calls[0][3:] == ["--config", "configs/demo.py", "--workdir", "runs/demo"]


@pytest.mark.parametrize(
    ("code", "state", "restarts", "again"),
    [
        (0, "RUNNING", "0", False),
        (1, "RUNNING", "0", False),
        (75, "RUNNING", "0", True),
        (143, "RUNNING", "3", True),
        (137, "RUNNING", "", True),
        (143, "RUNNING", "5", False),
        (143, "COMPLETING", "0", False),
    ],
    ids=["done", "refused", "no answer", "stopped", "killed", "too often", "cancelled"],
)
def test_slurm_queues_again_what_a_signal_or_an_outage_ended(
    tmp_path: pathlib.Path, code: int, state: str, restarts: str, again: bool
) -> None:
    stub(tmp_path, "srun", f"exit {code}")
    stub(tmp_path, "squeue", f"echo {state}")
    stub(tmp_path, "scontrol")
    environ = {
        "SLURM_JOB_ID": "77",
        "SLURM_RESTART_COUNT": restarts,
        "MAX_RESTARTS": "5",
        "CONFIG": "configs/convert.py",
        "SLURM_CPUS_PER_TASK": "32",
    }
    returned, calls, _ = run("slurm.sbatch", tmp_path, "--config.seed=1", **environ)
    assert returned == code
    assert calls[0][:3] == ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=32"], "srun does not take it from sbatch"
    assert calls[0][4:] == shlex.split(
        "-m radlads_jax.launch --distributed=auto --config configs/convert.py --workdir runs/demo --config.seed=1"
    )
    assert (["scontrol", "requeue", "77"] in calls) == again


def test_slurm_outlives_a_sigterm(tmp_path: pathlib.Path) -> None:
    """The signal that preempts reaches the script too; it has to wait for the tasks to save."""
    stub(tmp_path, "srun", 'kill -TERM "$PPID"; sleep 0.3; echo saved; exit 143')
    stub(tmp_path, "squeue", "echo RUNNING")
    stub(tmp_path, "scontrol")
    code, calls, printed = run("slurm.sbatch", tmp_path, SLURM_JOB_ID="77")
    assert code == 143 and "saved" in printed and ["scontrol", "requeue", "77"] in calls


# Google's own words for a slice that is not there.
def pythons(directory: pathlib.Path, version: str, *, venv: bool, pip: bool) -> None:
    """Stand-ins for every python3 that setup_env.sh tries: of this version, with or without venv and pip."""
    number = tuple(map(int, version.split(".")))
    body = f"""case "$*" in
        *'sys.exit(sys.version_info < (3, 11))'*) exit {int(number < (3, 11))} ;;
        *'print("python'*) echo python{version} ;;
        *'import venv'*) exit {int(not venv)} ;;
        *'-m pip'*uv) {"mkdir -p .cache/setup_env/bin" if pip else "exit 1"} ;;
        *) exit 3 ;;
    esac"""
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        stub(directory, name, body)


@pytest.mark.parametrize(
    ("version", "said"),
    [("3.12", "sudo apt-get install python3.12-venv"), ("3.10", "is no Python 3.11 or newer")],
    ids=["Ubuntu 24.04", "Ubuntu 22.04"],
)
def test_setup_says_what_to_install(tmp_path: pathlib.Path, version: str, said: str) -> None:
    """Where the system's Python has no venv and uv can not be had."""
    pythons(tmp_path, version, venv=False, pip=False)
    stub(tmp_path, "uv", "exit 1")
    code, calls, printed = run("setup_env.sh", tmp_path, "cpu", VENV=str(tmp_path / "venv"))
    assert code == 1 and said in printed and "Traceback" not in printed
    assert not (tmp_path / "venv").exists() and not any("--clear" in call for call in calls)


def test_setup_works_without_venv_where_uv_is_at_hand(tmp_path: pathlib.Path) -> None:
    pythons(tmp_path, "3.12", venv=False, pip=False)
    stub(tmp_path, "uv", f"[[ $2 == install ]] || echo {shlex.quote(str(tmp_path / 'own'))}")
    stub(tmp_path, "own", "exit 7")
    code, calls, _ = run("setup_env.sh", tmp_path, "cpu", VENV=str(tmp_path / "venv"))
    assert code == 7 and calls[-1] == ["own", "-m", "venv", "--clear", str(tmp_path / "venv")]


@pytest.mark.parametrize(
    ("name", "arguments", "environ", "said"),
    [
        ("setup_env.sh", ("gpu",), {}, "expected cpu, tpu or cuda"),
        ("setup_env.sh", ("cpu",), {"PYTHON": "/bin/false"}, "is no Python 3.11 or newer"),
        ("tpu_pod.sh", ("up",), {"NAME": "a", "ZONE": "b"}, "expected the run's flags"),
        ("tpu_pod.sh", ("fly",), {"NAME": "a", "ZONE": "b"}, "expected up, logs, stop or delete"),
        ("tpu_pod.sh", ("up",), {"NAME": ""}, "expected NAME="),
        ("tpu_pod.sh", ("up", "-x"), {"NAME": "a", "ZONE": "b", "ACCELERATOR": "tpu7x-8"}, "has v6e and older ones"),
        ("tpu_pod.sh", ("up", "-x"), {"NAME": "a", "ZONE": "b", "HF_TOKEN": "a b"}, "HF_TOKEN has characters"),
    ],
)
def test_what_is_refused(
    tmp_path: pathlib.Path, name: str, arguments: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    stub(tmp_path, "gcloud", "exit 1")
    code, calls, printed = run(name, tmp_path, *arguments, **environ)
    assert code == 1 and said in printed and calls == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_does_not_replace_an_accelerators_environment(tmp_path: pathlib.Path) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    for name in (".made-by-setup-env", "kept"):
        (venv / name).touch()
    command = ["make", "venv", f"VENV={venv}", f"PYTHON={sys.executable}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode != 0 and "launch/setup_env.sh" in ran.stderr and "VENV=.venv-cpu" in ran.stderr
    assert sorted(path.name for path in venv.iterdir()) == [".made-by-setup-env", "kept"]
