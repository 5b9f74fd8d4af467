"""Plans of whole runs: on one topology, or every stage on the smallest slice of each chip on which it fits."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from radlads_jax.config import RunConfig
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.program import StagePlan
from radlads_jax.models import sharding
from radlads_jax.models.config import ModelConfig
from radlads_jax.planning import stage as stage_lib
from radlads_jax.planning import where as where_lib
from radlads_jax.planning.chips import CHIPS, known_chip
from radlads_jax.planning.cost import ASSUMPTIONS, ASSUMPTIONS_UNCOMPILED
from radlads_jax.system import storage


class Planner:
    """Plans of one run. results: a file of JSON lines with what was compiled before, to which new records are added."""

    def __init__(
        self,
        run: RunConfig,
        student: ModelConfig,
        teacher: ModelConfig,
        prices: dict[str, float | None],
        results: Path | None = None,
    ):
        self.run, self.student, self.teacher, self.prices, self.results = run, student, teacher, prices, results
        self.known = _read_results(results)
        # Versions of jax that compiled what is known, and that were said to be others.
        self._told_of: list[str] = []

    def stage(self, topology: str, name: str) -> dict[str, Any]:
        """One stage on one topology, priced; compiled unless that is known, or by arithmetic it can not fit."""
        chip = CHIPS[known_chip(topology)]
        mesh = mesh_lib.make_abstract_mesh(self.run, _device_count(topology))
        record = stage_lib.by_arithmetic(self._plan(name, mesh))
        if chip.is_compiled_for and record["peak_bytes_by_hand"] <= chip.usable:
            record |= self._compiled(topology, name, dict(mesh.shape))
        else:
            record |= stage_lib.uncompiled(record)
        return stage_lib.priced(record, chip, self.prices[known_chip(topology)], chip_count(topology))

    def topology(self, topology: str) -> dict[str, Any]:
        """Every stage on one topology: a document for JSON. Raises ValueError for a topology that is not known."""
        chip = CHIPS[known_chip(topology)]
        mesh = mesh_lib.make_abstract_mesh(self.run, _device_count(topology))
        document: dict[str, Any] = {
            "topology": topology,
            "chips": chip_count(topology),
            "mesh": dict(mesh.shape),
            "usd_per_chip_hour": self.prices[known_chip(topology)],
            "stages": [self.stage(topology, name) for name in self.run.stages],
            "assumptions": list(ASSUMPTIONS if chip.is_compiled_for else ASSUMPTIONS_UNCOMPILED),
        }
        return document | totals(document["stages"])

    def slices(self, name: str) -> list[str]:
        """Those of a chip's slices whose number of devices the run's mesh can take, the smallest first."""
        slices = [f"{name}:{shape}" for shape in CHIPS[name].slices]
        return [topology for topology in slices if _device_count(topology) % self._least_devices() == 0]

    def smallest(self, name: str) -> dict[str, Any]:
        """A chip's smallest slices: every stage on the first on which it fits, else as it is on the largest there is.

        A stage's record has its `topology` too. Raises ValueError for a mesh that none of the slices has chips for.
        """
        self._require_slices([name])
        stages = []
        for stage in self.run.stages:
            for topology in self.slices(name):
                planned = {"topology": topology} | self.stage(topology, stage)
                if planned["fits"]:
                    break
            stages.append(planned)
        return {"chip": name, "stages": stages} | totals(stages)

    def auto(self) -> list[dict[str, Any]]:
        """`smallest` of every chip, the cheapest first, those on which a stage fits nowhere last.

        Cheapest by their FLOPs at one share of their peaks: not by what is compiled for some and counted for others.
        Chips without a price, or a slice for the run's mesh, are not among them; raises ValueError where no slice is.
        """
        priced = [name for name in CHIPS if self.prices[name] is not None]
        self._require_slices(priced)
        ranking = [self.smallest(name) for name in priced if self.slices(name)]
        return sorted(ranking, key=lambda plan: math.inf if plan["usd_counted"] is None else plan["usd_counted"])

    def _least_devices(self) -> int:
        mesh = self.run.mesh
        return mesh.data * max(mesh.fsdp, 1) * mesh.tensor * mesh.context

    def _require_slices(self, names: list[str]) -> None:
        if not any(map(self.slices, names)):
            every = ", ".join(f"{name}:{shape}" for name in names for shape in CHIPS[name].slices)
            raise ValueError(
                f"config.mesh takes {self._least_devices()} devices or a multiple (data x fsdp x tensor x context); "
                f"expected a number that divides one of {every}. Change config.mesh."
            )

    def _plan(self, name: str, mesh: sharding.AnyMesh) -> StagePlan:
        return StagePlan(self.run, name, self.student, self.teacher, mesh)

    def where(self, topology: str, name: str) -> dict[str, Any]:
        """Where the time of a stage's step goes: a document for JSON; compiled anew, for no results hold the program.

        Raises ValueError for a chip without a compiler here, and for a stage that does not fit.
        """
        chip = CHIPS[known_chip(topology)]
        if not chip.is_compiled_for:
            raise ValueError(
                f"{topology} is planned by arithmetic alone, which knows nothing of a step's parts; expected a TPU's "
                "topology, as v6e:2x4."
            )
        plan = self._plan_for_devices(topology, name)
        print(f"compiling {name} for {topology}", file=sys.stderr, flush=True)
        try:
            text = stage_lib.text_of(stage_lib.compile_step(plan))
        except jax.errors.JaxRuntimeError as error:
            if (peak := stage_lib.oom_bytes(str(error))) is None:
                raise
            raise ValueError(
                f"{name} does not fit {topology}: it needs {peak / 2**30:.1f} GiB of a device, which has "
                f"{chip.usable / 2**30:.2f}; expected a stage that fits. Take a larger slice."
            ) from error
        return {"topology": topology, "stage": name} | where_lib.of_program(text, chip)

    def _plan_for_devices(self, topology: str, name: str) -> StagePlan:
        devices = topology_devices(topology)
        return self._plan(name, mesh_lib.make_mesh(self.run, devices) or sharding.one_device_mesh(devices[0]))

    def _compiled(self, topology: str, name: str, mesh_sizes: dict[str, int]) -> dict[str, Any]:
        asked: dict[str, Any] = {"teacher": self.run.teacher.path, "student": self.run.student.mixer, "stage": name}
        asked |= {"topology": topology, "mesh": mesh_sizes, "libtpu": os.environ.get("LIBTPU_INIT_ARGS", "")}
        plan = StagePlan(self.run, name, self.student, self.teacher)
        asked |= {"top_k": self.run.teacher.stored_top_k} if plan.reads_logits else plan.softening
        optim, slice_tokens = self.run.optim, self.run.train.slice_tokens
        key = _key(self.student, self.teacher, self.run.stage(name), optim, slice_tokens, asked)
        if key in self.known and self.known[key].get("jax") not in (jax.__version__, *self._told_of):
            other = self.known[key].get("jax", "an unknown version")
            self._told_of.append(other)
            print(
                f"{self.results} has what jax {other} compiled; this is {jax.__version__}. Delete it to compile anew.",
                file=sys.stderr,
            )
        if key not in self.known:
            print(f"compiling {name} for {topology}", file=sys.stderr, flush=True)
            compiled = stage_lib.compiled(self._plan_for_devices(topology, name))
            self.known[key] = asked | {"jax": jax.__version__} | compiled
            if self.results is not None:
                # Another run's plan may have written to it since.
                self.known = _read_results(self.results) | self.known
                _write_results(self.results, self.known)
        return {k: v for k, v in self.known[key].items() if k not in asked and k != "jax"}


def totals(stages: list[dict[str, Any]]) -> dict[str, float | None]:
    """The bill of all of these stages; None where one does not fit, or has no such price."""
    keys = ("chip_hours", *stage_lib.BILLS)
    known = {key: [stage[key] for stage in stages] for key in keys}
    return {key: None if None in each else sum(each) for key, each in known.items()}


def chip_count(topology: str) -> int:
    """Chips of v5p:2x2x4, or of h100:8; ValueError where there is no such number."""
    _, _, shape = topology.partition(":")
    if not shape or not all(part.isdecimal() and int(part) > 0 for part in shape.split("x")):
        raise ValueError(
            f"the topology is {topology!r}; expected a chip and its slice, as v5e:2x2, v5p:4x4x8 or h100:8."
        )
    return math.prod(int(part) for part in shape.split("x"))


def _device_count(topology: str) -> int:
    return chip_count(topology) * CHIPS[known_chip(topology)].devices


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a TPU topology that need not exist."""
    # The compiler takes a host to have four chips or more.
    options = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        # A TPU's own machine may have the compiler in another place than that package.
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(
                f"a plan for {topology} asks the TPU compiler, which the package libtpu has and is not installed here; "
                "expected the extra `tpu`: pip install -e '.[tpu]'. GPUs, as h100:8, are planned without."
            ) from error
        raise ValueError(
            f"the TPU compiler does not give the topology {topology!r} ({str(error).splitlines()[0]}); expected one "
            "such as v5e:2x2, v5p:4x4x8 or v6e:8x8. Name one."
        ) from error


def _read_results(path: Path | None) -> dict[str, dict[str, Any]]:
    """What was compiled, by key; nothing without a file. Raises ValueError for a file that is none of results."""
    if path is None or not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {line.pop("key"): line for line in lines}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no results of plans ({error}); expected what --results wrote.") from error


def _write_results(path: Path, known: dict[str, dict[str, Any]]) -> None:
    storage.write_text(path, "".join(json.dumps({"key": key} | value) + "\n" for key, value in known.items()))


def _key(*parts: Any) -> str:
    """Of all that decides a program; not of this project's version: delete the results where the step has changed."""
    return hashlib.sha256(", ".join(map(_told, parts)).encode()).hexdigest()[:16]


def _told(value: Any) -> str:
    """As repr, without fields that are as they are by default: one that is new changes nothing of what was known."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr]
    said = (f"{field.name}={_told(own)}" for field, own in fields if own != _default(field))
    return f"{type(value).__name__}({', '.join(said)})"


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
