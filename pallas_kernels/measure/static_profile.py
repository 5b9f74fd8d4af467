"""One compilation for a TPU that is not there: what its text, its dump and its jaxpr say.

Runs as a process of its own, `python -m pallas_kernels.measure.static_profile REQUEST ANSWER`, for `static_cost_tpu`.
"""

import importlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.measure.hlo_text import Instruction, called, estimated_cycles, parse, trips

FORWARD, BACKWARD = "forward", "forward+backward"
# What the operations take, by name.
ARRAYS = {
    "wkv7": ("r", "log_w", "k", "v", "a", "b"),
    "wkv6": ("r", "log_w", "k", "v"),
    "gdn": ("q", "k", "v", "log_g", "beta"),
}
# Those that are float32 whatever the others are; the last ones have one channel a head.
FLOAT32 = ("log_w", "log_g", "beta")
ONE_A_HEAD = ("log_g", "beta")
# bfloat16 passes of a float32 product on the MXU.
_PASSES = {"HIGHEST": 6, "HIGH": 3}


def _program(request: dict[str, Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The call to compile and its arguments' shapes; sequences are [B,T,H*K] and split into heads inside."""
    import jax
    import jax.numpy as jnp

    batch, length, heads, size = (request[name] for name in ("batch", "length", "heads", "head_size"))
    name = request["implementation"]
    module = importlib.import_module(f"pallas_kernels.{request['operation']}.api")
    implementation = module.IMPLEMENTATIONS[name]
    options = {"interpret": False} if name == "pallas_tpu" else {}

    def forward(*arguments: Any) -> Any:
        *arrays, state = arguments
        split = [x if x.shape[-1] == heads else x.reshape(batch, length, heads, size) for x in arrays]
        out, final_state = implementation(*split, state, None, request["chunk_size"], **options)
        return out.reshape(batch, length, -1), final_state

    def backward(arguments: Any, cotangents: Any) -> Any:
        results, pull = jax.vjp(forward, *arguments)
        return results, pull(cotangents)

    dtype = jnp.dtype(request["dtype"])
    like = jax.ShapeDtypeStruct((batch, length, heads * size), dtype)
    state = jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32)

    def array(name: str) -> Any:
        width = heads if name in ONE_A_HEAD else heads * size
        return jax.ShapeDtypeStruct((batch, length, width), jnp.float32 if name in FLOAT32 else dtype)

    arrays = [array(name) for name in ARRAYS[request["operation"]]]
    if request["direction"] == FORWARD:
        return forward, [*arrays, state]
    return backward, [(*arrays, state), (like, state)]


def _bytes_moved(request: dict[str, Any]) -> int:
    """Arguments and results of forward once; for backward, arguments, cotangents and gradients once more."""
    tokens = request["batch"] * request["length"] * request["heads"] * request["head_size"]
    state = 4 * request["batch"] * request["heads"] * request["head_size"] ** 2
    width = 2 if request["dtype"] == "bfloat16" else 4

    def bytes_of(name: str) -> int:
        channels = tokens // request["head_size"] if name in ONE_A_HEAD else tokens
        return channels * (4 if name in FLOAT32 else width)

    read = sum(bytes_of(name) for name in ARRAYS[request["operation"]]) + state
    made = tokens * width + state
    return read + made if request["direction"] == FORWARD else 3 * read + 2 * made


def operations(jaxpr: Any) -> float:
    """Multiplications and additions of all matrix products, in bfloat16 passes."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in left)
            passes = _PASSES.get(getattr(_first(equation.params["precision"]), "name", ""), 1)
            total += 2.0 * passes * inner * math.prod(equation.outvars[0].aval.shape)
        repeats = 1
        if equation.primitive.name == "pallas_call":
            repeats = math.prod(equation.params["grid_mapping"].grid)
        elif equation.primitive.name == "scan":
            repeats = equation.params["length"]
        for value in equation.params.values():
            for inner_jaxpr in value if isinstance(value, (tuple, list)) else [value]:
                inner_jaxpr = getattr(inner_jaxpr, "jaxpr", inner_jaxpr)
                if hasattr(inner_jaxpr, "eqns"):
                    total += repeats * operations(inner_jaxpr)
    return total


def _first(precision: Any) -> Any:
    return precision[0] if isinstance(precision, tuple) else precision


def xla_cycles(text: str) -> float:
    """The compiler's estimates of everything but Mosaic kernels; a loop counts as often as it runs."""
    computations, entry = parse(text)

    def cycles(name: str) -> float:
        total = 0.0
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                count = trips(instruction, computations)
                if count is None:
                    raise ValueError(f"{instruction.name} is a loop whose text does not say how often it runs.")
                (body,) = dict(called(instruction))["body"]
                total += count * cycles(body)
            elif not _is_kernel(instruction):
                total += estimated_cycles(instruction)
        return total

    return cycles(entry)


def kernels(text: str) -> dict[str, dict[str, int]]:
    """Cycles (0 without a profile) and bytes of VMEM of each Mosaic kernel, by its instruction's name."""
    computations, _ = parse(text)
    costs = {}
    for instruction in filter(_is_kernel, itertools.chain(*(body.values() for body in computations.values()))):
        used = re.search(r'"used_scoped_memory_configs":(\[[^]]*\])', instruction.rest)
        memory = json.loads(used.group(1)) if used else []
        vmem = sum(int(part["size"]) for part in memory if part["memory_space"] == "1")
        costs[instruction.name] = {"cycles": int(estimated_cycles(instruction)), "vmem": vmem}
    return costs


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.rest


def code_size(folder: Path, kernel: str) -> dict[str, int]:
    """Bundles, spills and fills of a kernel's final code, from a dump; zeros without one."""
    for path in folder.glob(f"*-{kernel}-*final_hlo-static-per-bundle-utilization.txt"):
        lines = path.read_text().splitlines()
        columns = next(line for line in lines if line.startswith("MXU")).split(", ")
        rows = [line.split() for line in lines if re.fullmatch(r"[\d ]+", line)]
        rows = rows[1:]  # The first is the capacity.
        spill, fill = columns.index("VSTORE:SPILL"), columns.index("VLOAD:FILL")
        return {
            "bundles": len(rows),
            "spills": sum(int(row[spill]) for row in rows),
            "fills": sum(int(row[fill]) for row in rows),
        }
    return {"bundles": 0, "spills": 0, "fills": 0}


def _losses(request: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Temporary bytes of a device, by loss and form, with the vocabulary over all of the topology's devices."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from pallas_kernels.dispatch import traced_for
    from pallas_kernels.measure import loss_forms

    size = loss_forms.Size(**{name: request[name] for name in vars(loss_forms.Size())})
    devices = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices
    names = ("data", "fsdp", "tensor", "context")
    mesh = Mesh(np.array(devices).reshape(1, 1, -1, 1), names, axis_types=(AxisType.Auto,) * 4)
    whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), (None, "tensor")))

    def temporary(loss: str, form: str) -> int:
        arrays = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split if "kernel" in name else whole)
            for name, x in loss_forms.shapes(loss, size, "bfloat16").items()
        }
        run = jax.jit(loss_forms.value_and_gradients(loss, form), out_shardings=(whole, (whole, split)))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), traced_for("tpu"):
            return run.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    return {loss: {form: temporary(loss, form) for form in loss_forms.FORMS} for loss in loss_forms.LOSSES}


def _compiled(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compiles for one device of the topology."""
    if request["operation"] == "linear_loss":
        return _losses(request)
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"])
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    function, shapes = _program(request)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        done = jax.jit(function, in_shardings=sharding, out_shardings=sharding).lower(*shapes).compile()
    text = done.as_text() or ""
    memory = done.memory_analysis()
    return {
        "xla_cycles": xla_cycles(text),
        "kernels": {name: costs | code_size(folder, name) for name, costs in kernels(text).items()},
        "bytes_moved": _bytes_moved(request),
        "operations": operations(jax.make_jaxpr(function)(*shapes).jaxpr),
        "temporary": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    where = Path(sys.argv[2])
    result = _compiled(json.loads(sys.argv[1]), where.parent)
    where.write_text(json.dumps(result))
    # libtpu may abort while the interpreter ends; the answer is written.
    os._exit(0)
