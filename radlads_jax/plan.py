"""Compiles every stage's training step for a pod that is not there: does it fit, how long, and for how much.

python -m radlads_jax.plan --config configs/qwen2_5_72b_rad_rwkv6.py --topology v5p:4x4x8 [--json] [--price v5p=2.1]
    [--results plans.jsonl]
python -m radlads_jax.plan --config FILE --topology v6e:2x4 --where stage2

--topology auto takes, of every chip, each stage's smallest slice on which it fits (a run continues on any other), and
ranks the chips by cost. GPUs (h100:8, a100:16) are planned by arithmetic alone.
"""

import json
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from radlads_jax import config as config_lib
from radlads_jax.planning.display import show, show_ranking, show_where
from radlads_jax.planning.planner import make_planner, prepare_environment
from radlads_jax.system import command, storage, terminal


def define_flags(values: flags.FlagValues) -> None:
    """The command line, but for --config."""
    put: Any = {"flag_values": values}
    topologies = "Chips and their torus, e.g. v5e:2x2, v5p:4x4x8, v6e:8x8, h100:8; or auto."
    flags.DEFINE_string("topology", None, topologies, **put)
    flags.DEFINE_string("where", None, "A stage: print where its step's time goes, in the place of a plan.", **put)
    flags.DEFINE_bool("json", False, "Print JSON in the place of tables.", **put)
    flags.DEFINE_multi_string("price", [], "USD a chip-hour, e.g. v5p=2.1; may be repeated.", **put)
    kept = "A file that keeps what was compiled, so that it is not compiled again."
    flags.DEFINE_string("results", None, kept, **put)


def main(values: flags.FlagValues) -> None:
    """Prints the plan, whether or not it fits. Raises ValueError for settings that are wrong."""
    if values.config is None or values.topology is None:
        raise ValueError(
            "expected --config FILE and --topology CHIPS, e.g. --config configs/qwen2_5_7b_rad_rwkv7.py "
            "--topology v5e:4x8."
        )
    run = config_lib.validate(values.config)
    overrides = _parse_prices(values.price)
    prepare_environment()
    planner = make_planner(run, overrides, _results_file(values.results))
    if (kept := run.student.attention_layers) and isinstance(kept[0], str):
        note = f"The run chooses its softmax layers ({kept[0]}); planned with as many, evenly spaced."
        Console(stderr=True).print(note, markup=False, soft_wrap=True)
    automatic = values.topology == "auto"
    if values.where is not None:
        if automatic or values.where not in run.stages:
            raise ValueError(
                f"got --where={values.where} with --topology={values.topology}; expected one of config.stages "
                f"{', '.join(run.stages)}, and one topology, as v6e:2x4."
            )
        if values.price or values.results is not None:
            raise ValueError(
                "got --where with --price or --results; expected neither, for it prices nothing, and no results "
                "hold the program that it reads. Leave them out."
            )
        result: Any = planner.where(values.topology, values.where)
    else:
        result = planner.auto() if automatic else planner.topology(values.topology)
    if values.json:
        print(json.dumps(result, indent=2))
    elif values.where is not None:
        show_where(result, terminal.tables())
    elif automatic:
        show_ranking(result, planner.prices, terminal.tables())
    else:
        show(result, terminal.tables())


def _results_file(name: str | None) -> Path | None:
    if not name:
        return None
    file = storage.as_path(name)
    if not isinstance(file, Path):
        raise ValueError(f"--results is {name}; expected a file on this disk, which can be added to.")
    try:
        # Before minutes of compilation, not after them.
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        raise ValueError(f"--results is {name}, which can not be written ({error}). Choose another.") from error
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
    command.run(define_flags, main, config="The run's own, e.g. configs/qwen2_5_7b_rad_rwkv7.py.")
