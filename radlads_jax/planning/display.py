"""What a plan shows on the terminal: its tables, a ranking of chips, where a step's time goes."""

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
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
    for column in ("stage", "steps", "tokens/s", "hours", "chip-hours", "USD", "from", "to", "USD on Spot"):
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
            *_bills(stage),
        )
    if result["chip_hours"] is not None:
        bill.add_row("all", "", "", "", f"{result['chip_hours']:,.1f}", *_bills(result))
    for table in (memory, work, bill):
        console.print(table)
    name, price = result["topology"].split(":")[0], result["usd_per_chip_hour"]
    told = f"No price of a {name} is known (--price {name}=USD)." if price is None else f"USD {price} a chip-hour."
    console.print(f"{told} Assumed:")
    for line in result["assumptions"]:
        console.print(f"  {line}", soft_wrap=True)


def show_ranking(ranking: list[dict[str, Any]], prices: Mapping[str, float | None], console: Console) -> None:
    """What --topology auto found among the chips that have prices: a row for each, the cheapest first."""
    table = Table(title="Every stage on the smallest slice on which it fits", title_justify="left")
    for column in ("chip", "by", "stage: slice, hours, USD", "chip-hours", "USD", "from", "to", "on Spot", "counted"):
        table.add_column(column, justify="left" if column in ("chip", "by") or ":" in column else "right")
    for plan in ranking:
        stages = plan["stages"]
        how = "arithmetic" if all(stage["counts"] is None for stage in stages) else "compiler"
        each = [
            f"{stage['name']}: {stage['topology']}, {stage['hours']:,.1f}, {stage['usd']:,.0f}"
            if stage["fits"]
            else f"{stage['name']}: fits none, {stage['peak_bytes'] / 2**30:.1f} GiB on {stage['topology']}"
            for stage in stages
        ]
        bill = (
            (f"{plan['chip_hours']:,.1f}", *_bills(plan), _usd(plan["usd_counted"])) if plan["usd"] is not None else ()
        )
        table.add_row(plan["chip"], how, "\n".join(each), *bill)
    console.print(table)
    console.print(
        "Ranked by what is counted: USD of the model's FLOPs at one share of every chip's peak. A chip planned by "
        "arithmetic is not to be compared with one that was compiled for.",
        soft_wrap=True,
    )
    if unpriced := [name for name, price in prices.items() if price is None]:
        known = " ".join(f"--price {name}=USD" for name in unpriced)
        console.print(f"Left out, without a known price: {', '.join(unpriced)}. Give it: {known}.", soft_wrap=True)
    if left_out := [name for name in prices if name not in {*unpriced, *(plan["chip"] for plan in ranking)}]:
        console.print(f"Left out, with no slice for config.mesh: {', '.join(left_out)}.")


def _bills(priced: Mapping[str, Any]) -> list[str]:
    return [_usd(priced[key]) for key in ("usd", "usd_low", "usd_high", "usd_spot")]


def _usd(price: float | None) -> str:
    return "" if price is None else f"{price:,.0f}"


def show_where(result: dict[str, Any], console: Console) -> None:
    """Where a step's time goes, as tables."""
    console.print(f"[bold]{result['topology']}[/bold]: a step of {result['stage']}, {result['step_seconds']:.3f} s")
    kinds = Table(title="By kind", title_justify="left")
    for column in ("", "s", "HBM s", "HBM GB", "operations"):
        kinds.add_column(column, justify="right" if column else "left")
    for name, kind in result["kinds"].items():
        kinds.add_row(name, *_where_figures(kind))
    console.print(kinds)
    for kind, lines in result["lines"].items():
        table = Table(title=f"{kind[0].upper()}{kind[1:]} by line", title_justify="left")
        for column in ("line", "s", "HBM s", "HBM GB", "operations", "the dearest one's result"):
            table.add_column(column, justify="left" if column[0] in "lt" else "right")
        for line in lines:
            table.add_row(escape(line["line"]), *_where_figures(line), escape(_short(line["largest"])))
        console.print(table)
    console.print(
        "s: the compiler's static estimates of its operations, and kernels as a plan has them, without its factor; "
        "HBM s: their bytes at the memory's full rate.",
        soft_wrap=True,
    )


def _where_figures(part: dict[str, Any]) -> list[str]:
    known = (f"{part['seconds']:.4f}",)
    if "hbm_seconds" not in part:
        return [*known, "", "", ""]
    return [*known, f"{part['hbm_seconds']:.4f}", f"{part['hbm_bytes'] / 1e9:.2f}", f"{part['operations']:,.0f}"]


def _short(type_text: str) -> str:
    """A type without its layout, the first of several."""
    return re.sub(r"\{.*?\}", "", type_text.lstrip("(")).split(" ")[0].rstrip(",")
