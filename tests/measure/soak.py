"""A long run of a small model, saved, evaluated and restarted all the time: does anything grow that should not?

python tests/measure/soak.py [--minutes=30] [--plot=FILE.png] [--directory=DIR]

A child process trains; after every checkpoint it evaluates on held-out rows and writes samples. SIGTERM stops it, and
another goes on: three lives in all. Memory, open files, threads and the checkpoints on the disk are sampled. Prints,
for each, the mean and, within a life after its first part, the slope per hour with its standard error; exit code 1
where one grows. Memory is what the process wrote itself, resident or swapped out: pages of mapped files come and go as
the system has room for them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from radlads_jax.system import huge_pages
from radlads_jax.system.stopping import Interrupted

ROOT = Path(__file__).parents[2]
LIVES = 3
KEPT = 2
SAMPLE_SECONDS = 2.0
# A process's first part, in which it compiles and its allocator finds its size.
SETTLING = 0.4
# What may be gained in an hour: a share of the mean, or a number of files and threads.
SHARE, COUNT = 0.05, 2.0
QUANTITIES = {
    "memory of its own": "MiB",
    "open files": "",
    "threads": "",
    "checkpoints on disk": "MiB",
}


class Sample(NamedTuple):
    """life: which of the processes; seconds: since the first began; values: QUANTITIES; steps: whole checkpoints."""

    life: int
    seconds: float
    values: tuple[float, ...]
    steps: tuple[int, ...]


def child(directory: Path) -> int:
    """Trains in `directory`/run until SIGTERM, evaluating after every checkpoint."""
    import jax

    from radlads_jax.config import defaults, validate
    from radlads_jax.run import heldout, train
    from radlads_jax.run.checkpoint import Checkpoints
    from radlads_jax.run.job import make_job
    from radlads_jax.run.teacher_weights import TeacherWeights

    config = defaults()
    config.dtype = config.teacher.dtype = "float32"
    config.teacher.path = str(ROOT / "configs" / "demo_teacher")
    config.data.source, config.data.documents, config.data.eval_rows = "synthetic", 500, 8
    config.stages = ("stage2",)
    config.train.log_every, config.train.checkpoint_every, config.train.keep_checkpoints = 1, 4, KEPT
    config.train.sample_prompts, config.train.sample_tokens = ("This is a tale of",), 4
    stage = config.stage2
    stage.tokens, stage.seq_len, stage.batch_size, stage.remat = 10**8, 32, 4, "none"
    job = make_job(validate(config), directory / "run")
    teacher = job.load_teacher("float32")
    save = Checkpoints.save

    def save_and_evaluate(self, step, state, **more):
        heldout.evaluate_job(job, job.student, jax.tree.map(lambda x: x.copy(), state.params), teacher)
        return save(self, step, state, **more)

    Checkpoints.save = save_and_evaluate
    try:
        train.convert(job, TeacherWeights(job, teacher))
    except Interrupted as stop:
        return 128 + stop.signum
    return 0


def sample(life: int, began: float, pid: int, run: Path) -> Sample | None:
    """None once the process is gone."""
    process = Path("/proc") / str(pid)
    try:
        kilobytes = dict(line.split(":") for line in (process / "status").read_text().splitlines())
        own = sum(int(kilobytes[name].split()[0]) for name in ("RssAnon", "RssShmem", "VmSwap"))
        counts = [len(os.listdir(process / name)) for name in ("fd", "task")]
    except (FileNotFoundError, KeyError):
        return None
    kept = run / "checkpoints" / "stage2"
    steps = tuple(sorted(int(path.name) for path in kept.glob("[0-9]*") if path.name.isdigit()))
    values = (own / 2**10, *map(float, counts), disk_bytes(kept) / 2**20)
    return Sample(life, time.monotonic() - began, values, steps)


def disk_bytes(directory: Path) -> int:
    """Of files that may go while they are looked at."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


def watch(minutes: float, directory: Path) -> tuple[list[Sample], list[int]]:
    """(samples, the steps that the lives ended at); a life is counted from its first checkpoint on."""
    run, samples, ends = directory / "run", [], []
    began = time.monotonic()
    for life in range(LIVES):
        environ = os.environ | huge_pages.setting() | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        environ |= {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache")}
        command = [sys.executable, __file__, "--child", f"--directory={directory}"]
        with (directory / "log.txt").open("a") as log:
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        born = None
        while born is None or time.monotonic() - born < 60 * minutes / LIVES:
            time.sleep(SAMPLE_SECONDS)
            if process.poll() is not None:
                raise RuntimeError(f"the run ended with {process.returncode}: {(directory / 'log.txt').read_text()}")
            taken = sample(life, began, process.pid, run)
            if taken is not None and any(step > (ends[-1] if ends else 0) for step in taken.steps):
                samples.append(taken)
                born = born or time.monotonic()
        process.send_signal(signal.SIGTERM)
        if process.wait(timeout=300) != 128 + signal.SIGTERM:
            raise RuntimeError(
                f"SIGTERM ended the run with {process.returncode}: {(directory / 'log.txt').read_text()}"
            )
        lines = (run / "metrics.jsonl").read_text().splitlines()
        ends.append(json.loads(lines[-1])["step"])
        (directory / "samples.json").write_text(json.dumps(samples))
    return samples, ends


def slope_per_hour(samples: list[Sample], quantity: int) -> tuple[float, float, float]:
    """(mean, least-squares slope per hour with an intercept for each life, its error) after the lives' first parts."""
    times, values = [], []
    for life in range(LIVES):
        points = [(s.seconds, s.values[quantity]) for s in samples if s.life == life]
        begin = points[0][0] + SETTLING * (points[-1][0] - points[0][0])
        t, v = np.array([point for point in points if point[0] >= begin]).T
        times.append(t - t.mean())
        values.append(v)
    t, centred = np.concatenate(times), np.concatenate([v - v.mean() for v in values])
    slope = float(t @ centred / (t @ t))
    error = float(np.std(centred - slope * t) / np.sqrt(t @ t))
    return float(np.concatenate(values).mean()), slope * 3600, error * 3600


def report(samples: list[Sample], ends: list[int]) -> bool:
    """Prints a line for each quantity; returns whether all are well."""
    fine = True
    print(f"{ends[-1]} steps and {ends[-1] // 4} checkpoints and evaluations in {LIVES} lives that ended at {ends}")
    for number, (name, unit) in enumerate(QUANTITIES.items()):
        mean, slope, error = slope_per_hour(samples, number)
        # What falls is no leak: a system short of memory takes pages back.
        grows = slope - 2 * error > (SHARE * mean if unit else COUNT)
        fine &= not grows
        said = "NOT FLAT" if grows else "flat"
        print(f"{name:20} mean {mean:8.1f} {unit:4} slope {slope:+8.2f} +- {error:6.2f} per hour  {said}")
    counts = [len(s.steps) for s in samples]
    kept = min(counts) >= 1 and max(counts) <= KEPT + 1
    print(
        f"{min(counts)} to {max(counts)} whole checkpoints at any time, {KEPT} wanted  {'well' if kept else 'NOT WELL'}"
    )
    return fine and kept


def draw(samples: list[Sample], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(QUANTITIES), 1, figsize=(8, 8), sharex=True, layout="constrained")
    for number, ((name, unit), axis) in enumerate(zip(QUANTITIES.items(), axes, strict=True)):
        for life in range(LIVES):
            points = [(s.seconds / 60, s.values[number]) for s in samples if s.life == life]
            axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{name}{f', {unit}' if unit else ''}", loc="left", fontsize=10)
    axes[-1].set_xlabel("minutes; a colour is a process, stopped by SIGTERM and followed by the next")
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--child", action="store_true")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.directory)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        samples, ends = watch(arguments.minutes, directory)
        fine = report(samples, ends)
    if arguments.plot:
        draw(samples, arguments.plot)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
