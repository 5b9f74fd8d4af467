"""The page of plans: every stage of every run on its smallest slices, as Markdown.

python -m radlads_jax.planning.table --results plans.jsonl configs/qwen2_5_{7,32,72}b_rad_rwkv{6,7}.py

Of a stage: the slice, the peak GiB of a device, a step's seconds, the share of the chips' peak, chip-hours and what
bounds the step. What --results has is not compiled again.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from radlads_jax import config as config_lib
from radlads_jax.planning.planner import make_planner, prepare_environment
from radlads_jax.planning.plans import totals
from radlads_jax.system import storage

_CHIPS = ("v6e", "v5p", "v5e")
_STAGES = ("stage1", "stage2", "stage2a", "stage3")
_RECIPES = (("stage1", "stage2", "stage3"), ("stage1", "stage2a"))
_COLUMNS = ("conversion", "chip", *_STAGES, *(f"USD {', '.join(s[5:] for s in recipe)}" for recipe in _RECIPES))


def _read_config(path: Path) -> config_lib.RunConfig:
    """A config file's run with all four stages, so that one plan has both recipes."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("")
    config.stages = _STAGES
    return config_lib.validate(config)


def _row(name: str, plan: dict[str, Any]) -> tuple[str, ...]:
    """One run on one chip, from `Planner.smallest`."""
    stages = {stage["name"]: stage for stage in plan["stages"]}
    bills = [_bill(totals([stages[stage] for stage in recipe])) for recipe in _RECIPES]
    return (name, plan["chip"], *map(_cell, stages.values()), *bills)


def _bill(total: dict[str, Any]) -> str:
    return "" if total["usd"] is None else "{usd:,.0f} ({usd_low:,.0f} to {usd_high:,.0f})".format(**total)


def _cell(stage: dict[str, Any]) -> str:
    shape = stage["topology"].partition(":")[2]
    peak = f"{shape}: {stage['peak_bytes'] / 2**30:.1f}"
    if not stage["fits"]:
        return f"{peak}, does not fit"
    return f"{peak}, {stage['step_seconds']:.2f}, {stage['mfu']:.0%}, {stage['chip_hours']:,.0f}, {stage['bound']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=storage.as_path)
    parser.add_argument("--results", type=storage.as_path, required=True)
    args = parser.parse_args()
    prepare_environment()
    planners = {path.stem: make_planner(_read_config(path), {}, args.results) for path in args.configs}
    # The chips outermost: what is compiled first is the cheapest.
    rows = [_row(name, planner.smallest(chip)) for chip in _CHIPS for name, planner in planners.items()]
    rows.sort(key=lambda cells: list(planners).index(cells[0]))
    print("\n".join(f"| {' | '.join(line)} |" for line in (_COLUMNS, ("---",) * len(_COLUMNS), *rows)))


if __name__ == "__main__":
    main()
