"""Scores of a student beside its teacher: lm-eval's tasks, the paper's suite among them, and long-context probes.

python -m radlads_jax.evaluate --model DIR [--teacher DIR [--control]] [--tasks radlads|recall|name,...|file.yaml]
                               [--limit N] [--apply_chat_template]
                               [--probes [--probe_kinds passkey,...]] [--completions N]

Writes evaluation.json and evaluation.md into --output or else beside the model; a run's report draws the probes. What
is found before something fails is in evaluation.partial.json there, and what an earlier evaluation has that this one
lacks in evaluation-N.json.
"""

import dataclasses
import logging
from typing import Any

from absl import flags

from radlads_jax.decoding.loaded import DTYPES
from radlads_jax.evaluation.model_scores import (
    check_models,
    check_settings,
    completion_sizes,
    evaluate_models,
    keep_earlier,
    output_directory,
    tokens_read,
    wants_probes,
)
from radlads_jax.evaluation.probe_scores import DEFAULT_SAMPLES
from radlads_jax.evaluation.probes import DEFAULT_LENGTHS, PROBES
from radlads_jax.evaluation.table import as_markdown
from radlads_jax.evaluation.task_checks import check_tasks
from radlads_jax.evaluation.task_code import check_task_code
from radlads_jax.evaluation.tasks import SUITE_NAME, compare, expand_tasks, load_tasks
from radlads_jax.system import backend, command, storage
from radlads_jax.system.json_files import write_json


def define_flags(values: flags.FlagValues) -> None:
    """The command line."""
    put: Any = {"flag_values": values}
    flags.DEFINE_string("model", None, "The student's directory, its run's, or a hub id.", **put)
    flags.DEFINE_string("teacher", None, "The teacher's.", **put)
    control = "Beside them the untrained control: the teacher with 4 sinks and 64 keys where the student is converted."
    flags.DEFINE_boolean("control", False, control, **put)
    suites = "radlads: the paper's suite; recall: the probes with an answer."
    flags.DEFINE_list("tasks", [], f"lm-eval tasks and task files; {suites}", **put)
    flags.DEFINE_bool("trust_task_code", False, "Let task files run the Python code that they name.", **put)
    flags.DEFINE_float("limit", None, "Documents of every task; below 1: their share.", **put)
    flags.DEFINE_integer(
        "num_fewshot", None, "Examples in the prompt. Default: each task's own, mostly none.", lower_bound=0, **put
    )
    templates = "The tasks' prompts are what each model's own chat template makes of them."
    flags.DEFINE_bool("apply_chat_template", False, templates, **put)
    flags.DEFINE_boolean("probes", False, "Run the long-context probes, and the loss by position.", **put)
    flags.DEFINE_list("probe_lengths", [str(n) for n in DEFAULT_LENGTHS], "Their contexts, in tokens.", **put)
    kinds = "Those of them with an answer that are asked, out of all."
    flags.DEFINE_list("probe_kinds", [*PROBES], kinds, **put)
    samples = "How many of each probe and length up to 4096; fewer of longer ones, at least 8 of them."
    flags.DEFINE_integer("probe_samples", DEFAULT_SAMPLES, samples, **put)
    text = "A text file for the loss by position and for --completions. Default: made-up tales."
    flags.DEFINE_string("probe_text", None, text, **put)
    compared = "KL to the teacher on what it says after so many prompts, and on the text itself."
    flags.DEFINE_integer("completions", 0, compared, lower_bound=0, **put)
    flags.DEFINE_float("completion_temperature", 0.0, "What it says is drawn at; 0: its likeliest tokens.", **put)
    flags.DEFINE_integer("seed", 0, "Of the probes and completions.", lower_bound=0, **put)
    flags.DEFINE_integer("batch_size", 8, "Rows that are read at once.", **put)
    flags.DEFINE_string("output", None, "Where the results go. Default: the --model's directory.", **put)
    flags.DEFINE_enum("dtype", None, DTYPES, "Default: bfloat16, on a CPU float32.", **put)


def main(values: flags.FlagValues) -> None:
    """Raises ValueError for settings that are wrong or contradict each other."""
    if values.model is None:
        raise ValueError("expected --model DIR, the directory of a student or of its run.")
    if not (values.tasks or values.probes or values.completions):
        raise ValueError(f"expected --tasks, e.g. --tasks={SUITE_NAME}, --probes or --completions.")
    wrong = [n for n in values.probe_lengths if not n.isdigit() or int(n) < 1]
    if wrong or not values.probe_lengths:
        said = ", ".join(wrong) or "none"
        raise ValueError(f"--probe_lengths has {said}; expected numbers of tokens, e.g. 512,4096.")
    unknown = [kind for kind in values.probe_kinds if kind not in PROBES]
    if unknown or not values.probe_kinds:
        raise ValueError(f"--probe_kinds has {', '.join(unknown) or 'none'}; expected some of {', '.join(PROBES)}.")
    check_settings(values)
    for name in ("batch_size", "probe_samples"):
        if getattr(values, name) < 1:
            raise ValueError(f"{name} is {getattr(values, name)}; expected at least 1. Change --{name}.")
    if values.limit is not None and not (0 < values.limit < 1 or (values.limit >= 1 and values.limit % 1 == 0)):
        raise ValueError(f"--limit is {values.limit:g}; expected a number of documents, or a share of them below 1.")
    if values.control and values.teacher is None:
        raise ValueError("--control is made of the teacher's weights; expected --teacher DIR beside it.")
    if values.completions and values.teacher is None:
        raise ValueError("--completions are the teacher's own; expected --teacher DIR beside it.")
    directory = output_directory(values.model, values.output)
    partial = directory / "evaluation.partial.json"
    if not values.trust_task_code:
        check_task_code(expand_tasks(values.tasks))
    check_models(values)
    names = expand_tasks(values.tasks)
    tasks = load_tasks(names) if names else {}
    if tasks:
        check_tasks(tasks, values.num_fewshot, tokens_read(values), chat_template=values.apply_chat_template)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    with backend.room_for("the models do", "Lower --batch_size."):
        by_role = evaluate_models(tasks, values, partial)
    cfg, scores = by_role["student"].cfg, by_role["student"].scores
    result = {"model": values.model, "teacher": values.teacher, "limit": values.limit, "dtype": cfg.dtype}
    result |= {"seed": values.seed, "probe_text": values.probe_text}
    result |= {"chat_template": True} if values.apply_chat_template else {}
    teacher, control = (by_role[role].scores if role in by_role else None for role in ("teacher", "control"))
    result |= compare(cfg, scores, teacher, control, chat_template=values.apply_chat_template)
    if "control" in by_role:
        result["control"] = dataclasses.asdict(by_role["control"].cfg.mixer)
    if wants_probes(values):
        result["probes"] = {role: measured.probes for role, measured in by_role.items()}
    if values.completions:
        kl = {role: measured.kl for role, measured in by_role.items() if measured.kl}
        result["kl"] = {"sizes": dataclasses.asdict(completion_sizes(values)), "models": kl}
    page = as_markdown(result)
    keep_earlier(directory, result)
    write_json(directory / "evaluation.json", result)
    storage.write_text(directory / "evaluation.md", page)
    partial.unlink(missing_ok=True)
    print(page)


if __name__ == "__main__":
    command.run(define_flags, main)
