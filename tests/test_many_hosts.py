"""A conversion by two processes: the same losses and weights as by one, stopped and continued by any number."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import processes
import pytest
from safetensors.numpy import load_file
from untrained import save_teacher

from radlads_jax.reporting.metrics_file import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS = {"stage1": 6, "stage2": 4, "stage3": 4}
ROWS, TOKENS = 8, 16


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def command(teacher: pathlib.Path, workdir: pathlib.Path, mesh: str, stages: tuple[str, ...], mixer: str) -> list[str]:
    settings = {
        "dtype": "float32",
        "teacher.dtype": "float32",
        "export.dtype": "float32",
        "teacher.path": teacher,
        "student.mixer": mixer,
        "data.source": "synthetic",
        "data.documents": 60,
        "data.eval_rows": 16,
        "stages": stages,
        "train.log_every": 2,
        "train.checkpoint_every": 3,
        "train.eval_batch_size": 8,
        "train.sample_prompts": ("This is a tale of",),
        "train.sample_tokens": 3,
    }
    for name in stages:
        recipe = {"seq_len": TOKENS, "batch_size": ROWS, "tokens": ROWS * TOKENS * STEPS[name], "warmup_steps": 2}
        recipe |= dict.fromkeys(("lr", "lr_final", "mixer_lr", "mixer_lr_final"), 1e-3)
        settings |= {f"{name}.{field}": value for field, value in recipe.items()}
    settings |= {f"mesh.{size.split('=')[0]}": size.split("=")[1] for size in mesh.split(",")}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    # The teacher has learnt nothing.
    words = [f"--config={ROOT / 'configs' / 'convert.py'}", f"--workdir={workdir}", "--force"]
    return [sys.executable, "-m", "radlads_jax.launch", *words, *flags]


def start(
    words: list[str],
    count: int,
    devices: int,
    disks: pathlib.Path | None = None,
    *,
    places: Sequence[pathlib.Path] = (),
    more: Sequence[str] = (),
) -> list[subprocess.Popen]:
    """`count` of them, joined over gloo, with so many devices each. disks: where each has a cache of its own.

    places: the working directory of each. more: a flag of each.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environ = processes.environ(JAX_PLATFORMS="cpu", XLA_FLAGS=processes.xla_flags(devices))
    flags = [
        [f"--coordinator=localhost:{port}", f"--num_processes={count}", f"--process_id={i}"] if count > 1 else []
        for i in range(count)
    ]
    caches = [{"XDG_CACHE_HOME": str(disks / str(i))} if disks else {} for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [
        subprocess.Popen([*words, *joined, *own], env=environ | cache, cwd=place, text=True, **pipes)
        for joined, own, cache, place in zip(
            flags, [[flag] for flag in more] or count * [[]], caches, places or count * [ROOT], strict=True
        )
    ]


def finish(started: list[subprocess.Popen], code: int = 0) -> list[str]:
    try:
        texts = [process.communicate(timeout=500)[0] for process in started]
        assert [process.returncode for process in started] == [code] * len(started), texts
        return texts
    finally:
        for process in started:
            process.kill()


def losses(workdir: pathlib.Path) -> list[tuple[str, int, float]]:
    return [(record["stage"], record["step"], record["loss"]) for record in read_metrics(workdir)]


def assert_same_run(got_run: pathlib.Path, expected: pathlib.Path) -> None:
    got, want = losses(got_run), losses(expected)
    assert [line[:2] for line in got] == [line[:2] for line in want]
    np.testing.assert_allclose([line[2] for line in got], [line[2] for line in want], rtol=1e-5)
    got, want = (load_file(directory / "export" / "model.safetensors") for directory in (got_run, expected))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        scale = max(np.linalg.norm(tensor), 1e-3)
        assert np.linalg.norm(got[name] - tensor) / scale < 1e-4, name
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in (got_run, expected)]
    assert summaries[0]["student"]["loss"] == pytest.approx(summaries[1]["student"]["loss"], rel=1e-5)
    assert summaries[0]["samples"] == summaries[1]["samples"]


def test_two_processes_convert_as_one_does(teacher, tmp_path) -> None:
    """Also: only the first one speaks."""
    stages, mixer = ("stage2",), "rad_rwkv7"
    alone = start(command(teacher, tmp_path / "one", "fsdp=1", stages, mixer), 1, 1)
    words = command(teacher, tmp_path / "two", "fsdp=2,tensor=2", stages, mixer)
    _, first, second = finish([*alone, *start(words, 2, 2)])
    assert "exporting to" in first
    assert "stage2" not in second and "before the run" not in second
    assert "ok  checkpoints" in first and "fsdp 2 x tensor 2 of 4" in first and "NO  teacher" in first
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,fsdp=1,context=4", "fsdp=1,tensor=8"])
@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
def test_all_stages_on_two_processes_of_four_devices(teacher, tmp_path, mixer, mesh) -> None:
    stages = ("stage1", "stage2", "stage3")
    finish(start(command(teacher, tmp_path / "one", "fsdp=1", stages, mixer), 1, 1))
    finish(start(command(teacher, tmp_path / "two", mesh, stages, mixer), 2, 4))
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_one_process_goes_on(teacher, tmp_path) -> None:
    stages, mixer, mesh = ("stage1", "stage2"), "rad_rwkv6", "fsdp=4"
    finish(start(command(teacher, tmp_path / "one", "fsdp=1", stages, mixer), 1, 1))
    words = command(teacher, tmp_path / "two", mesh, stages, mixer)
    started = start(words, 2, 2)
    metrics = tmp_path / "two" / "metrics.jsonl"
    while not metrics.exists() and started[0].poll() is None:
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    texts = finish(started, 128 + signal.SIGTERM)
    assert all("is saved" in text for text in texts)
    assert 0 < len(losses(tmp_path / "two")) < sum(STEPS[name] for name in stages)
    finish(start(words, 1, 4))
    assert_same_run(tmp_path / "two", tmp_path / "one")
