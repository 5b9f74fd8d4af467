"""The page of plans: every run's smallest slices, as Markdown, from what was compiled before.

python -m radlads_jax.planning.table --results configs/plans.jsonl configs/qwen2_5_7b_rad_rwkv7.py ... > PLANS.md
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from radlads_jax import config as config_lib
from radlads_jax.plan import make_planner, prepare_environment

STAGES = ("stage1", "stage2", "stage2a", "stage3")
CHIPS = ("v5e", "v5p", "v6e")
SHORT, LONG = ("stage1", "stage2", "stage3"), ("stage1", "stage2a")


def read_config(path: Path) -> config_lib.RunConfig:
    """A config file's run with all four stages, so that one plan has both recipes."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("")
    config.stages = STAGES
    return config_lib.validate(config)


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """The rows of one run on one chip, as `Planner.smallest` found it."""
    planned = found["all"]
    if planned is None:
        return [f"| {name} | {found['chip']} | none of the usual slices | | | | | |"]
    stages = {stage["name"]: stage for stage in planned["stages"]}
    cells = [
        f"{s['peak_bytes'] / 2**30:.1f} GiB, {s['chip_hours']:.1f}, {s['bound']}" for s in (stages[n] for n in STAGES)
    ]
    bills = ["{:,.0f}".format(sum(stages[n]["usd"] for n in names)) for names in (SHORT, LONG)]
    return [f"| {name} | {planned['topology']} ({planned['chips']}) | {' | '.join(cells)} | {bills[0]} | {bills[1]} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    prepare_environment()
    print("| conversion | slice (chips) | stage 1 | stage 2 | stage 2a | stage 3 | USD 1+2+3 | USD 1+2a |")
    print("|---|---|---|---|---|---|---|---|")
    for path in args.configs:
        planner = make_planner(read_config(path), {}, args.results)
        for chip in CHIPS:
            print("\n".join(lines(path.stem, planner.smallest(chip))))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
