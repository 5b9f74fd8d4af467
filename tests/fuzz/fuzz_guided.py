"""Kinds for fuzz_files.py that are guided by coverage: a case changes one before it that reached new lines.

The first are those of the generated kinds; lines are those of the package's own readers. Words in the readers' source
are what a changed file gets as keys and values, so that cases come to branches that wait for a name.
"""

import ast
import contextlib
import dataclasses
import json
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fuzz_cases
import fuzz_readers as readers
from fuzz_cases import Kind, packed
from fuzz_damage import JUNK, Rng, flipped, mutated, truncated

PACKAGE = Path(readers.prepare.__file__).parents[1]
READERS = tuple(str(PACKAGE / place) for place in ("porting/", "data/", "untrusted.py", "models/config.py"))
WORD_FILES = ("porting/hf_config.py", "porting/safetensors_read.py", "porting/known_models.py", "models/config.py")
NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 7, 8, 255, 2**16, 2**31, 2**32, 2**62, 2**63 - 1)


def words() -> list[str]:
    """The names in the readers' source: strings without a space."""
    nodes = [node for file in WORD_FILES for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return sorted(word for word in strings if 0 < len(word) < 30 and " " not in word)


WORDS = words()


@contextlib.contextmanager
def noting(reached: set[tuple[str, int]]) -> Iterator[None]:
    """Adds (file, line) of all that the readers execute."""

    def note(frame: FrameType, _: str, __: Any) -> Any:
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    sys.settrace(lambda frame, _, __: note if frame.f_code.co_filename.startswith(READERS) else None)
    try:
        yield
    finally:
        sys.settrace(None)


@dataclasses.dataclass
class Guided:
    """A Kind of fuzz_cases.py with a memory. seeds: the kinds that begin it; name: the file that it changes."""

    seeds: list[Kind]
    name: str
    change: Callable[[Rng, bytes], bytes]
    read_case: Callable[[Path, Path], None]
    may_be_sound: bool = True
    kept: list[dict[str, bytes]] = dataclasses.field(default_factory=list)
    lines: set[tuple[str, int]] = dataclasses.field(default_factory=set)

    def make(self, rng: Rng, place: Path) -> None:
        if not self.kept or rng.random() < 0.3:
            rng.choice(self.seeds).make(rng, place)
            return
        for name, data in rng.choice(self.kept).items():
            (place / name).write_bytes(self.change(rng, data) if name == self.name else data)

    def read(self, place: Path, work: Path) -> None:
        case, reached = {path.name: path.read_bytes() for path in place.iterdir()}, set[tuple[str, int]]()
        try:
            with noting(reached):
                self.read_case(place, work)
        finally:
            if reached - self.lines:
                self.lines |= reached
                self.kept.append(case)


def change_json(rng: Rng, data: bytes) -> bytes:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return change_bytes(rng, data)
    for _ in range(rng.randint(1, 3)):
        if isinstance(tree, dict) and rng.random() < 0.6:
            places = [tree, *(value for value in tree.values() if isinstance(value, dict))]
            rng.choice(places)[rng.choice(WORDS)] = value_of(rng)
        else:
            tree = mutated(rng, tree)
    return json.dumps(tree).encode() if rng.random() < 0.9 else change_bytes(rng, json.dumps(tree).encode())


def value_of(rng: Rng) -> Any:
    simple = [rng.choice(WORDS), rng.choice(NUMBERS), rng.choice(JUNK), rng.random() < 0.5, rng.uniform(0, 10)]
    return rng.choice([*simple, rng.sample(simple, 2), {rng.choice(WORDS): rng.choice(simple) for _ in range(3)}])


def change_weights(rng: Rng, data: bytes) -> bytes:
    """A safetensors file with another header, of a length that fits, or with other bytes."""
    start = 8 + int.from_bytes(data[:8], "little")
    if rng.random() < 0.2 or start > len(data):
        return change_bytes(rng, data)
    return packed(change_json(rng, data[8:start]), data[start:])


def change_bytes(rng: Rng, data: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    word = struct.pack(rng.choice("<>") + "q", rng.choice(NUMBERS))
    choices = [data[:at] + word + data[at:], data[:at] + word + data[at + 8 :], data[:at] + data[at // 2 :]]
    return rng.choice([*choices, truncated(rng, data), flipped(rng, data)]) if data else word


def beginning(name: str) -> list[Kind]:
    return [kind for title, kind in fuzz_cases.KINDS.items() if title.startswith(name)]


KINDS = {
    "guided: safetensors": Guided(beginning("safetensors"), readers.WEIGHTS, change_weights, readers.read_weights),
    "guided: index": Guided(beginning("index"), fuzz_cases.INDEX, change_json, readers.read_indexed),
    "guided: config": Guided(beginning("config"), "config.json", change_json, readers.read_config_only),
    "guided: token file's index": Guided(beginning("token file"), "t.idx", change_bytes, readers.read_token_file),
}
