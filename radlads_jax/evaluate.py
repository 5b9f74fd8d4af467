"""Scores of a student beside its teacher: lm-eval's tasks, the paper's suite among them, and long-context probes.

python -m radlads_jax.evaluate --model DIR [--teacher DIR] [--tasks radlads|name,...|file.yaml] [--limit N] [--probes]

Writes evaluation.json and evaluation.md, and probes.png, into --output or else beside the model.
"""

import importlib.util
import json
import logging
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console

from radlads_jax.decoding.loaded import DTYPES, Model, load_model
from radlads_jax.evaluation.paper import SUITE, published_scores, relative_score
from radlads_jax.evaluation.probes import DEFAULT_LENGTHS, draw_probes, run_probes
from radlads_jax.evaluation.task_code import check_task_code
from radlads_jax.models import ModelConfig
from radlads_jax.system import command, storage

console = Console(stderr=True, highlight=False)

SUITE_NAME = "radlads"
# A task's score is the first of these that it has.
METRICS = ("acc", "exact_match", "pass@1", "f1", "acc_norm")


def expand_tasks(tasks: Sequence[str]) -> list[str]:
    """Task names and yaml files, with the paper's tasks in the place of their suite's name."""
    names: list[str] = []
    for task in tasks:
        names += SUITE if task == SUITE_NAME else [task]
    return list(dict.fromkeys(names))


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks by name, with their data.

    Raises ValueError naming all that are unknown or whose data cannot be had, and where lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks needs lm-eval, which is not installed; expected the extra `eval`. Install it with pip install "
            "'radlads-jax[eval]', or leave --tasks out and run --probes alone."
        )
    from lm_eval.tasks import TaskManager

    groups = {name: group for name in names if (group := _group_of(name))}
    manager = TaskManager(
        include_path=[str(Path(name).parent) for name in groups],
        # lm-eval reads thousands of files to know its own tasks.
        include_defaults=not all(Path(name).is_file() for name in names),
    )
    loaded, problems = {}, []
    for name in names:
        try:
            loaded[name] = manager.load([groups.get(name, name)])
        except KeyError as error:
            problems.append(f"{name} is no task that lm-eval knows and no yaml file ({_first_line(error)})")
        # datasets and huggingface_hub raise OSErrors where they cannot reach the hub or a file, ValueErrors for what
        # they cannot read.
        except (OSError, ValueError) as error:
            problems.append(f"the data of {name} cannot be had ({_first_line(error)})")
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}; expected tasks whose data is on this machine or can be downloaded. Check the "
            "network, or give a yaml file whose dataset_kwargs.data_files name local files."
        )
    return loaded


def _group_of(name: str) -> str | None:
    """The group that a yaml file describes, whose tasks are files beside it; None for a task."""
    text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else ""
    found = re.search(r"^group:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def run_tasks(
    model: Model,
    tasks: dict[str, Any],
    *,
    batch_size: int = 8,
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {"metric", "score", "stderr", "chance", "documents", "metrics": {name: value}}} of one model.

    tasks: as `load_tasks` gives them; a group such as mmlu has one entry. limit: documents of every task, below 1 their
    share. chance: the score of answers drawn by lot, None where there is none, as for perplexities.
    """
    results: dict[str, dict[str, Any]] = {}
    if not tasks:
        return results
    import lm_eval
    from lm_eval.tasks import TaskManager

    from radlads_jax.evaluation.adapter import RadladsLM

    adapter, manager = RadladsLM(model, batch_size=batch_size), TaskManager(include_defaults=False)
    for loaded in tasks.values():
        wanted = list(loaded.get("groups", {}).values()) or list(loaded["tasks"].values())
        # Without bootstraps, which start processes: the errors of means are computed here.
        found = lm_eval.simple_evaluate(
            adapter, tasks=wanted, limit=limit, num_fewshot=num_fewshot, bootstrap_iters=0, task_manager=manager
        )
        for task, scores in _topmost(found).items():
            results[task] = _summary(task, scores, found)
            console.print(f"{model.directory.name}: {task} {results[task]['metric']} {_shown(results[task]['score'])}")
    return results


def _topmost(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of the groups that are part of no other group; of the tasks, where no group has scores."""
    if not found.get("groups"):
        return {task: scores for task, scores in found["results"].items() if task in found["samples"]}
    parts = {part for parts in found["group_subtasks"].values() for part in parts}
    return {group: scores for group, scores in found["groups"].items() if group not in parts}


def _leaves(found: dict[str, Any], task: str) -> list[str]:
    """The tasks that a group is made of, through groups of groups; the task itself where it is none."""
    parts = found.get("group_subtasks", {}).get(task)
    return [leaf for part in parts for leaf in _leaves(found, part)] if parts else [task]


def _summary(task: str, scores: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    # Keys are "metric,filter".
    metrics = {key.split(",")[0]: value for key, value in scores.items() if isinstance(value, int | float)}
    metrics = {key: value for key, value in metrics.items() if key != "sample_len" and not key.endswith("_stderr")}
    metric = SUITE[task].metric if task in SUITE else next((m for m in METRICS if m in metrics), None)
    metric = metric if metric in metrics else next(iter(metrics), "")
    samples = {leaf: found["samples"][leaf] for leaf in _leaves(found, task)}
    single = [sample.get(metric) for leaf in samples.values() for sample in leaf]
    chance = SUITE[task].chance if task in SUITE else _chance(found, samples) if metric in METRICS else None
    return {
        "metric": metric,
        "score": metrics.get(metric),
        "stderr": _standard_error(single) if metric in METRICS else None,
        "chance": chance,
        "documents": len(single),
        "metrics": metrics,
    }


def _standard_error(scores: list[Any]) -> float | None:
    """Of a mean over documents; None where it is none."""
    if len(scores) < 2 or not all(isinstance(score, int | float) for score in scores):
        return None
    return statistics.stdev(map(float, scores)) / len(scores) ** 0.5


def _chance(found: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """The mean over documents of one in the number of their choices; 0 for tasks without choices."""
    shares: list[float] = []
    for task, documents in samples.items():
        is_choice = found["configs"][task].get("output_type") == "multiple_choice"
        shares += [1 / len(document["filtered_resps"]) if is_choice else 0.0 for document in documents]
    return sum(shares) / len(shares) if shares else None


def compare(cfg: ModelConfig, student: dict[str, Any], teacher: dict[str, Any] | None) -> dict[str, Any]:
    """{"tasks": {task: {"metric", "chance", "student", "teacher", "relative", "published"}}, "mean_relative", ...}.

    relative: (student - chance) / (teacher - chance); published: the paper's scores of its student of this shape.
    """
    name, published = published_scores(cfg) or (None, {})
    tasks = {}
    for task, result in student.items():
        line = {"metric": result["metric"], "chance": result["chance"], "student": result}
        other = (teacher or {}).get(task)
        if other is not None:
            line["teacher"] = other
            known = None not in (result["score"], other["score"], result["chance"])
            line["relative"] = relative_score(result["score"], other["score"], result["chance"]) if known else None
        if task in published:
            scores = published[task]
            relative = relative_score(scores["student"], scores["teacher"], SUITE[task].chance)
            line["published"] = scores | {"relative": relative}
        tasks[task] = line
    relatives = [line["relative"] for line in tasks.values() if line.get("relative") is not None]
    mean = sum(relatives) / len(relatives) if relatives else None
    return {"tasks": tasks, "mean_relative": mean, "published_model": name}


def as_markdown(result: dict[str, Any]) -> str:
    """The evaluation as a page with a table, scores in percent."""
    lines = ["# Evaluation", "", f"Student: {result['model']}"]
    if result.get("teacher"):
        lines += ["", f"Teacher: {result['teacher']}"]
    if result.get("limit"):
        lines += ["", f"The first {result['limit']:g} documents of every task."]
    if result.get("tasks"):
        lines += ["", *_task_table(result)]
    if result.get("probes"):
        lines += ["", "## Long-context probes", "", "![probes](probes.png)", "", *_probe_table(result["probes"])]
    return "\n".join(lines) + "\n"


def _task_table(result: dict[str, Any]) -> list[str]:
    published = result.get("published_model")
    head = ["task", "metric", "documents", "chance", "teacher", "student", "relative"]
    head += [f"{published}'s teacher", published, "relative"] if published else []
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for task, line in result["tasks"].items():
        row = [task, str(line["metric"]), str(line["student"]["documents"]), _shown(line["chance"])]
        row += [_with_error(line.get("teacher")), _with_error(line["student"]), _shown(line.get("relative"))]
        if published:
            row += [_shown(line.get("published", {}).get(key)) for key in ("teacher", "student", "relative")]
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if result.get("mean_relative") is not None:
        lines += ["", f"Mean relative score: {_shown(result['mean_relative'])}"]
    note = "Relative is (student - chance) / (teacher - chance). Scores in percent, with standard errors."
    return [*lines, "", note]


def _probe_table(probes: dict[str, Any]) -> list[str]:
    lines = []
    for name, found in next(iter(probes.values())).items():
        (places, values) = found
        rows = [[f"{name}: {values}", *(f"{place:,.0f}" for place in found[places])]]
        rows.append(["---", *["---:"] * len(found[places])])
        shown = _shown if values == "accuracy" else "{:.3f}".format
        rows += [[model, *map(shown, results[name][values])] for model, results in probes.items()]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return lines[:-1]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _with_error(result: dict[str, Any] | None) -> str:
    if result is None or result["score"] is None:
        return ""
    if result["metric"] not in METRICS:
        return f"{result['score']:.4g}"
    error = result["stderr"]
    return _shown(result["score"]) + (f" ± {_shown(error)}" if isinstance(error, float) else "")


def output_directory(model: str, given: str | None) -> storage.AnyPath:
    """--output, else the run's or the model's own directory. Raises ValueError for a model of the hub."""
    if given is None and not storage.as_path(model).is_dir():
        raise ValueError(f"{model} is a model of the hub, beside which nothing can be written; expected --output DIR.")
    directory = storage.as_path(given or model)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


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
        check_task_code(values.tasks)
    tasks = load_tasks(expand_tasks(values.tasks)) if values.tasks else {}
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    models = {"teacher": values.teacher, "student": values.model}
    found = {role: evaluate_model(role, path, tasks, values) for role, path in models.items() if path is not None}
    cfg, scores, _ = found["student"]
    result = {"model": values.model, "teacher": values.teacher, "limit": values.limit, "dtype": cfg.dtype}
    result |= compare(cfg, scores, found["teacher"][1] if "teacher" in found else None)
    if values.probes:
        result["probes"] = {role: probes for role, (_, _, probes) in found.items()}
        draw_probes(result["probes"], directory / "probes.png")
    page = as_markdown(result)
    storage.write_text(directory / "evaluation.json", json.dumps(result, indent=2) + "\n")
    storage.write_text(directory / "evaluation.md", page)
    print(page)


def evaluate_model(
    role: str, path: str, tasks: dict[str, Any], values: flags.FlagValues
) -> tuple[ModelConfig, dict[str, Any], dict[str, Any]]:
    """The model's config, its scores in the tasks and its probes; the model leaves memory before the next one comes."""
    model = load_model(path, dtype=values.dtype)
    scores = run_tasks(model, tasks, batch_size=values.batch_size, limit=values.limit, num_fewshot=values.num_fewshot)
    probes: dict[str, Any] = {}
    if values.probes:
        probes = run_probes(
            model,
            lengths=[int(n) for n in values.probe_lengths],
            samples=values.probe_samples,
            seed=values.seed,
            batch_size=values.batch_size,
            text_file=storage.as_path(values.probe_text) if values.probe_text else None,
            log=lambda line: console.print(f"{role}: {line}"),
        )
    return model.cfg, scores, probes


if __name__ == "__main__":
    command.run(define_flags, main)
