"""lm-eval's tasks: by name, run with a model, and a student's scores beside its teacher's and the paper's."""

import difflib
import importlib.util
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from rich.console import Console

from radlads_jax.decoding.loaded import Model
from radlads_jax.evaluation import rotation
from radlads_jax.evaluation.intervals import Z
from radlads_jax.evaluation.paper import METRICS, SUITE, published_scores, relative_score, teacher_of
from radlads_jax.evaluation.table import shown
from radlads_jax.evaluation.task_code import close_templates
from radlads_jax.models import ModelConfig
from radlads_jax.system import storage
from radlads_jax.system.untrusted import brief

console = Console(stderr=True, highlight=False)

SUITE_NAME = "radlads"
# Of the probes with an answer, which are no tasks of lm-eval's.
RECALL_NAME = "recall"
# What a task's results say of it, whichever model they are of.
_OF_TASK = ("metric", "filter", "chance", "always", "num_fewshot")


def expand_tasks(tasks: Sequence[str]) -> list[str]:
    """Task names and yaml files, with the paper's tasks in the place of their suite's name; the probes' left out."""
    names: list[str] = []
    for task in (name for name in tasks if name != RECALL_NAME):
        file = storage.whole_name(task)
        names += SUITE if task == SUITE_NAME else [file if Path(file).is_file() else task]
    return list(dict.fromkeys(names))


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """lm-eval's tasks by name, with their data.

    Raises ValueError naming all that are unknown or whose data cannot be had, and where lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks needs lm-eval, which is not installed; expected the extra `eval`. Install it with pip install "
            "-e '.[eval]', or leave --tasks out and run --probes alone."
        )
    from lm_eval.tasks import TaskManager

    close_templates()
    groups = {name: group for name in names if (group := _group_of(name))}
    manager = TaskManager(
        include_path=[str(Path(name).parent) for name in groups],
        # lm-eval reads thousands of files to know its own tasks.
        include_defaults=not all(Path(name).is_file() for name in names),
    )
    _check_names([name for name in names if not Path(name).is_file()], manager)
    loaded, problems = {}, []
    for name in names:
        try:
            loaded[name] = manager.load([groups.get(name, name)])
        except KeyError as error:
            problems.append(f"{name} is no task that lm-eval knows ({_first_line(error)})")
        # A first document is shown to the templates as the task is loaded.
        except (ImportError, yaml.YAMLError, jinja2.TemplateError) as error:
            problems.append(f"{name} can not be read ({brief(error)})")
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


def _check_names(names: Sequence[str], manager: Any) -> None:
    """Raises ValueError for names of no task, before any data is asked for."""
    known = set(manager.all_tasks)
    if not (unknown := [name for name in names if name not in known]):
        return
    near = {name: difflib.get_close_matches(name, [*known, SUITE_NAME, RECALL_NAME], 3) for name in unknown}
    said = [f"{name} (did you mean {' or '.join(near[name])}?)" if near[name] else name for name in unknown]
    raise ValueError(
        f"--tasks has {', '.join(said)}; expected tasks of lm-eval, {SUITE_NAME}, {RECALL_NAME} or a yaml file. "
        "Correct the name."
    )


def _group_of(name: str) -> str | None:
    """The group that a yaml file describes, whose tasks are files beside it; None for a task."""
    text = Path(name).read_text(encoding="utf-8") if Path(name).is_file() else ""
    header = re.search(r"^group:\s*(\S+)", text, re.MULTILINE)
    return header[1] if header else None


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
    chat_template: bool = False,
    done: Callable[[dict[str, dict[str, Any]]], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {"metric", "filter", "score", "stderr", "chance", "always", "documents", "num_fewshot", "options",
    "metrics": {"metric,filter": value}}} of one model.

    tasks: as `load_tasks` gives them; a group such as mmlu has one entry. limit: documents of every task, below 1 their
    share. chat_template: prompts are what the model's own makes of them. done: is called with all results so far after
    each task. filter: where a task reads its answers in several ways, the first, of which all but metrics are. chance:
    the score of answers drawn by lot, always: of always the same option, None where there is none, as for perplexities.
    num_fewshot: the examples in the prompts, [5], of a group every number that its parts have. options: of a choice by
    letters, whether the model is stuck on one (rotation.py).
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
        evaluated = lm_eval.simple_evaluate(
            adapter,
            tasks=wanted,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            task_manager=manager,
            apply_chat_template=chat_template,
        )
        for task, scores in _topmost(evaluated).items():
            metrics = _metrics(scores)
            key = _chosen(task, metrics)
            samples = {leaf: _filtered(evaluated["samples"][leaf], key) for leaf in _leaves(evaluated, task)}
            results[task] = _summary(task, key, metrics, evaluated, samples)
            parts = [(loaded["tasks"][leaf], documents) for leaf, documents in samples.items()]
            results[task]["options"] = rotation.check(adapter, parts)
            line = f"{model.directory.name}: {task} {results[task]['metric']} {shown(results[task]['score'])}"
            console.print(line, markup=False)
        if done is not None:
            done(results)
    return results


def _topmost(evaluated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of the groups that are part of no other group; of the tasks, where no group has scores."""
    if not evaluated.get("groups"):
        return {task: scores for task, scores in evaluated["results"].items() if task in evaluated["samples"]}
    parts = {part for parts in evaluated["group_subtasks"].values() for part in parts}
    return {group: scores for group, scores in evaluated["groups"].items() if group not in parts}


def _leaves(evaluated: dict[str, Any], task: str) -> list[str]:
    """The tasks that a group is made of, through groups of groups; the task itself where it is none."""
    parts = evaluated.get("group_subtasks", {}).get(task)
    return [leaf for part in parts for leaf in _leaves(evaluated, part)] if parts else [task]


def _metrics(scores: dict[str, Any]) -> dict[str, float]:
    """lm-eval's numbers by "metric,filter", without its errors."""
    numbers = {key: value for key, value in scores.items() if "," in key and isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if not key.split(",")[0].endswith("_stderr")}


def _chosen(task: str, metrics: dict[str, float]) -> str:
    """The first "metric,filter" of the metric that counts; "" where there are no numbers."""
    wanted = (SUITE[task].metric,) if task in SUITE else METRICS
    keys = [key for metric in wanted for key in metrics if key.split(",")[0] == metric]
    return next(iter([*keys, *metrics]), "")


def _filtered(samples: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The documents, of which lm-eval has a sample for each filter, with this key's filter; else with the first."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    kept = key.partition(",")[2]
    kept = kept if kept in filters else next(iter(filters), "")
    return [sample for sample in samples if sample["filter"] == kept]


def _summary(
    task: str,
    key: str,
    metrics: dict[str, float],
    evaluated: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    metric, _, kept = key.partition(",")
    others = [name for name in metrics if name.startswith(f"{metric},")]
    single = [sample.get(metric) for leaf in samples.values() for sample in leaf]
    chance = SUITE[task].chance if task in SUITE else _chance(evaluated, samples) if metric in METRICS else None
    return {
        "metric": metric,
        "filter": kept if len(others) > 1 else None,
        "score": metrics.get(key),
        "stderr": _standard_error(single) if metric in METRICS else None,
        "chance": chance,
        "always": _always(evaluated, samples) if metric in METRICS else None,
        "documents": len(single),
        "num_fewshot": sorted({evaluated["n-shot"][leaf] for leaf in samples}),
        "metrics": metrics,
    }


def _standard_error(scores: list[Any]) -> float | None:
    """Of a mean over documents; None where it is none."""
    if len(scores) < 2 or not all(isinstance(score, int | float) for score in scores):
        return None
    return statistics.stdev(map(float, scores)) / len(scores) ** 0.5


def _chance(evaluated: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """The mean over documents of one in the number of their choices; 0 for tasks without choices.

    None where a task scores choices by code of its own, which may count several of them as right.
    """
    shares: list[float] = []
    for task, documents in samples.items():
        config = evaluated["configs"][task]
        is_choice = config.get("output_type") == "multiple_choice"
        if is_choice and config.get("process_results"):
            return None
        shares += [1 / len(document["filtered_resps"]) if is_choice else 0.0 for document in documents]
    return sum(shares) / len(shares) if shares else None


def _always(evaluated: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """The score of always the same option, in a group the mean of its parts'; None where a part has no options."""
    scores = [
        rotation.best_constant(documents)
        if evaluated["configs"][task].get("output_type") == "multiple_choice"
        else None
        for task, documents in samples.items()
    ]
    pairs = zip(scores, map(len, samples.values()), strict=True)
    weighted = [(score, count) for score, count in pairs if score is not None]
    if not weighted or len(weighted) < len(scores):
        return None
    return sum(score * count for score, count in weighted) / sum(count for _, count in weighted)


def compare(
    cfg: ModelConfig,
    student: dict[str, Any],
    teacher: dict[str, Any] | None,
    control: dict[str, Any] | None = None,
    *,
    chat_template: bool = False,
) -> dict[str, Any]:
    """{"tasks": {task: {"metric", "filter", "chance", "always", "num_fewshot", "student", "teacher", "control",
    "relative", "at_floor", "published"}}, ...}.

    relative: (student - chance) / (teacher - chance), None where the teacher may do nothing better than chance
    (at_floor); published: the paper's scores of its student of this shape, whose prompts had no chat template. Beside
    the tasks stand "mean_relative", over the "relative_tasks" that have one, and "published_model" with
    "published_teacher".
    """
    name, published = (None if chat_template else published_scores(cfg)) or (None, {})
    tasks = {}
    for task, result in student.items():
        line = {name: result.get(name) for name in _OF_TASK} | {"student": result}
        other = (teacher or {}).get(task)
        if other is not None:
            line["teacher"] = other
            known = None not in (result["score"], other["score"], result["chance"], other["stderr"])
            line["at_floor"] = known and other["score"] - Z * other["stderr"] <= result["chance"]
            known = known and not line["at_floor"]
            line["relative"] = relative_score(result["score"], other["score"], result["chance"]) if known else None
        if control is not None:
            line["control"] = control[task]
        if task in published and not any(result.get("num_fewshot") or ()):
            scores = published[task]
            relative = relative_score(scores["student"], scores["teacher"], SUITE[task].chance)
            line["published"] = scores | {"relative": relative}
        tasks[task] = line
    relatives = [line["relative"] for line in tasks.values() if line.get("relative") is not None]
    mean = sum(relatives) / len(relatives) if relatives else None
    found = {"tasks": tasks, "mean_relative": mean, "relative_tasks": len(relatives), "published_model": name}
    return found | ({"published_teacher": teacher_of(name)} if name else {})
