"""The text of a compiled program (optimised HLO), read into instructions; how often its loops run."""

import dataclasses
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# A kernel's metadata has lines of its own.
_CONTINUED = re.compile(r'\n(?="|\}\})')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. type: of the result, as text; rest: all from the operands on."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Every computation by name, and the entry's name."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in _CONTINUED.sub(" ", text).splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            instruction = _instruction(match[1], match[2])
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation; expected a compiled program's as_text().")
    return computations, entry


def _instruction(name: str, text: str) -> Instruction | None:
    cut = closing(text, 0) if text.startswith("(") else text.find(" ")
    opcode = _OPCODE.match(text, cut)
    if cut < 0 or opcode is None:
        return None
    end = closing(text, opcode.end() - 1)
    operands = re.findall(r"%([\w.\-]+)", text[opcode.end() : end])
    return Instruction(name, text[:cut], opcode[1], tuple(operands), text[opcode.end() :])


def closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def estimated_cycles(instruction: Instruction) -> float:
    """The compiler's estimate of an instruction's own cycles; 0 where it makes none, as for a TPU's Mosaic kernels."""
    noted = _CYCLES.search(instruction.rest)
    return float(noted[1]) if noted else 0.0


def trips(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: as the compiler notes it, or as its condition says, i < n (counted from 0)."""
    if noted := _TRIPS.search(loop.rest):
        return int(noted[1])
    inner = {role: computations.get(names[0], {}) for role, names in called(loop)}
    condition = inner.get("condition", {})
    for instruction in condition.values():
        bound = (
            condition.get(instruction.operands[1])
            if instruction.opcode == "compare" and "direction=LT" in instruction.rest
            else None
        )
        if bound is not None and bound.opcode == "constant":
            counter = condition[source(condition, instruction.operands[0])]
            return -(-_constant(bound) // _stride(counter, inner.get("body", {})))
    return None


def _stride(counter: Instruction, body: Computation) -> int:
    """What a loop's body adds to the counter that its condition reads: more than 1 where the compiler unrolled it."""
    place = re.search(r"index=(\d+)", counter.rest)
    result = list(body.values())[-1] if body else None
    if place is None or result is None or result.opcode != "tuple":
        return 1
    added = body.get(source(body, result.operands[int(place[1])]))
    if added is None or added.opcode != "add":
        return 1
    constants = [body[name] for name in added.operands if name in body and body[name].opcode == "constant"]
    return max(1, _constant(constants[0])) if constants else 1


def _constant(instruction: Instruction) -> int:
    return int(instruction.rest.split(")")[0])


def called(instruction: Instruction) -> Iterator[tuple[str, list[str]]]:
    """The computations that an instruction names, by their role: calls, body, condition ..."""
    for role, names in _CALLED.findall(instruction.rest):
        yield role, re.findall(r"[\w.\-]+", names)


def source(inside: Computation, name: str) -> str:
    """The instruction whose values `name` has, in another form or place."""
    while name in inside and inside[name].opcode in ("bitcast", "copy", "convert", "reshape") and inside[name].operands:
        name = inside[name].operands[0]
    return name
