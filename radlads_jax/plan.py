"""Compiles every stage's training step for a pod that is not there: does it fit, how long, and for how much.

python -m radlads_jax.plan --config configs/qwen2_5_72b_rad_rwkv6.py --topology v5p:4x4x8 [--json] [--price v5p=2.1]
    [--results plans.jsonl]

--topology auto takes, of every chip, each stage's smallest slice on which it fits (a run continues on any other), and
ranks the chips by cost. GPUs (h100:8, a100:16) are planned by arithmetic alone.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import app, flags
from rich.console import Console
from rich.table import Table

from radlads_jax import config as config_lib
from radlads_jax import storage
from radlads_jax.launch import explain, parse_flags, refuse

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips and their torus, e.g. v5e:2x2, v5p:4x4x8, v6e:8x8, h100:8; or auto."
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON in the place of tables.")
_PRICE = flags.DEFINE_multi_string("price", [], "USD a chip-hour, e.g. v5p=2.1; may be repeated.")
_RESULTS = flags.DEFINE_string(
    "results", None, "A file that keeps what was compiled, so that it is not compiled again."
)


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
        planner = make_planner(run, overrides, Path(_RESULTS.value) if _RESULTS.value else None)
        automatic = _TOPOLOGY.value == "auto"
        result = planner.auto() if automatic else planner.topology(_TOPOLOGY.value)
    except ValueError as error:
        return refuse(error)
    except OSError as error:
        return refuse(explain(error))
    except storage.access_errors() as error:
        return refuse(error)
    if _JSON.value:
        print(json.dumps(result, indent=2))
    elif automatic:
        show_ranking(result, planner.prices, Console())
    else:
        show(result, Console())
    return 0


def prepare_environment() -> None:
    """What the TPU compiler needs to run where there is no TPU; to be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def make_planner(run: config_lib.RunConfig, price_overrides: dict[str, float], results: Path | None = None) -> Any:
    """The `plans.Planner` of a run. Raises ValueError for a teacher or a chip that is not known."""
    # Imported late: what is wrong with the command shows without waiting for the compiler's libraries.
    from radlads_jax.job import make_student_config
    from radlads_jax.planning import chips, plans

    original = teacher_config(run)
    student = make_student_config(original, run)
    return plans.Planner(run, student, original.as_teacher_of(student), chips.prices(price_overrides), results)


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
        done = ["", "", "", ""]
        if stage["counts"] is not None:
            done = [
                f"{stage['compiled_flops'] / 1e12:.2f}",
                f"{stage['compiled_flops'] / stage['ideal_flops']:.2f}",
                f"{stage['hbm_bytes'] / 1e9:.1f}",
                f"{sum(stage['link_bytes'].values()) / 1e9:.2f}",
            ]
        model, seconds = f"{stage['model_flops'] / 1e12:.2f}", f"{stage['step_seconds']:.3f}"
        work.add_row(stage["name"], model, *done, stage["bound"], seconds, f"{stage['mfu']:.1%}")
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


def show_ranking(found: list[dict[str, Any]], chips: Iterable[str], console: Console) -> None:
    """What --topology auto found among the chips: a row for each, the cheapest first."""
    table = Table(title="Every stage on the smallest slice on which it fits", title_justify="left")
    for column in ("chip", "by", "stage: slice, hours, USD", "chip-hours", "USD"):
        table.add_column(column, justify="right" if column in ("chip-hours", "USD") else "left")
    for one in found:
        stages = one["stages"]
        how = "arithmetic" if all(stage["counts"] is None for stage in stages) else "compiler"
        each = [
            f"{stage['name']}: {stage['topology']}, {stage['hours']:,.1f}, {stage['usd']:,.0f}"
            if stage["fits"]
            else f"{stage['name']}: fits none, {stage['peak_bytes'] / 2**30:.1f} GiB on {stage['topology']}"
            for stage in stages
        ]
        bill = (f"{one['chip_hours']:,.1f}", f"{one['usd']:,.0f}") if one["usd"] is not None else ()
        table.add_row(one["chip"], how, "\n".join(each), *bill)
    console.print(table)
    if left_out := [name for name in chips if name not in {one["chip"] for one in found}]:
        console.print(f"Left out, with no slice for config.mesh: {', '.join(left_out)}.")


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
