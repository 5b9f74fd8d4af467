"""All that is asked of the models, tasks and probes, and where the results go."""

from typing import Any, NamedTuple

from absl import flags

from radlads_jax.decoding.loaded import Model, load_model, model_directory, read_model_config
from radlads_jax.evaluation.control import check_control, control_of
from radlads_jax.evaluation.probe_scores import run_probes
from radlads_jax.evaluation.probes import check_lengths
from radlads_jax.evaluation.tasks import RECALL_NAME, console, run_tasks
from radlads_jax.models import ModelConfig
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.system import storage


class _Measured(NamedTuple):
    """Of one model: its config, its scores in the tasks and its probes."""

    cfg: ModelConfig
    scores: dict[str, Any]
    probes: dict[str, Any]


def output_directory(model: str, output: str | None) -> storage.AnyPath:
    """--output, else the run's or the model's own directory. Raises ValueError for a model of the hub."""
    if output is None and not storage.as_path(model).is_dir():
        raise ValueError(f"{model} is a model of the hub, beside which nothing can be written; expected --output DIR.")
    directory = storage.as_path(output or model)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def wants_probes(values: flags.FlagValues) -> bool:
    """Whether any probe is asked for, by --probes or as the suite --tasks=recall."""
    return values.probes or RECALL_NAME in values.tasks


def check_models(values: flags.FlagValues) -> None:
    """Raises ValueError for what would stop the evaluation later: the probes' lengths, and a control that is none."""
    if wants_probes(values):
        text_file = storage.as_path(values.probe_text) if values.probe_text and values.probes else None
        check_lengths(load_tokenizer(model_directory(values.model)), _lengths(values), text_file)
    if values.control:
        check_control(read_model_config(values.teacher), read_model_config(values.model))


def evaluate_models(tasks: dict[str, Any], values: flags.FlagValues) -> dict[str, _Measured]:
    """What is found of the teacher and its control, where they are asked for, and of the student.

    The teacher leaves memory before the student comes; its control has no weights of its own.
    """
    of_teacher = {} if values.teacher is None else _of_teacher(tasks, values)
    return of_teacher | {"student": _measured("student", load_model(values.model, dtype=values.dtype), tasks, values)}


def _of_teacher(tasks: dict[str, Any], values: flags.FlagValues) -> dict[str, _Measured]:
    student = read_model_config(values.model) if values.control else None
    teacher = load_model(values.teacher, dtype=values.dtype, beside=student)
    models = {"teacher": teacher} | ({"control": control_of(teacher, student)} if student is not None else {})
    return {role: _measured(role, model, tasks, values) for role, model in models.items()}


def _measured(role: str, model: Model, tasks: dict[str, Any], values: flags.FlagValues) -> _Measured:
    scores = run_tasks(model, tasks, batch_size=values.batch_size, limit=values.limit, num_fewshot=values.num_fewshot)
    probes: dict[str, Any] = {}
    if wants_probes(values):
        probes = run_probes(
            model,
            lengths=_lengths(values),
            samples=values.probe_samples,
            seed=values.seed,
            batch_size=values.batch_size,
            text_file=storage.as_path(values.probe_text) if values.probe_text else None,
            by_position=values.probes,
            log=lambda line: console.print(f"{role}: {line}"),
        )
    return _Measured(model.cfg, scores, probes)


def _lengths(values: flags.FlagValues) -> list[int]:
    return [int(n) for n in values.probe_lengths]
