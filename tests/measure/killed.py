"""Ends a small conversion again and again, at any moment, and compares what comes out with an undisturbed one.

    python tests/measure/killed.py [--kills 50] [--signal KILL|TERM|HUP|INT|INTINT] [--mixer rad_rwkv7] [--seed 0]
                                   [--directory DIR]
    python tests/measure/killed.py --short    # in seconds: stage 1 alone, two kills, right before operations on files

All three stages, a checkpoint at every second step, evaluation and export; each attempt is a process of its own, some
started as a user does it, most forked from one that has imported everything, to save that time. Half of the moments
are drawn from the time that a run takes, the other half from the operations on files that it does, so that the short
windows between them are met as often as the long steps: the process then ends right before that operation.
Every time it is started again, until it is through; then parameters,
export, samples and scores have to be those of the undisturbed run to the bit, and so has metrics.jsonl but for the
field "time"; no step may be there twice or not at all, nothing unfinished may lie about, and what lay about after a
kill has to be named in the log that removed it. Exits with 1 where anything differs.

INTINT is Ctrl-C twice. TERM, HUP and INT have to end in 128 + the signal's number. Only a process that still imports
and has done nothing, or has done all and is taken down by the interpreter, may be ended by the signal itself.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from killed_programs import FORKING, FRESH

# What the tests share lies a folder above.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import processes
import tiny_run
from untrained import save_teacher

from radlads_jax.system import huge_pages

ROOT = pathlib.Path(__file__).parents[2]
STEPS = {"stage1": 9, "stage2": 8, "stage3": 7}
SHORT = {"stage1": 4}
TIMEOUT = 1800

UNFINISHED = (
    "checkpoints/*/*.orbax-checkpoint-tmp*",
    "**/.*.partial",
    "metrics.tmp",
    "data/*.tmp-*",
    ".*.replaced",
    "checkpoints/*damaged*",
)
PHASES = {
    "exporting to": "export",
    "evaluating on": "evaluation",
    "stage3 ": "stage 3",
    "stage2 ": "stage 2",
    "stage1 ": "stage 1",
    "values copied": "stage 1",
}


def flags(teacher: pathlib.Path, workdir: pathlib.Path, mixer: str, steps: dict[str, int] = STEPS) -> list[str]:
    """launch's command line."""
    # In several files, for the moments between their writes.
    chosen = tiny_run.settings(teacher, mixer, steps) | {"export.max_shard_gb": 6e-5}
    words = [f"--config.{name}={value}" for name, value in chosen.items()]
    # The teacher is random, which a run otherwise refuses.
    return ["--config=configs/convert.py", f"--workdir={workdir}", "--force", *words]


def environment(cache: pathlib.Path, xla_flags: str = "") -> dict[str, str]:
    """One CPU device, with the compiled programs kept from one attempt to the next."""
    return processes.environ(
        # Without them launch begins anew, which here is the program that forks it.
        **huge_pages.setting(),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=xla_flags,
        PYTHONUNBUFFERED="1",
        JAX_COMPILATION_CACHE_DIR=str(cache),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a process gets its signals: after so many seconds, or before its operation of this number on files."""

    seconds: float | None = None
    operation: int = 0


@dataclasses.dataclass
class Attempt:
    """One process. taken: seconds from its signal to its end."""

    code: int
    text: str
    seconds: float
    hit: bool
    taken: float = 0.0

    @property
    def phase(self) -> str:
        """The part of the run it had come to, by what it had said."""
        phases = re.findall("|".join(map(re.escape, PHASES)), self.text)
        return PHASES[phases[-1]] if phases else "import and data"


class Starter:
    """Starts conversions: fresh processes, or forks of one that has imported everything."""

    def __init__(self, cache: pathlib.Path, xla_flags: str = ""):
        self._environment = environment(cache, xla_flags)
        self._server: subprocess.Popen | None = None

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def attempt(
        self, words: list[str], workdir: pathlib.Path, moment: Moment, signals: str, *, fresh: bool = False
    ) -> Attempt:
        """Runs the command until its end or the moment."""
        log = workdir.with_name(f"{workdir.name}.log")
        log.write_text("")
        order = {"place": f"{workdir}/", "at": moment.operation, "signals": signals, "words": words, "log": str(log)}
        begun = time.monotonic()
        pid, wait = (self._fresh if fresh else self._fork)(order)
        code = wait(TIMEOUT if moment.seconds is None else moment.seconds)
        hit, sent = code is None, time.monotonic()
        if code is None:
            for name in signals.split(","):
                # Two that are sent at the same time may arrive as one; after the first the process may be gone.
                time.sleep(0.1)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.Signals[f"SIG{name}"])
            code = wait(TIMEOUT)
            assert code is not None, f"{pid} does not end by {signals}"
        text, ended = log.read_text(errors="replace"), time.monotonic()
        return Attempt(code, text, ended - begun, hit or "before operation" in text, ended - sent if hit else 0.0)

    def _fresh(self, order: dict[str, Any]) -> tuple[int, Callable[[float], int | None]]:
        with open(order["log"], "a") as output:
            command = [sys.executable, "-c", FRESH, json.dumps(order)]
            process = subprocess.Popen(command, env=self._environment, cwd=ROOT, stdout=output, stderr=output)

        def wait(seconds: float) -> int | None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(seconds)
            return None

        return process.pid, wait

    def _fork(self, order: dict[str, Any]) -> tuple[int, Callable[[float], int | None]]:
        if self._server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
            command = [sys.executable, "-c", FORKING]
            self._server = subprocess.Popen(command, env=self._environment, cwd=ROOT, **pipes)
        told, orders = self._server.stdout, self._server.stdin
        assert told is not None and orders is not None
        orders.write(json.dumps(order).encode() + b"\n")
        pid = int(told.readline())

        def wait(seconds: float) -> int | None:
            return int(told.readline()) if select.select([told], [], [], seconds)[0] else None

        return pid, wait


def leftovers(workdir: pathlib.Path) -> set[str]:
    """What a write left unfinished; what lies in such a directory goes with it."""
    unfinished = {path.relative_to(workdir) for pattern in UNFINISHED for path in workdir.glob(pattern)}
    return {str(path) for path in unfinished if not unfinished & set(path.parents)}


def result(workdir: pathlib.Path, steps: dict[str, int] = STEPS) -> dict[str, Any]:
    """All of a finished run that has to be the same each time."""
    from radlads_jax.run.checkpoint import Checkpoints

    summary = json.loads((workdir / "summary.json").read_text())
    for line in summary["stages"]:
        line["seconds"] = line["tokens_per_second"] = line["peak_bytes"] = None
    left: dict[str, Any] = {"summary": summary, "samples": (workdir / "samples.md").read_bytes()}
    left["export"] = {path.name: path.read_bytes() for path in sorted((workdir / "export").iterdir())}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    left["metrics"] = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    for name, count in steps.items():
        with Checkpoints(workdir / "checkpoints" / name) as checkpoints:
            state, data_state, _ = checkpoints.restore(count, checkpoints.shapes(count))
        left[f"{name}'s state"] = {path: bytes(memoryview(array)) for path, array in state.items()}
        left[f"{name}'s place in the data"] = data_state
    return left


def problems(workdir: pathlib.Path, expected: dict[str, Any], steps: dict[str, int] = STEPS) -> list[str]:
    """What of a finished run is not as it should be."""
    left = result(workdir, steps)
    wrong = [f"{name} differs" for name, value in expected.items() if left[name] != value]
    places = [(line["stage"], line["step"]) for line in left["metrics"]]
    if places != [(name, step + 1) for name, count in steps.items() for step in range(count)]:
        wrong.append(f"metrics.jsonl has the steps {places}")
    if not (workdir / "report" / "index.html").exists():
        wrong.append("no report")
    return wrong + [f"{path} was left" for path in sorted(leftovers(workdir))]


def trial(
    start: Callable[[Moment], Attempt],
    workdir: pathlib.Path,
    moments: Callable[[pathlib.Path], Moment],
    kills: int,
    accepted: Callable[[Attempt], bool],
) -> tuple[list[Attempt], list[str]]:
    """Starts the run until it is through, the first `kills` times with a moment at which it is ended.

    Returns the attempts that were ended, and what went wrong with them.
    """
    ended: list[Attempt] = []
    wrong: list[str] = []
    unnamed: set[str] = set()
    while True:
        done = start(moments(workdir) if len(ended) < kills else Moment())
        unnamed = {path for path in unnamed if "removing the unfinished" not in done.text or path not in done.text}
        if done.code == 0 and (workdir / "summary.json").exists():
            ended += [done] if done.hit else []
            break
        if not done.hit or not accepted(done):
            return ended, [*wrong, f"ended with {done.code} in {done.phase}: {done.text[-3000:]}"]
        ended.append(done)
        unnamed |= leftovers(workdir)
    return ended, wrong + [f"the log never said that it removed {path}" for path in sorted(unnamed)]


def may_end_so(signals: str) -> Callable[[Attempt], bool]:
    """Which exit codes are right after the signals."""
    last = signal.Signals[f"SIG{signals.split(',')[-1]}"]

    def accepted(done: Attempt) -> bool:
        if last == signal.SIGKILL:
            return done.code == -last
        has_begun = done.phase != "import and data" or "before " in done.text
        is_through = "how it went, as a page" in done.text or "nothing to do" in done.text
        return done.code == 128 + last or (done.code == -last and (is_through or not has_begun))

    return accepted


def main() -> int:
    parser = argparse.ArgumentParser(description="Ends a small conversion at random moments; see the file's head.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--signal", choices=["KILL", "TERM", "HUP", "INT", "INTINT"], default="KILL")
    parser.add_argument("--mixer", choices=["rad_rwkv6", "rad_rwkv7"], default="rad_rwkv7")
    parser.add_argument("--fresh", type=float, default=0.25, help="share of processes that are no forks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--directory", type=pathlib.Path)
    args = parser.parse_args()
    steps = SHORT if args.short else STEPS
    if args.short:
        args.kills, args.fresh = min(args.kills, 2), 0.0
    signals = "INT,INT" if args.signal == "INTINT" else args.signal
    if args.signal == "HUP":
        # Started by nohup, this process ignores it, and all that it starts would.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="killed-") as temporary, contextlib.ExitStack() as stack:
        root = args.directory or pathlib.Path(temporary)
        teacher = save_teacher(root / "teacher")
        starter = stack.enter_context(Starter(root / "cache", processes.xla_flags() if args.short else ""))
        undisturbed = [root / "first"] if args.short else [root / "first", root / "second"]
        for workdir in undisturbed:
            # A directory of an earlier trial has these already.
            if not (workdir / "summary.json").exists():
                words = flags(teacher, workdir, args.mixer, steps)
                whole = starter.attempt(words, workdir, Moment(), "KILL", fresh=args.fresh > 0)
                assert whole.code == 0, whole.text
                (workdir / "seconds").write_text(str(whole.seconds))
        seconds = float((undisturbed[-1] / "seconds").read_text())
        said = (undisturbed[-1].with_name(f"{undisturbed[-1].name}.log")).read_text()
        operations = int(re.findall(r"(\d+) operations", said)[-1])
        print(f"undisturbed: {seconds:.1f} s, {operations} operations on files", flush=True)
        expected = result(root / "first", steps)
        wrong = [text for workdir in undisturbed for text in problems(workdir, expected, steps)]

        def moment(workdir: pathlib.Path) -> Moment:
            """Any moment of what is left of the run."""
            metrics = workdir / "metrics.jsonl"
            done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            left = max(1 - done / sum(steps.values()), 0.1)
            if not args.short and rng.random() < 0.5:
                return Moment(seconds=rng.uniform(0, seconds * left))
            return Moment(operation=rng.randint(1, round(operations * left)))

        ended: list[Attempt] = []
        runs = 0
        while len(ended) < args.kills and not wrong:
            runs, workdir = runs + 1, root / f"run{runs}"
            words = flags(teacher, workdir, args.mixer, steps)
            kills = min(args.kills - len(ended), rng.randint(4, 12))

            def start(moment: Moment, words: list[str] = words, workdir: pathlib.Path = workdir) -> Attempt:
                return starter.attempt(words, workdir, moment, signals, fresh=rng.random() < args.fresh)

            more, wrong = trial(start, workdir, moment, kills, may_end_so(signals))
            ended += more
            wrong = wrong or problems(workdir, expected, steps)
            print(f"run {runs}: ended {len(more)} times, {wrong or 'the same result'}", flush=True)
        tell(ended, args.signal)
    print("\n".join(wrong) or f"{len(ended)} times ended in {runs} runs: nothing lost, nothing twice.")
    return 1 if wrong else 0


def tell(ended: list[Attempt], name: str) -> None:
    """A table: where the processes were when they were ended, how often, with which exit codes."""
    codes = sorted({done.code for done in ended})
    print(f"SIG{name} in".ljust(20), "times", *(f"exit {code}".rjust(9) for code in codes))
    for phase in dict.fromkeys(["import and data", *sorted({done.phase for done in ended})]):
        counted = collections.Counter(done.code for done in ended if done.phase == phase)
        print(phase.ljust(20), str(counted.total()).rjust(5), *(str(counted[code]).rjust(9) for code in codes))
    before = [re.findall(r"before operation \d+: (.*)", done.text) for done in ended]
    print(f"{sum(map(bool, before))} of them right before an operation on a file: ")
    kinds = collections.Counter(_kind(operations[0]) for operations in before if operations)
    for operation, times in kinds.most_common():
        print("  ", times, operation)
    if waits := [done.taken for done in ended if done.taken]:
        print(f"from signal to end: median {sorted(waits)[len(waits) // 2]:.2f} s, longest {max(waits):.2f} s")


def _kind(operation: str) -> str:
    """An operation without the numbers and names that are new each time."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "*", operation)


if __name__ == "__main__":
    sys.exit(main())
