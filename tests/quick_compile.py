"""XLA's flags for programs that run for milliseconds and take seconds to compile."""

import os

# Without LLVM's passes over machine code, MLIR's over every fusion, and a cut into parts for more cores: a third of the
# time, and programs that are several times slower.
FLAGS = {
    "--xla_backend_optimization_level": "0",
    "--xla_cpu_use_fusion_emitters": "false",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
DEVICES = "--xla_force_host_platform_device_count"


def xla_flags(devices: int = 1) -> str:
    """For a process with so many CPU devices."""
    return " ".join(f"{flag}={value}" for flag, value in (FLAGS | {DEVICES: str(devices)}).items())


def set_xla_flags(devices: int) -> None:
    """For this process and its children, before jax is imported, which reads them once; a flag that is set stays.

    XLA_FLAGS=--xla_backend_optimization_level=3 therefore compiles as a user's run does.
    """
    there = os.environ.get("XLA_FLAGS", "").split()
    names = {word.split("=")[0] for word in there}
    more = [word for word in xla_flags(devices).split() if word.split("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join(there + more)
