"""launch/gpu_check.sh and launch/gpu_pack.sh with stand-ins for Python and pip: what runs, and what the report says."""

import os
import pathlib
import shlex
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PARTS = ("machine", "tests", "kernels", "demo", "speed", "convert")


def python(directory: pathlib.Path, cases: str) -> str:
    """A stand-in for Python that notes its arguments, a line each, and then does what its case says."""
    path = directory / "python"
    calls = shlex.quote(str(directory / "calls"))
    path.write_text(f'#!/usr/bin/env bash\necho "$*" >> {calls}\ncase "$*" in\n{cases}\nesac\n')
    path.chmod(0o755)
    return str(path)


def check(directory: pathlib.Path, cases: str, *words: str, **environ: str) -> tuple[int, list[str], str]:
    """(exit code, Python's calls of this run, the report)."""
    env = os.environ | {"PYTHON": python(directory, cases), "OUT": str(directory / "out")} | environ
    (directory / "calls").write_text("")
    line = ["bash", ROOT / "launch" / "gpu_check.sh", *words]
    done = subprocess.run(line, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    report = (directory / "out" / "report.md").read_text()
    assert report in done.stdout
    return done.returncode, (directory / "calls").read_text().splitlines(), report


def test_all_parts_run_and_are_not_run_again(tmp_path):
    cases = "*stage_speed*) echo '| a table |' ;; *launch*) echo 'step 1' ;;"
    code, calls, report = check(tmp_path, cases, "--cpu")
    assert code == 0 and [line[3:] for line in report.splitlines() if line.startswith("## ")] == [*PARTS]
    assert report.count("went well") == len(PARTS)
    assert report.count("| a table |") == 3 and "step 1" not in report, "what a run says is in its log"
    launched = [call for call in calls if "-m radlads_jax.launch" in call]
    assert [call.split("--workdir ")[1].split()[0].rpartition("/")[2] for call in launched] == [
        *("demo", "speed", "pure", "hybrid")
    ]
    assert "attention_every" in launched[3] and "attention_every" not in launched[2]
    assert sum("-m radlads_jax.evaluate" in call for call in calls) == 2
    assert any("-m pytest" in call and "test_gpu.py" in call for call in calls)
    assert [call for call in calls if "gpu_kernels.py errors" in call or "gpu_kernels.py times" in call]
    code, calls, again = check(tmp_path, cases, "--cpu")
    assert (code, calls, again) == (0, [], report)


def test_a_part_that_fails_is_said_and_the_others_run(tmp_path):
    code, _, report = check(
        tmp_path, "*errors*) echo '| above |'; echo oops >&2; exit 1 ;;", "--cpu", "kernels", "demo"
    )
    assert code == 1 and "FAILED with code 1" in report and "| above |" in report and "oops" in report
    assert "## demo\n\nwent well" in report


def test_what_the_time_does_not_reach_is_said(tmp_path):
    """The part that is cut takes its processes with it."""
    code, calls, report = check(tmp_path, "*demo*) sleep 60; echo late ;;", "--cpu", "demo", "speed", LIMIT_S="15")
    assert code == 1 and "cut after" in report and "not begun: the time was over" in report
    assert len(calls) == 1 and "late" not in report


def test_a_stopped_check_leaves_nothing_running(tmp_path):
    env = os.environ | {"PYTHON": python(tmp_path, f"*demo*) touch {tmp_path}/begun; sleep 60 ;;")}
    line = ["bash", ROOT / "launch" / "gpu_check.sh", "--cpu", "demo", "speed"]
    script = subprocess.Popen(line, env=env | {"OUT": str(tmp_path / "out")}, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    script.terminate()
    assert script.wait(timeout=30) == 143
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in processes
    assert len((tmp_path / "calls").read_text().splitlines()) == 1, "the next part did not begin"


@pytest.mark.parametrize("given", [{"TEACHER": "a"}, {"TEXT": "a"}, {"TEACHER": "a", "TEXT": "b"}])
def test_a_teacher_without_its_text_is_refused(given):
    line = ["bash", ROOT / "launch" / "gpu_check.sh", "--cpu"]
    done = subprocess.run(line, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 1 and ("is not there" if len(given) == 2 else "both or neither") in done.stderr


def test_an_unknown_part_is_refused():
    done = subprocess.run(["bash", ROOT / "launch" / "gpu_check.sh", "fly"], capture_output=True, text=True)
    assert done.returncode == 1 and "got 'fly'" in done.stderr and "kernels" in done.stderr


@pytest.fixture
def packed(tmp_path):
    """The folder of parts, of a teacher and a text."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "teacher" / "model.safetensors").write_bytes(os.urandom(500_000))
    (tmp_path / "text").write_text("a text")
    body = (
        """*download*)
        while [[ $1 != --dest ]]; do shift; done
        touch "$2/some-1.0-py3-none-any.whl"
        cp "$4" """
        + shlex.quote(str(tmp_path / "wanted"))
        + " ;;"
    )
    env = os.environ | {"PYTHON": python(tmp_path, body), "PART": "300K"}
    env |= {"TEACHER": str(tmp_path / "teacher"), "TEXT": str(tmp_path / "text")}
    line = ["bash", ROOT / "launch" / "gpu_pack.sh", tmp_path / "parts"]
    subprocess.run(line, env=env, check=True, capture_output=True, timeout=120)
    return tmp_path


def test_the_parts_make_the_whole(packed):
    parts = sorted((packed / "parts").glob("gpu_check.part.*"))
    assert len(parts) > 3 and max(part.stat().st_size for part in parts) == 300 * 1024
    join = "sha256sum --quiet --check SHA256SUMS && cat gpu_check.part.* | tar --extract"
    subprocess.run(join, shell=True, check=True, cwd=packed / "parts")
    whole = packed / "parts" / "radlads_jax"
    for name in ("launch/three_stages.sh", "constraints/py312.txt"):
        assert (whole / name).read_bytes() == (ROOT / name).read_bytes()
    model = "teacher/model.safetensors"
    assert (whole / "packed" / model).read_bytes() == (packed / model).read_bytes()
    assert (whole / "packed" / "text.txt").read_text() == "a text"
    assert [wheel.name for wheel in (whole / "packed" / "wheels").iterdir()] == ["some-1.0-py3-none-any.whl"]
    wanted = (packed / "wanted").read_text().splitlines()
    names = {line.partition("==")[0] for line in wanted}
    assert {"jax-triton", "flax", "grain", "ml_collections", "pytest"} <= names
    assert not names & {"jax", "jaxlib", "torch", "triton", "numpy"}, "what such a machine has"
    assert all("==" in line for line in wanted)
