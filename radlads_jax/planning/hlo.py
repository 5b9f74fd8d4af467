"""What a compiled program does in one run, counted in its optimised HLO text: every loop's body times its trip count.

The compiler's own cost analysis counts a loop's body once, and knows no collectives.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from pallas_kernels.measure.hlo_text import (
    Computation,
    Instruction,
    called,
    closing,
    estimated_cycles,
    parse,
    source,
    trips,
)

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "token": 0}
_BYTES |= {"f64": 8, "u64": 8, "s64": 8, "c64": 8}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*op_name="[^"]*?(\w+)\)*/pallas_call')
# The library's attention, whichever of its variants.
_ATTENTION = re.compile(r"splash_mha_(?:fwd|dq|dkv)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
# Three ways to write groups: listed, as [groups, size], or as axes (or parts of axes) of a mesh.
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]|mesh\[([^\]]*)\] ?\{([^}]*)\})")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# Instructions that move no bytes of their own: names for others' results, or the second half of a pair.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all")
_HALVES = ("-done", "-update")


@dataclasses.dataclass
class Counts:
    """Of one device in one run. link_bytes: what collectives bring it, by kind; exposed_link_bytes: those that nothing
    runs beside. begun: of collectives with a start and an end, bytes, cycles of what is scheduled between these, and
    how often. cycles: the compiler's estimate of its own operations, 0 where it makes none. kernels: what every kernel
    computes, by its name (`Operation.work`), of whose insides the compiler says nothing.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    exposed_link_bytes: float = 0.0
    unknown_loops: int = 0
    link_bytes: dict[str, float] = dataclasses.field(default_factory=dict)
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    begun: list[tuple[float, float, float]] = dataclasses.field(default_factory=list)

    @property
    def all_link_bytes(self) -> float:
        return sum(self.link_bytes.values(), 0.0)


@dataclasses.dataclass
class _Transfer:
    """A collective: what it brings to a device, how often it runs, and whether other operations run beside it.

    beside: their cycles, where its start and its end are in the same computation.
    """

    kind: str
    received: float
    times: float
    hidden: bool
    beside: float | None = None


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that is scheduled by itself. times: how often; cycles, hbm_bytes: of one; opcodes: of all that it
    is made of.
    """

    instruction: Instruction
    times: float
    cycles: float
    hbm_bytes: float
    opcodes: frozenset[str]

    @property
    def kernel(self) -> str | None:
        """The name of the kernel that it runs, if any."""
        match = _KERNEL.search(self.instruction.rest)
        if match is None:
            return None
        attention = _ATTENTION.match(match[1])
        return attention[0] if attention else match[1]

    @property
    def work(self) -> int:
        """Elements of its first result; of attention, elements of its largest one times the row's positions."""
        if self.kernel is None or not _ATTENTION.match(self.kernel):
            return math.prod(_dims(self.instruction.type))
        # The others are a block's own, of two dimensions.
        results = (_sizes(dims) for _, dims, _ in _SHAPE.findall(self.instruction.type))
        return max(math.prod(sizes) * sizes[-2] for sizes in results if len(sizes) > 2)


def count(text: str, each: Callable[[Operation], None] = lambda _: None) -> Counts:
    """The counts of a program's entry computation. each: is called with every operation."""
    computations, entry = parse(text)
    counts, transfers = Counts(), dict[str, _Transfer]()
    _run(computations, computations[entry], 1.0, counts, transfers, each, fused=False, hidden=False)
    for transfer in transfers.values():
        moved = transfer.times * transfer.received
        counts.link_bytes[transfer.kind] = counts.link_bytes.get(transfer.kind, 0.0) + moved
        if transfer.beside is not None:
            counts.begun.append((transfer.received, transfer.beside, transfer.times))
        counts.exposed_link_bytes += 0.0 if transfer.hidden else moved
    return counts


def _run(
    computations: dict[str, Computation],
    body: Computation,
    times: float,
    counts: Counts,
    transfers: dict[str, _Transfer],
    each: Callable[[Operation], None],
    *,
    fused: bool,
    hidden: bool,
) -> None:
    """Adds what `body` does, run so many times. fused: inside one operation; hidden: beside other operations."""
    now, begun = 0.0, dict[str, float]()
    for instruction in body.values():
        if instruction.opcode.endswith(("-start", "-update")):
            begun[instruction.name] = now
        elif instruction.opcode.endswith("-done") and instruction.operands[0] in begun:
            transfer = transfers.get(_begun_key(body[instruction.operands[0]], body, computations))
            if transfer is not None:
                transfer.beside = now - begun[instruction.operands[0]]
        counts.flops += times * _flops(instruction, body)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            received = _received(instruction, body, kind)
            if kind == "all-reduce" and _is_scattered(instruction, body):
                kind, received = "reduce-scatter", received / 2
            transfer = _Transfer(kind, received, times, hidden or instruction.opcode.endswith("-start"))
            _add_transfer(transfers, transfer, instruction)
        if not fused and instruction.opcode not in _FREE and not instruction.opcode.endswith(_HALVES):
            cycles, moved = estimated_cycles(instruction), _hbm_bytes(instruction, body, computations)
            operation = Operation(instruction, times, cycles, moved, frozenset(_opcodes(instruction, computations)))
            each(operation)
            counts.hbm_bytes += times * moved
            now += cycles
            counts.cycles += times * cycles
            if kernel := operation.kernel:
                counts.kernels[kernel] = counts.kernels.get(kernel, 0.0) + times * operation.work
        for role, names in called(instruction):
            inner_times = times
            if role == "body":
                trip_count = trips(instruction, computations)
                counts.unknown_loops += trip_count is None
                inner_times = times * (trip_count or 1)
            elif role == "condition" or (role == "to_apply" and instruction.opcode not in ("call", "call-start")):
                continue
            # A call-start is a collective that a TPU's sparse cores run.
            inside = fused or instruction.opcode in ("fusion", "async-start", "call-start")
            beside = hidden or instruction.opcode in ("async-start", "call-start") or "async" in instruction.name
            for name in names:
                if name in computations:
                    inner = (computations[name], inner_times, counts, transfers, each)
                _run(computations, *inner, fused=inside, hidden=beside)


def _opcodes(instruction: Instruction, computations: dict[str, Computation]) -> Iterator[str]:
    """Of an instruction, and of what it calls to be one with it."""
    yield instruction.opcode
    if instruction.opcode == "fusion":
        for _, names in called(instruction):
            for inner in (i for name in names for i in computations.get(name, {}).values()):
                yield from _opcodes(inner, computations)


def _flops(instruction: Instruction, body: Computation) -> float:
    """Two for each multiplication of a matrix product; other arithmetic is not counted."""
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        left = _dims(body[instruction.operands[0]].type)
        return 2.0 * math.prod(_dims(instruction.type)) * math.prod(left[int(i)] for i in _numbers(contracted))
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, body)
    return 0.0


def _convolution_flops(instruction: Instruction, body: Computation) -> float:
    """The TPU compiler's form of a matrix product: batch dimensions are windows of which most positions are empty."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    assert labels is not None, instruction.name
    left, right, out = (
        _dims(body[instruction.operands[0]].type),
        _dims(body[instruction.operands[1]].type),
        _dims(instruction.type),
    )
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or [""])[0]))
    total = 2.0 * right[labels[2].index("i")] * out[labels[3].index("b")] * out[labels[3].index("f")]
    for axis in range(sum(c.isdigit() for c in labels[1])):
        digit = str(axis)
        total *= _positions(
            left[labels[1].index(digit)],
            right[labels[2].index(digit)],
            out[labels[3].index(digit)],
            {name: value.split("x")[axis] for name, value in window.items()},
        )
    return total


def _positions(left: int, right: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output's and a window's position that meet an element, in one spatial dimension."""
    stride, dilate = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(out)[:, None] * stride + np.arange(right)[None, :] * int(window.get("rhs_dilate", 1)) - low
    return int(np.sum((place >= 0) & (place % dilate == 0) & (place // dilate < left)))


def _received(instruction: Instruction, body: Computation, kind: str) -> float:
    """Bytes that each device has to receive, at least: a ring's share of operands or result."""
    group = _group_size(instruction.rest)
    sent = sum(_size(body[name].type) for name in instruction.operands if name in body)
    made = _size(instruction.type)
    if instruction.opcode.endswith("-start") and instruction.type.startswith("("):
        made -= sent  # the result's tuple holds the operands too
    share = (group - 1) / group if group else 1.0
    return {
        "all-gather": made * share,
        "all-reduce": 2 * sent * share,
        "reduce-scatter": sent * share,
        "all-to-all": sent * share,
    }.get(kind, float(sent))


def _is_scattered(instruction: Instruction, body: Computation) -> bool:
    """A TPU's reduce-scatter is written as a fusion of an all-reduce and the slice that is kept of it."""
    users = [other for other in body.values() if instruction.name in other.operands]
    return bool(users) and all(other.opcode == "dynamic-slice" for other in users)


def _add_transfer(transfers: dict[str, _Transfer], new: _Transfer, instruction: Instruction) -> None:
    """A TPU's collective beside other work is written in several fusions: its start, steps (in loops too), and end."""
    key = _channel_key(instruction) or f"alone {len(transfers)}"
    if key not in transfers:
        transfers[key] = new
        return
    known = transfers[key]
    known.times, known.hidden = min(known.times, new.times), True


def _channel_key(instruction: Instruction) -> str:
    channel = _CHANNEL.search(instruction.rest)
    return f"{instruction.opcode.removesuffix('-start')} {channel[1]}" if channel else ""


def _begun_key(instruction: Instruction, body: Computation, computations: dict[str, Computation]) -> str:
    """The key of the collective that this instruction starts, itself or by a call."""
    while instruction.opcode.endswith("-update") and instruction.operands[0] in body:
        instruction = body[instruction.operands[0]]
    applied = [
        computations.get(name, {}) for role, names in called(instruction) if role == "to_apply" for name in names
    ]
    inside = [i for computation in applied for i in computation.values() if i.opcode in COLLECTIVES]
    return _channel_key(inside[0] if instruction.opcode == "call-start" and inside else instruction)


def _group_size(rest: str) -> int:
    match = _GROUPS.search(rest)
    if match is None:
        return 0
    if match[4] is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[4]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[5])
        return math.prod(int(part or sizes[name]) for name, part in parts)
    return int(match[3]) if match[3] else len(match[1].split(","))


def _hbm_bytes(instruction: Instruction, body: Computation, computations: dict[str, Computation]) -> float:
    """Operands read and result written once; of what is sliced or updated in place only the slice."""
    sizes = [_size(body[name].type, hbm=True) if name in body else 0 for name in instruction.operands]
    result = _size(instruction.type, hbm=True)
    if instruction.opcode == "fusion":
        inside = next((computations[n] for role, names in called(instruction) for n in names if n in computations), {})
        return _fusion_bytes(inside, sizes, result)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * result
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * sizes[1]
    if instruction.opcode == "slice-start":
        # The type is ((operand), slice, context): of an array that goes to VMEM slice by slice, one slice.
        part = _SHAPE.search(instruction.type, closing(instruction.type, 1))
        return float(_size(part[0]) + _size(part[0], hbm=True)) if part else 0.0
    if instruction.opcode.endswith("-start"):
        return float(result)
    return float(sum(sizes) + result)


def _fusion_bytes(inside: Computation, sizes: list[int], result: int) -> float:
    total = 0.0
    parameters = [i for i in inside.values() if i.opcode == "parameter"]
    updated = [i for i in inside.values() if i.opcode == "dynamic-update-slice"]
    in_place = {source(inside, i.operands[0]) for i in updated}
    for parameter in parameters:
        number = int(parameter.rest.split(")")[0])
        whole = sizes[number] if number < len(sizes) else 0
        users = [i for i in inside.values() if parameter.name in i.operands]
        if parameter.name in in_place:
            continue
        sliced = all(i.opcode in ("dynamic-slice", "slice", "gather") for i in users)
        total += min(whole, sum(_size(i.type) for i in users)) if users and sliced else whole
    if updated:
        return total + 2.0 * sum(_size(inside[i.operands[1]].type) for i in updated if i.operands[1] in inside)
    return total + result


def _size(type_text: str, *, hbm: bool = False) -> int:
    """Bytes of an array or a tuple of them. hbm: without what the layout puts in another memory."""
    total = 0
    for dtype, dims, layout in _SHAPE.findall(type_text):
        if hbm and re.search(r"S\([1-9]", layout):
            continue
        width = _BYTES.get(dtype, 1 if dtype.startswith("f8") else 4)
        total += width * math.prod(int(d) for d in dims.split(",") if d)
    return total


def _dims(type_text: str) -> list[int]:
    match = _SHAPE.search(type_text)
    assert match is not None, type_text
    return _sizes(match[2])


def _sizes(dims: str) -> list[int]:
    return [int(d) for d in dims.split(",") if d]


def _numbers(match: re.Match | None) -> list[int]:
    return [int(d) for d in match[1].split(",") if d] if match else []
