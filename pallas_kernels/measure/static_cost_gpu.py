"""What the Triton kernels of an operation take on an NVIDIA GPU that is not there, as NVIDIA's assembler counts it.

For `static_cost`. Needs triton; jax-triton and a GPU it does not.
"""

import functools
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from pallas_kernels.gdn import gdn
from pallas_kernels.measure.static_profile import ARRAYS, FLOAT32, ONE_A_HEAD
from pallas_kernels.shared.triton_call import Launch, running
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7

_OPERATIONS = {"wkv7": wkv7, "wkv6": wkv6, "gdn": gdn}
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "int32": "*i32"}
# Instructions on tensor cores: of one warp, of four (Hopper), of the tensor memory's own unit (Blackwell).
_MATRIX_INSTRUCTIONS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


class _Cost(NamedTuple):
    """Of one kernel: registers per thread, bytes of shared memory per program, bytes of code that spills registers
    or fills them again, and how often each matrix instruction stands in the code."""

    registers: int
    shared: int
    spills: int
    instructions: dict[str, int]


def launches(
    operation: str, B: int, T: int, H: int, K: int, dtype: str = "bfloat16"
) -> tuple[list[Launch], list[Launch]]:
    """The kernels that forward and backward call, in order, for [B,T,H,K] of `dtype` with decays in float32."""
    function: Any = _OPERATIONS[operation]
    shapes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(
            (B, T, H) if name in ONE_A_HEAD else (B, T, H, K), jnp.float32 if name in FLOAT32 else dtype
        )
        for name in ARRAYS[operation]
    }
    state = jax.ShapeDtypeStruct((B, H, K, K), jnp.float32)
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    seen: list[Launch] = []
    forward: list[Launch] = []

    def record(launch: Launch) -> list[jax.Array]:
        seen.append(launch)
        return [jnp.zeros(output.shape, output.dtype) for output in launch.outputs]

    def both(inputs: dict[str, jax.Array], state: jax.Array, ids: jax.Array) -> Any:
        def call(inputs: dict[str, jax.Array], state: jax.Array) -> Any:
            return function(**inputs, initial_state=state, segment_ids=ids, implementation="triton_gpu")

        out, pull = jax.vjp(call, inputs, state)
        forward.extend(seen)
        return pull(out)

    with running(record):
        jax.eval_shape(both, shapes, state, ids)
    return forward, seen[len(forward) :]


def cost(launch: Launch, capability: int) -> _Cost:
    """Compiles a kernel for a compute capability such as 90, with no device."""
    pointers = [name for name in launch.kernel.arg_names if name not in launch.settings]
    types = [_POINTERS[str(array.dtype)] for array in (*launch.inputs, *launch.outputs)]
    return _cost(
        launch.kernel,
        tuple(zip(pointers, types, strict=True)),
        tuple(launch.settings.items()),
        launch.num_warps,
        capability,
    )


@functools.cache
def _cost(
    kernel: Any,
    pointers: tuple[tuple[str, str], ...],
    settings: tuple[tuple[str, Any], ...],
    warps: int,
    capability: int,
) -> _Cost:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(settings)
    types = dict(pointers)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # XLA's buffers are aligned, and jax-triton says so to the compiler in the same way.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in types}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 2},
    )
    ptx = compiled.asm["ptx"]
    report = _assemble(ptx, capability)
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return _Cost(
        int(registers[1]),
        compiled.metadata.shared,
        sum(int(count) for count in re.findall(r"(\d+) bytes spill", report)),
        {name: ptx.count(text) for name, text in _MATRIX_INSTRUCTIONS.items()},
    )


def _assemble(ptx: str, capability: int) -> str:
    """What the assembler in Triton's wheel says of a program."""
    from triton import knobs

    tool = knobs.nvidia.ptxas if capability < 90 else knobs.nvidia.ptxas_blackwell
    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert architecture is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", "--regAllocOptLevel=2", f"--gpu-name={architecture[1]}", file.name]
        return subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr


def capability_of(target: str) -> int:
    """90 of sm_90. Raises ValueError for what is no such name, and for GPUs that are too old."""
    named = re.fullmatch(r"sm_(\d+)", target)
    if named is None or int(named[1]) < 80:
        raise ValueError(f"static_cost got target={target!r}, expected sm_80 or newer; pass sm_80, sm_90 or sm_100.")
    return int(named[1])


def main(operation: str, target: str, B: int, T: int, H: int, K: int, dtype: str = "bfloat16") -> None:
    """Prints a table of the kernels that forward and backward call; `target` is a name such as sm_90."""
    capability = capability_of(target)
    table = Table(title=f"{operation} on {target}, B={B} T={T} H={H} K=V={K} {dtype}")
    table.add_column("pass")
    table.add_column("kernel")
    numbers = ("programs", "warps", "registers", "shared KiB", "spilled bytes", *_MATRIX_INSTRUCTIONS)
    for name in numbers:
        table.add_column(name, justify="right")
    forward, backward = launches(operation, B, T, H, K, dtype)
    for name, calls in (("forward", forward), ("backward", backward)):
        for launch in calls:
            figures = cost(launch, capability)
            programs = functools.reduce(lambda x, y: x * y, launch.grid)
            values = (programs, launch.num_warps, figures.registers, f"{figures.shared / 1024:.1f}", figures.spills)
            cells = (*values, *figures.instructions.values())
            table.add_row(name, launch.kernel.fn.__name__, *(str(cell) for cell in cells))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
