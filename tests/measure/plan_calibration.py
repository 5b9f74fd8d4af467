"""Published step times of dense models on TPUs beside what a plan says of the same step; the factor of each chip.

    python tests/measure/plan_calibration.py --results FILE.jsonl [v6e ...]

The step is that of stage pretrain with softmax attention in every layer, whose activations are computed again (remat
full) where the published run may keep them on the host: so one may not fit here, and is timed all the same. Compiled
once each, in minutes (extra tpu); FILE keeps what was. Printed are seconds before a chip's factor, and of every chip
the geometric mean of published over planned with its range, for `step_factor` in radlads_jax/planning/chips.py.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from radlads_jax import config as config_lib
from radlads_jax.planning import cost, hlo
from radlads_jax.planning.chips import CHIPS, known_chip
from radlads_jax.planning.planner import make_planner, prepare_environment

_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes"
_MAXTEXT = "github.com/AI-Hypercomputer/maxtext"


@dataclasses.dataclass(frozen=True)
class Case:
    """A published run. rows: of seq_len tokens, of a chip. seconds: of a step."""

    name: str
    topology: str
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    rows: int
    seq_len: int
    seconds: float
    source: str
    tensor: int = 1
    remat: str = "full"

    def config(self, chips: int) -> config_lib.RunConfig:
        config = config_lib.defaults()
        config.stages, config.student.mixer, config.data.source = ("pretrain",), "attention", "synthetic"
        config.mesh.tensor = self.tensor
        config.teacher.scratch = {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": 128,
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": False,
        }
        stage = config.pretrain
        stage.seq_len, stage.batch_size, stage.remat = self.seq_len, self.rows * chips, self.remat
        return config_lib.validate(config)


# MaxText's scales of its own model: 16B and 32B are 2048 wide, 16 layers, 16 heads and 7168 of MLP, doubled in turns.
CASES = (
    Case("16B", "v5e:16x16", 32, 4096, 28672, 64, 64, 32000, 6, 2048, 10.3, f"{_MAXTEXT} configs/v5e/16b.sh, README"),
    Case(
        "32B", "v5p:4x4x4", 32, 8192, 28672, 64, 64, 32000, 6, 2048, 7.30, f"{_MAXTEXT} configs/v5p/32b.sh, README",
        tensor=4, remat="dots",
    ),
    Case(
        "Llama3.1-8B", "v6e:2x4", 32, 4096, 14336, 32, 8, 128256, 3, 8192, 3.443,
        f"{_RECIPES} training/trillium/Llama3.1-8B-MaxText/v6e-8",
    ),
    Case(
        "Llama2-70B", "v6e:16x16", 80, 8192, 28672, 64, 8, 32000, 2, 4096, 9.052,
        f"{_RECIPES} training/trillium/Llama2-70B-MaxText",
    ),
    Case(
        "Llama3.1-70B", "tpu7x:4x4x4", 80, 8192, 28672, 64, 8, 128256, 4, 8192, 12.20,
        f"{_RECIPES} training/ironwood",
    ),
)  # fmt: skip


def planned(case: Case, results: Path) -> tuple[float, dict[str, Any]]:
    """Seconds of the case's step without the chip's factor, whether or not it fits, and the plan's record of it."""
    chips = math.prod(int(size) for size in case.topology.partition(":")[2].split("x"))
    (stage,) = make_planner(case.config(chips), {}, results).topology(case.topology)["stages"]
    if stage["counts"] is None:
        raise RuntimeError(f"{case.name} on {case.topology} was not compiled: it needs {stage['peak_bytes']:,} bytes.")
    begun = [tuple(transfer) for transfer in stage["counts"]["begun"]]
    return cost.step_time(
        CHIPS[known_chip(case.topology)], hlo.Counts(**stage["counts"] | {"begun": begun})
    ).step, stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chips", nargs="*", help="the chips whose cases are wanted; all of them by default")
    parser.add_argument("--results", type=Path, required=True)
    args = parser.parse_args()
    prepare_environment()
    table = Table(title="A step, published and planned")
    for column in ("case", "topology", "published s", "planned s", "planned / published", "GiB", "source"):
        table.add_column(column)
    factors: dict[str, list[float]] = {}
    for case in CASES:
        chip = known_chip(case.topology)
        if args.chips and chip not in args.chips:
            continue
        seconds, stage = planned(case, args.results)
        factors.setdefault(chip, []).append(case.seconds / seconds)
        gib = f"{stage['peak_bytes'] / 2**30:.1f}{'' if stage['fits'] else ', does not fit'}"
        ratio = f"{seconds / case.seconds:.2f}"
        table.add_row(case.name, case.topology, f"{case.seconds}", f"{seconds:.2f}", ratio, gib, case.source)
    console = Console(width=200)
    console.print(table)
    for chip, each in factors.items():
        mean = math.exp(sum(map(math.log, each)) / len(each))
        console.print(f"{chip}: {mean:.2f}, {min(each):.2f} to {max(each):.2f}; in the plan {CHIPS[chip].step_factor}")


if __name__ == "__main__":
    main()
