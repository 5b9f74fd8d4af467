"""How the tests' processes are set up, this one and those that they start."""

import importlib.metadata
import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# For programs that run for milliseconds and take seconds to compile. Without LLVM's passes over machine code a tiny
# conversion took half of the CPU time; of that, MLIR's passes over every fusion and the cut into parts for more cores
# were four tenths (test_stages.py -k accumulated_parts: 74 and 43 s). The programs themselves are slower.
_XLA_FLAGS = {"--xla_backend_optimization_level": "0", "--xla_cpu_parallel_codegen_split_count": "1"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Newer ones have no such flag, and end a process that sets it.
    _XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
_DEVICES = "--xla_force_host_platform_device_count"


def xla_flags(devices: int = 1) -> str:
    """For a process with so many CPU devices."""
    return " ".join(f"{flag}={value}" for flag, value in (_XLA_FLAGS | {_DEVICES: str(devices)}).items())


def set_xla_flags(devices: int) -> None:
    """For this process and its children, before jax is imported, which reads them once; a flag that is set stays.

    XLA_FLAGS=--xla_backend_optimization_level=3 therefore compiles as a user's run does.
    """
    there = os.environ.get("XLA_FLAGS", "").split()
    names = {word.split("=")[0] for word in there}
    more = [word for word in xla_flags(devices).split() if word.split("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(there + more)


def environ(**more: str) -> dict[str, str]:
    """For a process that runs the package as a user does: this checkout of it, and without torch."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "without_torch")))
    return os.environ | {"PYTHONPATH": paths} | more
