"""Bad model and data files by the thousand: each has to end in a clear ValueError, in bounded time and memory.

python tests/fuzz/fuzz_files.py [--count=10000] [--seed=0] [--kind=PART_OF_A_NAME] [--case=N]

A worker process reads the cases under a limit of address space; one that dies or takes too long is a fault, and another
takes its place. A case that a reader takes is a fault unless random changes of its kind may leave the file sound.
Prints a table of kinds and outcomes; exit code 1 if there was a fault.

A case of the kinds called guided depends on all before it: it is repeated by the kind, not by its number.
"""

import argparse
import collections
import dataclasses
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # Bytes of address space beyond what the libraries take.
SECONDS = 20.0
LONGEST_MESSAGE = 4000
DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "RUST_BACKTRACE": "0"}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """refused, sound, or a fault; what: the fault's description; mebibytes: the process's largest so far.

    lines: how many of the readers' the guided cases of its kind have reached so far.
    """

    verdict: str
    what: str = ""
    seconds: float = 0.0
    mebibytes: float = 0.0
    lines: int = 0


def all_kinds() -> dict[str, Any]:
    import fuzz_cases
    import fuzz_guided

    return {**fuzz_cases.KINDS, **fuzz_guided.KINDS}


def work(connection: Connection, seed: int) -> None:
    """Reads (kind, number) and sends the outcome until the other end closes."""
    kinds = all_kinds()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # The panics of a Rust library are reported there and raised.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        connection.send(Outcome("ready"))
        while True:
            try:
                kind, number = connection.recv()
            except EOFError:
                return
            connection.send(one_case(kinds[kind], random.Random(f"{seed} {kind} {number}"), Path(root) / "case"))


def one_case(kind, rng: random.Random, root: Path) -> Outcome:
    place, output = root / "files", root / "work"
    shutil.rmtree(root, ignore_errors=True)
    place.mkdir(parents=True)
    output.mkdir()
    kind.make(rng, place)
    before, began = snapshot(root, output), time.monotonic()
    try:
        kind.read(place, output)
        verdict = Outcome("sound") if kind.may_be_sound else Outcome("fault", "taken as sound")
    except BaseException as error:  # What a reader must not raise is what is looked for here.
        verdict = judged(error, place)
    if verdict.verdict == "refused":
        left = [path.name for path in output.rglob("*") if path.is_file() and path.name != "text.txt"]
        if left or snapshot(root, output) != before:
            verdict = Outcome("fault", f"left {left}, or changed its input")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = len(getattr(kind, "lines", ()))
    return dataclasses.replace(verdict, seconds=time.monotonic() - began, mebibytes=peak, lines=lines)


def snapshot(root: Path, output: Path) -> dict[Path, int]:
    files = [path for path in root.rglob("*") if path.is_file() and output not in path.parents]
    return {path: path.stat().st_size for path in files}


def judged(error: BaseException, place: Path) -> Outcome:
    """Refused, if the error is a ValueError of one short printable paragraph: which file, what was expected of it."""
    message = str(error)
    if type(error) is not ValueError:
        return Outcome("fault", f"{type(error).__name__}: {' '.join(message.split())[:150]}")
    if not any(name in message for name in broken_names(place)):
        return Outcome("fault", f"names no file: {message[:150]}")
    if "expected" not in message:
        return Outcome("fault", f"does not say what was expected: {message[:150]}")
    if len(message) > LONGEST_MESSAGE or not message.isprintable():
        return Outcome("fault", f"a message of {len(message)} characters, or not printable: {message[:150]!r}")
    return Outcome("refused")


def broken_names(place: Path) -> set[str]:
    """The files of a case; not its directory, which does not say what is broken."""
    names = {path.name for path in place.rglob("*") if path.is_file()}
    # A saved dataset is opened by its library, which does not always say what of it is broken.
    whole = {str(place)} if names & set(DATASET_FILES) else set()
    # Once it is read, a tokenizer is compared with the model without its files.
    read = {"the tokenizer"} if "tokenizer.json" in names else set()
    return {"config.json", *names, *whole, *read}


class Worker:
    """A process that reads cases; started again after it died or was ended for taking too long."""

    def __init__(self, seed: int):
        self.seed = seed
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=work, args=(there, self.seed), daemon=True)
        self.process.start()
        there.close()
        if not self.connection.poll(120):
            raise TimeoutError("the worker did not start within 120 s")
        self.connection.recv()

    def run(self, kind: str, number: int) -> Outcome:
        self.connection.send((kind, number))
        try:
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            outcome = Outcome("fault", f"took more than {SECONDS:g} s", SECONDS)
        except EOFError:
            self.process.join()
            outcome = Outcome("fault", f"the process ended with {self.process.exitcode}")
        self.process.kill()
        self.process.join()
        self.start()
        return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="")
    parser.add_argument("--case", type=int)
    arguments = parser.parse_args()
    kinds = [kind for kind in all_kinds() if arguments.kind in kind]
    worker = Worker(arguments.seed)
    outcomes: dict[str, list[Outcome]] = collections.defaultdict(list)
    faults: dict[str, list[int]] = collections.defaultdict(list)
    numbers = range(-(-arguments.count // len(kinds))) if arguments.case is None else [arguments.case]
    for kind in kinds:
        for number in numbers:
            outcome = worker.run(kind, number)
            outcomes[kind].append(outcome)
            if outcome.verdict == "fault":
                faults[f"{kind}: {outcome.what}"].append(number)
    print(f"{'kind':32}{'cases':>7}{'refused':>9}{'sound':>7}{'faults':>8}{'longest s':>11}{'peak MiB':>10}")
    for kind, of_kind in [*outcomes.items(), ("all", list(itertools.chain(*outcomes.values())))]:
        counts = [sum(o.verdict == verdict for o in of_kind) for verdict in ("refused", "sound", "fault")]
        figures = "".join(f"{n:{width}}" for n, width in zip(counts, (9, 7, 8), strict=True))
        longest, peak = max(o.seconds for o in of_kind), max(o.mebibytes for o in of_kind)
        reached = f"   {of_kind[-1].lines} lines reached" if kind.startswith("guided") else ""
        print(f"{kind:32}{len(of_kind):7}{figures}{longest:11.2f}{peak:10.0f}{reached}")
    for what, cases in sorted(faults.items()):
        print(f"FAULT in {len(cases)} (case {cases[0]} first) {what}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
