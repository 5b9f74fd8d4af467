"""All that is asked of the models, tasks and probes, and where the results go."""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from radlads_jax.data.chat_template import require_template
from radlads_jax.decoding.loaded import Model, load_model, model_directory, read_model_config
from radlads_jax.evaluation import completions
from radlads_jax.evaluation.control import check_control, control_of
from radlads_jax.evaluation.probe_scores import run_probes
from radlads_jax.evaluation.probes import check_lengths
from radlads_jax.evaluation.tasks import RECALL_NAME, console, expand_tasks, run_tasks
from radlads_jax.models import ModelConfig
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.system import storage
from radlads_jax.system.json_files import read_json, write_json

# Of an evaluation: what it is of and how it was asked, what may be measured, and there what says how much of it.
_OF_MODELS = ("model", "teacher", "dtype", "limit", "seed", "probe_text", "chat_template")
_PARTS = ("tasks", "probes", "kl")
_AMOUNTS = ("documents", "num_fewshot", "lengths", "positions", "samples", "sizes")
# Writes down a role's part of the results.
_Keep = Callable[[str, str, dict[str, Any]], None]


class _Measured(NamedTuple):
    """Of one model: its config, its scores in the tasks, its probes, and its KL to the teacher."""

    cfg: ModelConfig
    scores: dict[str, Any]
    probes: dict[str, Any]
    kl: dict[str, Any]


def output_directory(model: str, output: str | None) -> storage.AnyPath:
    """--output, else the run's or the model's own directory. Raises ValueError for a model of the hub."""
    if output is None and not storage.as_path(model).is_dir():
        raise ValueError(
            f"{model} is no directory here, and beside a model of the hub nothing can be written; expected a "
            "directory, or --output DIR beside a hub id. Check the path."
        )
    directory = storage.as_path(output or model)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def keep_earlier(directory: storage.AnyPath, result: Mapping[str, Any]) -> None:
    """Writes an evaluation that the new one does not replace to evaluation-N.json and .md, and says so.

    It is of other models or settings, or has what the new one lacks: a task, a kind or length of probes, KL, a role.
    """
    path = directory / "evaluation.json"
    if not path.exists():
        return
    try:
        earlier = read_json(path, "It is kept by another name.")
        of = [earlier.get(name) for name in _OF_MODELS]
        measured = _measurements(earlier)
    except ValueError:  # not one of ours
        of, measured = [], set()
    if of == [result.get(name) for name in _OF_MODELS] and measured <= _measurements(result):
        return
    number = next(n for n in itertools.count(1) if not (directory / f"evaluation-{n}.json").exists())
    for suffix in ("json", "md"):
        if (old := directory / f"evaluation.{suffix}").exists():
            storage.copy_file(old, directory / f"evaluation-{number}.{suffix}")
    place = directory / f"evaluation-{number}.json"
    console.print(f"what was evaluated here before is in {place} now", markup=False, soft_wrap=True)


def _measurements(result: Mapping[str, Any], path: str = "") -> set[str]:
    """The name of everything that was measured, and with each of `_AMOUNTS` its value."""
    found: set[str] = set()
    for name, value in result.items() if path else [(name, result.get(name)) for name in _PARTS]:
        place = f"{path}/{name}"
        if name in _AMOUNTS:
            found.add(f"{place}={json.dumps(value)}")
        elif isinstance(value, Mapping):
            found |= {place, *_measurements(value, place)} if value else set()
        elif value is not None:
            found.add(place)
    return found


def wants_probes(values: flags.FlagValues) -> bool:
    """Whether any probe is asked for, by --probes or as the suite --tasks=recall."""
    return values.probes or RECALL_NAME in values.tasks


def check_settings(values: flags.FlagValues) -> None:
    """Raises ValueError for a setting that nothing reads."""
    tasks = expand_tasks(values.tasks)
    probes, text = wants_probes(values), values.probes or values.completions
    task_files = any(Path(name).is_file() for name in tasks)
    of_tasks = (tasks, "lm-eval's tasks", "--tasks=NAME")
    of_probes = (probes, "probes", "--probes or --tasks=recall")
    read = {
        "limit": of_tasks,
        "num_fewshot": of_tasks,
        "apply_chat_template": of_tasks,
        "trust_task_code": (task_files or not values.trust_task_code, "task files", "--tasks=FILE.yaml"),
        "probe_lengths": of_probes,
        "probe_samples": of_probes,
        "probe_kinds": of_probes,
        "probe_text": (text, "the loss by position or completions", "--probes or --completions"),
        "completion_temperature": (values.completions, "completions", "--completions"),
        "seed": (probes or values.completions, "probes or completions", "--probes, --tasks=recall or --completions"),
    }
    for name, (is_read, by, flag) in read.items():
        if values[name].present and not is_read and name == "limit" and probes:
            raise ValueError(
                "--limit is of lm-eval's tasks, and recall is the probes, which have samples; expected --tasks=NAME "
                "too, or --probe_samples=N."
            )
        if values[name].present and not is_read:
            raise ValueError(f"--{name} changes nothing without {by}; expected {flag} too.")


def check_models(values: flags.FlagValues) -> None:
    """Raises ValueError for what would stop the evaluation later: lengths, too short a text, no template or control."""
    if wants_probes(values):
        text_file = _text_file(values) if values.probes else None
        check_lengths(load_tokenizer(model_directory(values.model)), _lengths(values), text_file, values.probe_kinds)
    for directory in filter(None, (values.model, values.teacher) if values.apply_chat_template else ()):
        tokenizer = load_tokenizer(model_directory(directory))
        require_template(tokenizer, directory, "Leave --apply_chat_template out.")
    if values.control:
        check_control(read_model_config(values.teacher), read_model_config(values.model))
    if values.completions:
        sizes = completion_sizes(values)
        completions.check_sizes(sizes, read_model_config(values.teacher), read_model_config(values.model))
        completions.text_rows(load_tokenizer(model_directory(values.teacher)), sizes, _text_file(values))


def completion_sizes(values: flags.FlagValues) -> completions.Sizes:
    """Raises ValueError for sizes that are none."""
    return completions.sizes_of(values.completions, values.completion_temperature, values.seed, values.batch_size)


def tokens_read(values: flags.FlagValues) -> int:
    """Of a task's prompt and answer together, by all of the models."""
    directories = [values.model, *([values.teacher] if values.teacher else [])]
    return min(read_model_config(directory).max_position_embeddings for directory in directories)


def evaluate_models(tasks: dict[str, Any], values: flags.FlagValues, partial: storage.AnyPath) -> dict[str, _Measured]:
    """What is found of the teacher and its control, where they are asked for, and of the student.

    The teacher leaves memory before the student comes; its control has no weights of its own. partial: a file of all
    that is found so far, {role: {"tasks", "probes", "kl"}}, for the case that something fails later.
    """
    measured: dict[str, _Measured] = {}
    found: dict[str, dict[str, Any]] = {}

    def keep(role: str, part: str, results: dict[str, Any]) -> None:
        found.setdefault(role, {})[part] = results
        write_json(partial, found)

    kept = None if values.teacher is None else _measure_teacher(measured, tasks, values, keep)
    student = load_model(values.model, dtype=values.dtype)
    measured["student"] = _measured("student", student, tasks, values, keep, kept)
    return measured


def _measure_teacher(
    measured: dict[str, _Measured], tasks: dict[str, Any], values: flags.FlagValues, keep: _Keep
) -> completions.Reference | None:
    """Puts what is found of the teacher and its control there; returns what the student is compared with."""
    student = read_model_config(values.model) if values.control else None
    teacher = load_model(values.teacher, dtype=values.dtype, beside=student)
    measured["teacher"] = _measured("teacher", teacher, tasks, values, keep)
    kept = completions.reference(teacher, completion_sizes(values), _text_file(values)) if values.completions else None
    if student is not None:
        measured["control"] = _measured("control", control_of(teacher, student), tasks, values, keep, kept)
    return kept


def _text_file(values: flags.FlagValues) -> storage.AnyPath | None:
    return storage.as_path(values.probe_text) if values.probe_text else None


def _measured(
    role: str,
    model: Model,
    tasks: dict[str, Any],
    values: flags.FlagValues,
    keep: _Keep,
    teacher: completions.Reference | None = None,
) -> _Measured:
    scores = run_tasks(
        model,
        tasks,
        batch_size=values.batch_size,
        limit=values.limit,
        num_fewshot=values.num_fewshot,
        chat_template=values.apply_chat_template,
        done=lambda results: keep(role, "tasks", results),
    )
    probes: dict[str, Any] = {}
    if wants_probes(values):
        probes = run_probes(
            model,
            lengths=_lengths(values),
            samples=values.probe_samples,
            seed=values.seed,
            batch_size=values.batch_size,
            text_file=_text_file(values),
            by_position=values.probes,
            kinds=values.probe_kinds,
            log=lambda line: console.print(f"{role}: {line}"),
            keep=lambda results: keep(role, "probes", results),
        )
        keep(role, "probes", probes)
    kl: dict[str, Any] = {}
    if teacher is not None:
        kl = completions.measure(model, teacher)
        keep(role, "kl", kl)
        said = (f"KL on {name} {means['kl']:.4f}" for name, means in kl.items())
        console.print(f"{role}: {', '.join(said)}")
    return _Measured(model.cfg, scores, probes, kl)


def _lengths(values: flags.FlagValues) -> list[int]:
    return [int(n) for n in values.probe_lengths]
