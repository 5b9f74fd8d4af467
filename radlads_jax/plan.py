"""Compiles every stage's training step for a pod that is not there: does it fit, how long, and for how much.

python -m radlads_jax.plan --config configs/qwen2_5_72b_rad_rwkv6.py --topology v5p:4x4x8 [--json] [--price v5p=2.1]
"""

import json
import os
import re
import sys
import time
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from radlads_jax import config as config_lib
from radlads_jax import storage
from radlads_jax.launch import explain, parse_flags, refuse

_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips and their torus, e.g. v5e:2x2, v5p:4x4x8 or v6e:8x8.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON in the place of tables.")
_PRICE = flags.DEFINE_multi_string("price", [], "USD a chip-hour, e.g. v5p=2.1; may be repeated.")
_HBM_OOM = re.compile(r"([\d.]+)([KMGT])\) exceeds available HBM|Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 planned (whether or not it fits), 1 refused."""
    try:
        given = flags.FLAGS["config"].value
        if len(argv) > 1 or given is None or _TOPOLOGY.value is None:
            raise ValueError(
                "expected --config FILE and --topology CHIPS alone, e.g. --config configs/qwen2_5_7b_rad_rwkv7.py "
                "--topology v5e:4x8."
            )
        run = config_lib.validate(given)
        overrides = _parse_prices(_PRICE.value)
        prepare_environment()
        result = plan(run, _TOPOLOGY.value, overrides)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        return refuse(explain(error))
    except storage.access_errors() as error:
        return refuse(error)
    if _JSON.value:
        print(json.dumps(result, indent=2))
    else:
        show(result, Console())
    return 0


def prepare_environment() -> None:
    """What the TPU compiler needs to run where there is no TPU; to be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def plan(run: config_lib.RunConfig, topology: str, price_overrides: dict[str, float]) -> dict[str, Any]:
    """Every stage of a run on a topology: a document for JSON. Raises ValueError for what is not known."""
    # Imported late: what is wrong with the command shows without waiting for the compiler's libraries.
    from radlads_jax import sharding
    from radlads_jax.job import make_student_config
    from radlads_jax.planning import cost

    generation = topology.split(":")[0]
    prices = cost.prices(price_overrides)
    if generation not in prices:
        raise ValueError(f"the topology {topology!r} is not known; expected {', '.join(prices)}, as in v5e:2x2.")
    original = teacher_config(run)
    student = make_student_config(original, run)
    teacher = original.as_teacher_of(student)
    devices = topology_devices(topology)
    mesh = sharding.make_mesh(run, devices) or sharding.one_device_mesh(devices[0])
    chip = cost.CHIPS[generation]
    stages = [plan_stage(run, student, teacher, name, mesh, chip, prices[generation]) for name in run.stages]
    fit = all(stage["fits"] for stage in stages)
    return {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "usd_per_chip_hour": prices[generation],
        "stages": stages,
        "chip_hours": sum(stage["chip_hours"] for stage in stages) if fit else None,
        "usd": sum(stage["usd"] for stage in stages) if fit else None,
        "assumptions": list(cost.ASSUMPTIONS),
    }


def teacher_config(run: config_lib.RunConfig) -> Any:
    """The teacher's dimensions: from its directory, the run's own `scratch`, or for the paper's models a table."""
    import dataclasses

    from radlads_jax.porting.config_keys import read_config
    from radlads_jax.porting.hf_config import model_config_from_hf
    from radlads_jax.porting.known_models import KNOWN_CONFIGS

    path = run.teacher.path
    if not path:
        values = dict(run.teacher.scratch)
    elif (directory := storage.as_path(path)).is_dir():
        values = read_config(directory)
    elif path in KNOWN_CONFIGS:
        values = KNOWN_CONFIGS[path]
    else:
        raise ValueError(
            f"the shapes of {path} are not known here; expected a directory with its config.json (weights are not "
            f"needed), or one of {', '.join(KNOWN_CONFIGS)}. Download its config.json and give the directory."
        )
    return dataclasses.replace(model_config_from_hf(values), dtype=run.teacher.dtype)


def topology_devices(topology: str) -> Any:
    """The devices of a TPU topology that need not exist."""
    import jax
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the TPU compiler does not give the topology {topology!r} ({str(error).splitlines()[0]}); expected one "
            "such as v5e:2x2, v5p:4x4x8 or v6e:8x8, and the package libtpu, which the extra `tpu` brings."
        ) from error


def plan_stage(run: Any, student: Any, teacher: Any, name: str, mesh: Any, chip: Any, price: float) -> dict[str, Any]:
    """One stage's compiled step: memory, work, time and price."""
    import jax

    from pallas_kernels import dispatch
    from radlads_jax.distill.program import abstract_arguments, make_step
    from radlads_jax.planning import cost, hlo

    recipe = run.stage(name)
    arguments = abstract_arguments(run, student, teacher, name, mesh)
    state, frozen, weights, _ = arguments
    tokens = recipe.batch_size * recipe.seq_len
    result: dict[str, Any] = {
        "name": name,
        "steps": recipe.steps,
        "tokens_per_step": tokens,
        "accumulate": recipe.accumulate,
        "parameter_bytes": cost.shard_bytes((state.params, frozen)),
        "optimizer_bytes": cost.shard_bytes(state.opt_state),
        "teacher_bytes": cost.shard_bytes(weights),
        "model_flops": tokens * cost.model_flops(student, teacher, name, recipe.seq_len) / mesh.size,
        "ideal_flops": tokens * cost.model_flops(student, teacher, name, recipe.seq_len, remat=True) / mesh.size,
    }
    started = time.monotonic()
    try:
        with dispatch.traced_for("tpu"):
            lowered = make_step(run, student, teacher, name, mesh).lower(*arguments)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak = oom_bytes(str(error))
        if peak is None:
            raise
        empty = dict.fromkeys(("step_seconds", "tokens_per_second", "bound", "hours", "chip_hours", "usd"))
        return result | {"fits": False, "peak_bytes": peak} | empty | {"compile_seconds": time.monotonic() - started}
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak += memory.temp_size_in_bytes
    counts = hlo.count(compiled.as_text())
    timed = cost.step_time(chip, counts)
    hours = timed.step * recipe.steps / 3600
    return result | {
        "fits": peak <= chip.usable,
        "peak_bytes": peak,
        "temp_bytes": memory.temp_size_in_bytes,
        "compiled_flops": counts.flops,
        "hbm_bytes": counts.hbm_bytes,
        "link_bytes": counts.link_bytes,
        "exposed_link_bytes": counts.exposed_link_bytes,
        "loops_of_unknown_length": counts.unknown_loops,
        "compute_seconds": timed.compute,
        "memory_seconds": timed.memory,
        "network_seconds": timed.network,
        "step_seconds": timed.step,
        "bound": timed.bound,
        "tokens_per_second": tokens / timed.step,
        "mfu": result["model_flops"] / (timed.step * chip.flops),
        "hours": hours,
        "chip_hours": hours * mesh.size,
        "usd": hours * mesh.size * price,
        "compile_seconds": seconds,
    }


def oom_bytes(message: str) -> int | None:
    """What a program would have needed, from the compiler's refusal; None where it refused for another reason."""
    found = _HBM_OOM.search(message)
    if found is None:
        return None
    number, unit = (group for group in found.groups() if group)
    return int(float(number) * _UNITS[unit])


def show(result: dict[str, Any], console: Console) -> None:
    """The plan as tables."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1) or "one device"
    console.print(f"[bold]{result['topology']}[/bold]: {result['chips']} chips, {mesh}")
    memory = Table(title="Memory of one device, GiB", title_justify="left")
    for column in ("stage", "fits", "parameters", "optimizer", "teacher", "activations and temporary", "peak"):
        memory.add_column(column, justify="left" if column in ("stage", "fits") else "right")
    work = Table(title="One step, on one device", title_justify="left")
    for column in ("stage", "model TFLOP", "compiled TFLOP", "of ideal", "HBM GB", "links GB", "bound", "s", "MFU"):
        work.add_column(column, justify="left" if column in ("stage", "bound") else "right")
    bill = Table(title="The recipe", title_justify="left")
    for column in ("stage", "steps", "tokens/s", "hours", "chip-hours", "USD"):
        bill.add_column(column, justify="left" if column == "stage" else "right")
    for stage in result["stages"]:
        held = [stage[f"{part}_bytes"] for part in ("parameter", "optimizer", "teacher")]
        rest = stage["peak_bytes"] - sum(held)
        figures = (f"{size / 2**30:.2f}" for size in (*held, rest, stage["peak_bytes"]))
        memory.add_row(stage["name"], "yes" if stage["fits"] else "NO", *figures)
        if stage["step_seconds"] is None:
            continue
        work.add_row(
            stage["name"],
            f"{stage['model_flops'] / 1e12:.2f}",
            f"{stage['compiled_flops'] / 1e12:.2f}",
            f"{stage['compiled_flops'] / stage['ideal_flops']:.2f}",
            f"{stage['hbm_bytes'] / 1e9:.1f}",
            f"{sum(stage['link_bytes'].values()) / 1e9:.2f}",
            stage["bound"],
            f"{stage['step_seconds']:.3f}",
            f"{stage['mfu']:.1%}",
        )
        cost = (f"{stage[k]:,.1f}" for k in ("hours", "chip_hours"))
        bill.add_row(
            stage["name"],
            f"{stage['steps']:,}",
            f"{stage['tokens_per_second']:,.0f}",
            *cost,
            f"{stage['usd']:,.0f}",
        )
    if result["usd"] is not None:
        bill.add_row("all", "", "", "", f"{result['chip_hours']:,.1f}", f"{result['usd']:,.0f}")
    for table in (memory, work, bill):
        console.print(table)
    console.print(f"USD {result['usd_per_chip_hour']} a chip-hour. Assumed:")
    for line in result["assumptions"]:
        console.print(f"  {line}", soft_wrap=True)


def _parse_prices(given: list[str]) -> dict[str, float]:
    prices = {}
    for text in given:
        name, _, price = text.partition("=")
        try:
            prices[name] = float(price)
        except ValueError as error:
            raise ValueError(f"--price is {text!r}; expected a chip and USD an hour, e.g. v5p=2.1.") from error
    return prices


if __name__ == "__main__":
    app.run(lambda argv: sys.exit(main(argv)), flags_parser=parse_flags)
