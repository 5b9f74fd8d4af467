"""Scores of a student beside its teacher: lm-eval's tasks, the paper's suite among them, and long-context probes.

python -m radlads_jax.evaluate --model DIR [--teacher DIR] [--tasks radlads|name,...|file.yaml] [--limit N] [--probes]

Writes evaluation.json and evaluation.md into --output or else beside the model; a run's report draws the probes.
"""

import json
import logging
from typing import Any

from absl import flags

from radlads_jax.decoding.loaded import DTYPES
from radlads_jax.evaluation.model_scores import evaluate_model, output_directory
from radlads_jax.evaluation.probes import DEFAULT_LENGTHS
from radlads_jax.evaluation.table import as_markdown
from radlads_jax.evaluation.task_code import check_task_code
from radlads_jax.evaluation.tasks import SUITE_NAME, compare, expand_tasks, load_tasks
from radlads_jax.system import command, storage


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    put: Any = {"flag_values": values}
    flags.DEFINE_string("model", None, "The student's directory, its run's, or a hub id.", **put)
    flags.DEFINE_string("teacher", None, "The teacher's.", **put)
    flags.DEFINE_list("tasks", [], "lm-eval tasks and task files; radlads: the paper's suite.", **put)
    flags.DEFINE_bool("trust_task_code", False, "Let task files run the Python code that they name.", **put)
    flags.DEFINE_float("limit", None, "Documents of every task; below 1: their share.", **put)
    flags.DEFINE_integer(
        "num_fewshot", None, "Examples in the prompt. Default: each task's own, mostly none.", lower_bound=0, **put
    )
    flags.DEFINE_boolean("probes", False, "Run the long-context probes.", **put)
    flags.DEFINE_list("probe_lengths", [str(n) for n in DEFAULT_LENGTHS], "Their contexts, in tokens.", **put)
    flags.DEFINE_integer("probe_samples", 4, "How many of each probe and length.", **put)
    flags.DEFINE_string("probe_text", None, "A text file for the loss by position. Default: made-up tales.", **put)
    flags.DEFINE_integer("seed", 0, "Of the probes.", lower_bound=0, **put)
    flags.DEFINE_integer("batch_size", 8, "Rows that are read at once.", **put)
    flags.DEFINE_string("output", None, "Where the results go. Default: the --model's directory.", **put)
    flags.DEFINE_enum("dtype", None, DTYPES, "Default: bfloat16, on a CPU float32.", **put)


def main(values: flags.FlagValues) -> None:
    """Raises ValueError for settings that are wrong or contradict each other."""
    if values.model is None:
        raise ValueError("expected --model DIR, the directory of a student or of its run.")
    if not (values.tasks or values.probes):
        raise ValueError(f"expected --tasks, e.g. --tasks={SUITE_NAME}, or --probes.")
    wrong = [n for n in values.probe_lengths if not n.isdigit() or int(n) < 1]
    if wrong:
        raise ValueError(f"--probe_lengths has {', '.join(wrong)}; expected numbers of tokens, e.g. 512,4096.")
    for name in ("batch_size", "probe_samples"):
        if getattr(values, name) < 1:
            raise ValueError(f"{name} is {getattr(values, name)}; expected at least 1. Change --{name}.")
    directory = output_directory(values.model, values.output)
    if not values.trust_task_code:
        check_task_code(expand_tasks(values.tasks))
    tasks = load_tasks(expand_tasks(values.tasks)) if values.tasks else {}
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    models = {"teacher": values.teacher, "student": values.model}
    found = {role: evaluate_model(role, path, tasks, values) for role, path in models.items() if path is not None}
    cfg, scores, _ = found["student"]
    result = {"model": values.model, "teacher": values.teacher, "limit": values.limit, "dtype": cfg.dtype}
    result |= compare(cfg, scores, found["teacher"][1] if "teacher" in found else None)
    if values.probes:
        result["probes"] = {role: probes for role, (_, _, probes) in found.items()}
    page = as_markdown(result)
    storage.write_text(directory / "evaluation.json", json.dumps(result, indent=2) + "\n")
    storage.write_text(directory / "evaluation.md", page)
    print(page)


if __name__ == "__main__":
    command.run(define_flags, main)
