"""All that is asked of one model, tasks and probes, and where the results go."""

from typing import Any

from absl import flags

from radlads_jax.decoding.loaded import load_model
from radlads_jax.evaluation.probes import run_probes
from radlads_jax.evaluation.tasks import console, run_tasks
from radlads_jax.models import ModelConfig
from radlads_jax.system import storage


def output_directory(model: str, output: str | None) -> storage.AnyPath:
    """--output, else the run's or the model's own directory. Raises ValueError for a model of the hub."""
    if output is None and not storage.as_path(model).is_dir():
        raise ValueError(f"{model} is a model of the hub, beside which nothing can be written; expected --output DIR.")
    directory = storage.as_path(output or model)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


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
