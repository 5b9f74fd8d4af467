"""The page of plans: every run's smallest slices as Markdown; what --results has is not compiled again.

python -m radlads_jax.planning.table --results configs/plans.jsonl configs/qwen2_5_7b_rad_rwkv7.py ... > PLANS.md
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from radlads_jax import config as config_lib
from radlads_jax.plan import make_planner, prepare_environment

CHIPS = ("v6e", "v5p", "v5e")
STAGES = ("stage1", "stage2", "stage2a", "stage3")
SHORT, LONG = ("stage1", "stage2", "stage3"), ("stage1", "stage2a")
PER_SLICE = (
    ("conversion", "slice (chips)", *STAGES, "USD 1, 2, 3", "USD 1, 2a"),
    "The smallest slice on which all stages fit: peak GiB of a device, chip-hours and what bounds the step.",
)
PER_STAGE = (("conversion", *STAGES), "Every stage on its own smallest slice: the slice and USD.")


def read_config(path: Path) -> config_lib.RunConfig:
    """A config file's run with all four stages, so that one plan has both recipes."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("")
    config.stages = STAGES
    return config_lib.validate(config)


def slice_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One run on one chip's slice for all stages, from `Planner.smallest`."""
    planned = found["all"]
    if planned is None:
        return (name, f"{found['chip']}: none", *[""] * (len(PER_SLICE[0]) - 2))
    stages = {stage["name"]: stage for stage in planned["stages"]}
    cells = [f"{s['peak_bytes'] / 2**30:.1f}, {s['chip_hours']:,.1f}, {s['bound']}" for s in stages.values()]
    bills = [f"{sum(stages[stage]['usd'] for stage in names):,.0f}" for names in (SHORT, LONG)]
    return (name, f"{planned['topology']} ({planned['chips']})", *cells, *bills)


def stage_row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One run on every stage's own slice of one chip, from `Planner.smallest`."""
    each = found["each"]
    return (name, *[f"{each[s]['topology']}, {each[s]['usd']:,.0f}" if s in each else "none" for s in STAGES])


def markdown(columns: tuple[str, ...], title: str, rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    prepare_environment()
    planners = {path.stem: make_planner(read_config(path), {}, args.results) for path in args.configs}
    # The chips outermost: what is compiled first is the cheapest.
    found = [(name, planner.smallest(chip)) for chip in CHIPS for name, planner in planners.items()]
    found.sort(key=lambda one: list(planners).index(one[0]))
    print(markdown(*PER_SLICE, [slice_row(*one) for one in found]))
    print()
    print(markdown(*PER_STAGE, [stage_row(*one) for one in found]))


if __name__ == "__main__":
    main()
