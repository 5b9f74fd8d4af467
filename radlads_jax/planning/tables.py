"""A plan as tables in a terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table


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


def show_ranking(ranking: list[dict[str, Any]], chips: Iterable[str], console: Console) -> None:
    """What --topology auto found among the chips: a row for each, the cheapest first."""
    table = Table(title="Every stage on the smallest slice on which it fits", title_justify="left")
    for column in ("chip", "by", "stage: slice, hours, USD", "chip-hours", "USD"):
        table.add_column(column, justify="right" if column in ("chip-hours", "USD") else "left")
    for plan in ranking:
        stages = plan["stages"]
        how = "arithmetic" if all(stage["counts"] is None for stage in stages) else "compiler"
        each = [
            f"{stage['name']}: {stage['topology']}, {stage['hours']:,.1f}, {stage['usd']:,.0f}"
            if stage["fits"]
            else f"{stage['name']}: fits none, {stage['peak_bytes'] / 2**30:.1f} GiB on {stage['topology']}"
            for stage in stages
        ]
        bill = (f"{plan['chip_hours']:,.1f}", f"{plan['usd']:,.0f}") if plan["usd"] is not None else ()
        table.add_row(plan["chip"], how, "\n".join(each), *bill)
    console.print(table)
    if left_out := [name for name in chips if name not in {plan["chip"] for plan in ranking}]:
        console.print(f"Left out, with no slice for config.mesh: {', '.join(left_out)}.")
