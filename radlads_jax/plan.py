"""Compiles every stage's training step for a pod that is not there: does it fit, how long, and for how much.

python -m radlads_jax.plan --config configs/qwen2_5_72b_rad_rwkv6.py --topology v5p:4x4x8 [--json] [--price v5p=2.1]
    [--results plans.jsonl]
python -m radlads_jax.plan --config FILE --topology v6e:2x4 --where stage2

--topology auto takes, of every chip, each stage's smallest slice on which it fits (a run continues on any other), and
ranks the chips by cost. GPUs (h100:8, a100:16) are planned by arithmetic alone.
"""

import json
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.planning.display import show, show_ranking, show_where
from radlads_jax.planning.planner import make_planner, prepare_environment
from radlads_jax.system import storage, terminal
from radlads_jax.system.command import parse_flags, refusals, refuse

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips and their torus, e.g. v5e:2x2, v5p:4x4x8, v6e:8x8, h100:8; or auto."
)
_WHERE = flags.DEFINE_string("where", None, "A stage: print where its step's time goes, in the place of a plan.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON in the place of tables.")
_PRICE = flags.DEFINE_multi_string("price", [], "USD a chip-hour, e.g. v5p=2.1; may be repeated.")
_RESULTS = flags.DEFINE_string(
    "results", None, "A file that keeps what was compiled, so that it is not compiled again."
)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 planned (whether or not it fits), 1 refused."""
    try:
        config = flags.FLAGS["config"].value
        if len(argv) > 1 or config is None or _TOPOLOGY.value is None:
            raise ValueError(
                "expected --config FILE and --topology CHIPS alone, e.g. --config configs/qwen2_5_7b_rad_rwkv7.py "
                "--topology v5e:4x8."
            )
        run = config_lib.validate(config)
        overrides = _parse_prices(_PRICE.value)
        prepare_environment()
        planner = make_planner(run, overrides, _results_file())
        if (kept := run.student.attention_layers) and isinstance(kept[0], str):
            note = f"The run chooses its softmax layers ({kept[0]}); planned with as many, evenly spaced."
            Console(stderr=True).print(note, markup=False, soft_wrap=True)
        automatic = _TOPOLOGY.value == "auto"
        if _WHERE.value is not None:
            if automatic or _WHERE.value not in run.stages:
                raise ValueError(
                    f"got --where={_WHERE.value} with --topology={_TOPOLOGY.value}; expected one of config.stages "
                    f"{', '.join(run.stages)}, and one topology, as v6e:2x4."
                )
            if _PRICE.value or _RESULTS.value is not None:
                raise ValueError(
                    "got --where with --price or --results; expected neither, for it prices nothing, and no results "
                    "hold the program that it reads. Leave them out."
                )
            result: Any = planner.where(_TOPOLOGY.value, _WHERE.value)
        else:
            result = planner.auto() if automatic else planner.topology(_TOPOLOGY.value)
    except refusals() as error:
        return refuse(error)
    if _JSON.value:
        print(json.dumps(result, indent=2))
    elif _WHERE.value is not None:
        show_where(result, terminal.tables())
    elif automatic:
        show_ranking(result, planner.prices, terminal.tables())
    else:
        show(result, terminal.tables())
    return 0


def _results_file() -> Path | None:
    if not _RESULTS.value:
        return None
    file = storage.as_path(_RESULTS.value)
    if not isinstance(file, Path):
        raise ValueError(f"--results is {_RESULTS.value}; expected a file on this disk, which can be added to.")
    try:
        # Before minutes of compilation, not after them.
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ValueError(
            f"--results is {_RESULTS.value}, which can not be written ({error}). Choose another."
        ) from error
    return file


def _parse_prices(texts: list[str]) -> dict[str, float]:
    prices = {}
    for text in texts:
        name, _, price = text.partition("=")
        try:
            prices[name] = float(price)
        except ValueError as error:
            raise ValueError(f"--price is {text!r}; expected a chip and USD an hour, e.g. v5p=2.1.") from error
    return prices


if __name__ == "__main__":
    # Defined here: another module of this process may have a flag of that name.
    config_flags.DEFINE_config_file("config", None, "The run's own, e.g. configs/qwen2_5_7b_rad_rwkv7.py.")
    app.run(lambda argv: sys.exit(main(argv)), flags_parser=parse_flags)
