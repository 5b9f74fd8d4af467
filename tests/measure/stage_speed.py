"""What finished runs say of their stages and of their student, as tables: tokens/s, memory, share of the peak, scores.

    python tests/measure/stage_speed.py WORKDIR [WORKDIR ...]

Share of the peak: the model's own FLOPs (radlads_jax/planning/cost.py) over what the chip of this machine does at best
in bfloat16; "-" where that is not known, as of a CPU.
"""

import argparse
import json
import pathlib
from typing import Any

from radlads_jax.planning.cost import model_flops
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hub import files_without_weights
from radlads_jax.run.metrics import mfu


def _row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def _share(workdir: pathlib.Path, settings: dict[str, Any], stage: dict[str, Any]) -> str:
    student = model_config_from_hf(read_config(workdir / "export"))
    teacher = model_config_from_hf(read_config(files_without_weights(settings["teacher"]["path"])))
    flops = model_flops(student, teacher, stage["name"], settings[stage["name"]]["seq_len"])
    share = mfu(stage["tokens_per_second"], flops)
    return "-" if share is None else f"{share:.1%}"


def print_runs(workdirs: list[pathlib.Path]) -> None:
    """Raises FileNotFoundError for a run that is not finished."""
    runs = {path: json.loads((path / "summary.json").read_text(encoding="utf-8")) for path in workdirs}
    _row("run", "stage", "tokens", "seconds", "tokens/s", "memory, GiB", "share of the peak", "loss, last")
    _row(*["---"] * 8)
    for path, summary in runs.items():
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for stage in summary["stages"]:
            timed = stage["tokens_per_second"] is not None
            speed = (f"{stage['tokens_per_second']:,.0f}", _share(path, settings, stage)) if timed else ("-", "-")
            memory = "-" if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 2**30:.2f}"
            loss = "-" if stage["last_loss"] is None else f"{stage['last_loss']:.4f}"
            _row(path.name, stage["name"], stage["tokens"], f"{stage['seconds']:.1f}", speed[0], memory, speed[1], loss)
    print()
    _row("run", "student's loss", "teacher's loss", "KL", "relative top-1")
    _row(*["---"] * 5)
    for path, summary in runs.items():
        student, teacher = summary["student"], summary.get("teacher", {})
        numbers = (student.get("loss"), teacher.get("loss"), student.get("kl"), summary.get("relative_top1"))
        _row(path.name, *("-" if n is None else f"{n:.4f}" for n in numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    print_runs(parser.parse_args().workdirs)


if __name__ == "__main__":
    main()
