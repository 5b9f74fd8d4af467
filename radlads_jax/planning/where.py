"""Where the time of a compiled step goes: seconds by what an operation is, and the dearest operations by their line."""

import dataclasses
import re
from typing import Any

from radlads_jax.planning import cost, hlo
from radlads_jax.planning.chips import Chip

# Operations that move values and compute none.
_MOVING = frozenset(
    (
        *("bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "copy-start", "fusion", "gather"),
        *("dynamic-slice", "dynamic-update-slice", "get-tuple-element", "iota", "pad", "parameter", "reshape"),
        *("reverse", "slice", "slice-start", "transpose", "tuple"),
    )
)
_PRODUCTS = frozenset(("dot", "convolution"))
_OWN_FILES = ("/radlads_jax/", "/pallas_kernels/")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_FILE_LINE = re.compile(r'source_file="([^"]*)"(?: source_line=(\d+))?')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# Of each kind, so many lines of code.
_MOST_LINES = 12


@dataclasses.dataclass
class _Line:
    """What one line of code is compiled to, of one kind. largest: the result's type of its dearest operation."""

    seconds: float = 0.0
    hbm_seconds: float = 0.0
    hbm_bytes: float = 0.0
    operations: float = 0.0
    largest: str = ""
    _most: float = 0.0

    def add(self, seconds: float, hbm_seconds: float, operation: hlo.Operation) -> None:
        self.seconds, self.hbm_seconds = self.seconds + seconds, self.hbm_seconds + hbm_seconds
        self.hbm_bytes += operation.times * operation.hbm_bytes
        self.operations += operation.times
        if seconds >= self._most:
            self._most, self.largest = seconds, operation.instruction.type

    def told(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def of_program(text: str, chip: Chip) -> dict[str, Any]:
    """{"step_seconds", "kinds": {kind: {...}}, "lines": {kind: [{"line", ...}]}} of a program's text, dearest first.

    Of kinds and lines: seconds (the compiler's cycles; of kernels, this project's), hbm_seconds (bytes at the memory's
    full rate), hbm_bytes, operations (in a step), largest (the dearest one's result). A line is the innermost of this
    project's. "exposed links" are what no operation runs beside.
    """
    frames = _Frames(text)
    kinds, lines = dict[str, _Line](), dict[str, dict[str, _Line]]()

    def add(operation: hlo.Operation) -> None:
        kind = _kind(operation)
        if kind is None:
            return
        name = operation.kernel
        each = cost.kernel_seconds(chip, name, operation.work) if name else operation.cycles / chip.clock
        seconds = operation.times * each
        hbm_seconds = operation.times * operation.hbm_bytes / chip.hbm_rate
        if not seconds and not hbm_seconds:
            return
        line = frames.line(operation.instruction.rest)
        for total in (kinds.setdefault(kind, _Line()), lines.setdefault(kind, {}).setdefault(line, _Line())):
            total.add(seconds, hbm_seconds, operation)

    timed = cost.step_time(chip, hlo.count(text, add))
    told = {kind: line.told() for kind, line in _dearest(kinds)}
    told["exposed links"] = {"seconds": timed.exposed}
    return {
        "step_seconds": timed.step,
        "kinds": told,
        "lines": {
            kind: [{"line": name} | line.told() for name, line in _dearest(lines[kind])[:_MOST_LINES]] for kind in kinds
        },
    }


def _dearest(lines: dict[str, _Line]) -> list[tuple[str, _Line]]:
    return sorted(lines.items(), key=lambda item: -item[1].seconds)


def _kind(operation: hlo.Operation) -> str | None:
    """What an operation is; None of a collective, whose time is of the links."""
    opcode = operation.instruction.opcode.removesuffix("-start")
    if opcode in hlo.COLLECTIVES or operation.opcodes & frozenset(hlo.COLLECTIVES):
        return None
    if operation.instruction.opcode == "custom-call":
        return "kernels" if operation.kernel else "other custom calls"
    if operation.opcodes & _PRODUCTS:
        return "matrix products"
    if operation.opcodes <= _MOVING:
        return "copies"
    return "elementwise, reductions"


class _Frames:
    """The lines of code that a program's text names, by the numbers of its stack frames."""

    def __init__(self, text: str):
        self.files = {int(n): name for n, name in re.findall(r'^(\d+) "([^"\n]*)"$', _section(text, "FileNames"), re.M)}
        self.locations = _numbered(_section(text, "FileLocations"))
        self.frames = _numbered(_section(text, "StackFrames"))

    def line(self, rest: str) -> str:
        """The innermost line of this project that an instruction came from, else what JAX calls it."""
        frame = int(match[1]) if (match := _FRAME.search(rest)) else 0
        while frame in self.frames:
            location = self.locations.get(self.frames[frame].get("file_location_id", 0), {})
            if name := _own(self.files.get(location.get("file_name_id", 0), "")):
                return f"{name}:{location.get('line', 0)}"
            parent = self.frames[frame].get("parent_frame_id", 0)
            frame = parent if parent != frame else 0
        named = _FILE_LINE.search(rest)
        if named and (name := _own(named[1])):
            return f"{name}:{named[2]}"
        operation = _OP_NAME.search(rest)
        return operation[1].rsplit("/", 2)[-1] if operation else "(the compiler's own)"


def _section(text: str, title: str) -> str:
    """The lines of a table at the text's beginning."""
    start = text.find(f"\n{title}\n")
    if start < 0:
        return ""
    start += len(title) + 2
    end = text.find("\n\n", start)
    return text[start : end if end >= 0 else len(text)]


def _numbered(section: str) -> dict[int, dict[str, int]]:
    """{1: {"name": 2, ...}} of lines "1 {name=2 ...}"."""
    return {
        int(number): {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", values)}
        for number, values in re.findall(r"^(\d+) \{([^}]*)\}", section, re.M)
    }


def _own(file: str) -> str:
    """The file's path from this project's root on; nothing for another's."""
    return next((file[file.rindex(part) + 1 :] for part in _OWN_FILES if part in file), "")
