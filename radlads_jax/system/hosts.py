"""Several hosts as one jax program: which process this is, and what the processes have to agree on."""

import contextlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from radlads_jax.system import failing

# A Slurm job's port: above those that Linux hands out, and another for every job that shares a host.
_FIRST_PORT, PORTS = 61440, 4096
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "radlads-jax")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_NTASKS", "SLURM_PROCID")


def start(
    distributed: str = "off",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins this process to the others; does nothing where no argument asks for it. Comes before any use of a device.

    distributed: "off", or "auto" to learn the rest from TPU metadata, GKE or Slurm. coordinator: HOST:PORT of process
    0, together with num_processes and process_id. Raises ValueError for arguments that do not fit, or an "auto" that
    finds no cluster; ConnectionError where joining fails. If the others don't come in five minutes, jax aborts the
    process (exit code 134).
    """
    asked = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    explicit = {name: value for name, value in asked.items() if value is not None}
    if distributed == "off" and not explicit:
        return
    options = _checked(distributed, explicit) if explicit else slurm_processes(os.environ) or {}
    # It would take SIGTERM away from this package, which has its own way to stop all processes at one step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        raise ValueError(
            f"--distributed=auto found no cluster ({error}); expected a TPU host, a GKE pod or a Slurm step. Give "
            "--coordinator, --num_processes and --process_id, or leave --distributed out on a single host."
        ) from error
    except RuntimeError as error:
        raise ConnectionError(f"this process could not join the others: {error}") from error
    failing.watch()


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what is written once."""
    return jax.process_index() == 0


def agreed(number: int) -> int:
    """The largest of all processes' numbers. Every process has to ask at the same place."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def said_by_first(text: str) -> str:
    """The first process's text, in every process. Every process has to ask at the same place."""
    if jax.process_count() == 1:
        return text
    width = agreed(len(text.encode()))
    padded = np.frombuffer(text.encode().ljust(width), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode().rstrip(" ")


def barrier() -> None:
    """Returns when every process has come here."""
    agreed(0)


@contextlib.contextmanager
def first_alone(what: str) -> Iterator[None]:
    """The first process runs the body, then all others do: they find what it left on a shared disk or in a bucket."""
    several = jax.process_count() > 1
    if several and not is_first():
        multihost_utils.sync_global_devices(what)
    yield
    if several and is_first():
        multihost_utils.sync_global_devices(what)


def fetched(x: Any) -> np.ndarray:
    """An array's values on this host, whichever processes hold its parts. Every process has to ask."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def require_same(settings: Mapping[str, Any]) -> None:
    """Raises ValueError, in every process, where one was started with other settings or other packages."""
    if jax.process_count() == 1:
        return
    packages = {f"version of {name}": importlib.metadata.version(name) for name in _PACKAGES}
    mine = json.dumps({**packages, **settings}, sort_keys=True).encode()
    width = agreed(len(mine))
    padded = np.frombuffer(mine.ljust(width), np.uint8)
    said = [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]
    for process, other in enumerate(said):
        names = [name for name in sorted(said[0].keys() | other.keys()) if said[0].get(name) != other.get(name)]
        if names:
            name = names[0]
            raise ValueError(
                f"process {process} was started with {name} = {other.get(name)}, process 0 with {said[0].get(name)} "
                f"({len(names)} differences in all); expected the same everywhere. Start every process by the same "
                "command, from the same environment."
            )


def _checked(distributed: str, explicit: dict) -> dict:
    """jax's arguments from flags that are all there and fit."""
    missing = [f"--{name}" for name in ("coordinator", "num_processes", "process_id") if name not in explicit]
    if missing or distributed == "auto":
        got = ", ".join(f"--{name}={value}" for name, value in explicit.items())
        what = "--distributed=auto" if distributed == "auto" else f"no {' and no '.join(missing)}"
        raise ValueError(
            f"got {got} and {what}; expected either --distributed=auto alone, or --coordinator=HOST:PORT, "
            "--num_processes=N and --process_id=I together."
        )
    number, count = explicit["process_id"], explicit["num_processes"]
    if not 0 <= number < count:
        raise ValueError(
            f"--process_id is {number} and --num_processes {count}; expected a number from 0 to num_processes - 1, a "
            "different one in every process."
        )
    if not re.fullmatch(r".+:\d+", explicit["coordinator"]):
        raise ValueError(
            f"--coordinator is {explicit['coordinator']!r}; expected HOST:PORT of process 0, e.g. node1:8476."
        )
    return _arguments(explicit["coordinator"], count, number)


def slurm_processes(environ: Mapping[str, str]) -> dict | None:
    """jax's arguments in a Slurm step with one task per node; None elsewhere, where jax finds them itself.

    There jax would give every task a single GPU, whereas here a task has all of its node's.
    """
    if any(name not in environ for name in SLURM) or environ["SLURM_NTASKS"] != environ["SLURM_STEP_NUM_NODES"]:
        return None
    port = _FIRST_PORT + int(environ["SLURM_JOB_ID"]) % PORTS
    host = first_host(environ["SLURM_STEP_NODELIST"])
    return _arguments(f"{host}:{port}", int(environ["SLURM_NTASKS"]), int(environ["SLURM_PROCID"]))


def first_host(nodes: str) -> str:
    """The first host of a Slurm list of nodes: "gpu[03-07,9],login" -> "gpu03"."""
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", nodes)
    if first is None:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}; expected a list of hosts. Give --coordinator instead.")
    return first[1] + (first[2] or "")


def _arguments(coordinator: str, num_processes: int, process_id: int) -> dict:
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",
    }
