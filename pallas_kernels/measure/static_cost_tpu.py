"""Static cost on TPU: compiles in processes of their own, because libtpu reads its flags once, and prints a table."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.measure.static_profile import BACKWARD, FORWARD

# Two lengths, a whole number of any kernel's blocks: a profile simulates every grid step, so it takes short sequences,
# and the cost per token is the slope between them.
PROFILED_LENGTHS = (256, 512)
# A long sequence lies in HBM: a short one must not be moved into VMEM before, for which a profile may have no room.
_PROFILE_FLAGS = "--xla_jf_dump_static_llo_profile_to={folder} --xla_gf_vmem_memory_space_assignment=false"
_DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


@dataclass(frozen=True)
class Shape:
    """Sizes of a call; dtype is that of all but log_w and states."""

    batch: int
    length: int
    heads: int
    head_size: int
    dtype: str


@dataclass(frozen=True)
class _Row:
    """One implementation and direction: cycles of the whole call, None where the chip's profile is not to be had."""

    implementation: str
    direction: str
    kernel_cycles: float | None
    xla_cycles: float
    bytes_moved: float
    operations: float
    vmem: int
    temporary: int
    bundles: int
    spills: int
    fills: int


def chip_of(topology: str) -> Chip:
    known = {name: chip for name, chip in CHIPS.items() if chip.clock and chip.hbm_rate}
    if (name := topology.split(":")[0]) not in known:
        raise ValueError(
            f"static_cost got topology {topology!r}, expected one of {sorted(known)} and a shape: v6e:2x2."
        )
    return known[name]


def compiled_in_child(request: dict[str, Any], flags: str) -> dict[str, Any] | None:
    """What `static_profile` finds for a request, with libtpu under these flags; None where the compiler aborts."""
    with tempfile.TemporaryDirectory(prefix="static-cost-") as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": flags.format(folder=folder),
            # A profile's traces of the stack fill gigabytes of libtpu's own log directory.
            "TPU_LOG_DIR": folder,
        }
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "pallas_kernels.measure.static_profile", json.dumps(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if answer.exists():
            return json.loads(answer.read_text())
    if done.returncode > 0:
        raise RuntimeError(f"static_cost could not compile {request}:\n{done.stderr[-4000:]}")
    return None


def _measure(
    operation: str, topology: str, shape: Shape, implementation: str, direction: str, chunk_size: int | None
) -> _Row:
    """Compiles the call itself, and for its kernels' cycles two short ones."""
    request = {
        "operation": operation,
        "topology": topology,
        "implementation": implementation,
        "direction": direction,
        "chunk_size": chunk_size,
        **vars(shape),
    }
    has_kernel = implementation == "pallas_tpu"
    whole = compiled_in_child(request, _DUMP_FLAGS if has_kernel else "")
    if whole is None:
        raise RuntimeError(f"static_cost: the compiler aborted on {request}.")
    kernel_cycles: float | None = 0.0
    if has_kernel:
        short = [
            compiled_in_child(request | {"batch": 1, "length": length}, _PROFILE_FLAGS) for length in PROFILED_LENGTHS
        ]
        kernel_cycles = extrapolated(short, shape)
    kernels = whole["kernels"].values()
    return _Row(
        implementation,
        direction,
        kernel_cycles,
        whole["xla_cycles"],
        whole["bytes_moved"],
        whole["operations"],
        vmem=max((kernel["vmem"] for kernel in kernels), default=0),
        temporary=whole["temporary"],
        **{name: sum(kernel[name] for kernel in kernels) for name in ("bundles", "spills", "fills")},
    )


def extrapolated(short: list[dict[str, Any] | None], shape: Shape) -> float | None:
    """Cycles of all kernels at the shape's length and batch, from those at PROFILED_LENGTHS with a batch of one."""
    cycles = [
        None if profile is None else sum(kernel["cycles"] for kernel in profile["kernels"].values())
        for profile in short
    ]
    first, second = cycles
    if not first or not second:
        return None
    slope = (second - first) / (PROFILED_LENGTHS[1] - PROFILED_LENGTHS[0])
    return shape.batch * (first + slope * (shape.length - PROFILED_LENGTHS[0]))


def report(
    operation: str, topology: str, shape: Shape, implementations: list[str], chunk_size: int | None
) -> list[_Row]:
    """Prints the table and returns its rows."""
    chip = chip_of(topology)
    rows = [
        _measure(operation, topology, shape, implementation, direction, chunk_size)
        for implementation in implementations
        for direction in (FORWARD, BACKWARD)
    ]
    title = (
        f"{operation} on {topology}, B={shape.batch} T={shape.length} H={shape.heads} K=V={shape.head_size} "
        f"{shape.dtype}: static cycles of one device"
    )
    table = Table(title=title, title_justify="left")
    names = ("kernels M", "XLA ops M", "total M", "ms", "bytes limit", "MXU limit", "VMEM MiB", "HBM temp MiB")
    for name in ("", *names, "bundles", "spills", "fills"):
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for row in rows:
        table.add_row(*_cells(row, chip))
    console = Console(width=max(150, Console().width))
    console.print(table)
    console.print(
        "bytes limit, MXU limit: the time that reading and writing every argument, result and gradient once, or the "
        "matrix products, take at the chip's best rate, as a share of the total. Arguments are [B,T,H*K], as "
        "projections make them. bundles, spills, fills: instructions in the kernels' code, one pass of each loop."
    )
    if any(row.kernel_cycles is None for row in rows):
        console.print("n/a: this chip's static profile aborts on these kernels; count bundles instead.")
    return rows


def _cells(row: _Row, chip: Chip) -> list[str]:
    """A row as text."""
    row_cells = [f"{row.implementation} {row.direction}"]
    if row.kernel_cycles is None:
        row_cells += ["n/a", f"{row.xla_cycles / 1e6:.3f}", *("n/a",) * 4]
    else:
        total = row.kernel_cycles + row.xla_cycles
        seconds = total / chip.clock
        row_cells += [f"{cycles / 1e6:.3f}" for cycles in (row.kernel_cycles, row.xla_cycles, total)]
        row_cells += [f"{seconds * 1e3:.3f}"]
        row_cells += [
            f"{row.bytes_moved / chip.hbm_rate / seconds:.0%}",
            f"{row.operations / chip.flops / seconds:.0%}",
        ]
    vmem = f"{row.vmem / 2**20:.1f}" if row.vmem else "-"
    counts = [str(count) if row.bundles else "-" for count in (row.bundles, row.spills, row.fills)]
    return [*row_cells, vmem, f"{row.temporary / 2**20:.0f}", *counts]
