"""A stage's rates by trial: short runs at a third, once and three times of them, judged on the held-out rows.

What was tried is in DIR/sweep.json, trial by trial: one that was stopped is the only one that is run again. Short runs
favour high rates: of two that are as good as each other take the lower one for a long stage.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from radlads_jax.config import RATE_FACTORS, fitting_warmup
from radlads_jax.distill.program import StagePlan, create_state, make_step
from radlads_jax.models import sharding
from radlads_jax.models.tree import Params, merge_params, split_params
from radlads_jax.run import heldout
from radlads_jax.run.display import Bar, Lines, show
from radlads_jax.run.job import Job
from radlads_jax.run.settings import FREE_OF_RECIPES
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.system import hosts
from radlads_jax.system.json_files import digest, read_json, write_json
from radlads_jax.system.stopping import Interrupted
from radlads_jax.system.untrusted import brief

_FILE = "sweep.json"
_ADVICE = "Restore it, or remove it where the stage has not begun: its rates are tried again."
RATES = ("lr", "lr_final", "mixer_lr", "mixer_lr_final")


def decided(
    job: Job,
    name: str,
    teacher: TeacherWeights,
    start: Callable[[Params | None], Params],
    stopping: Callable[[], int | None],
    *,
    begun: bool,
) -> Job:
    """The job with the stage's rates that its trials chose; they are made where they are not yet.

    start: (teacher) -> the student before the stage. begun: the stage has checkpoints, so that its rates are decided:
    ValueError where the file that has them is gone. Raises Interrupted.
    """
    trials, steps = _read(job, name, begun=begun), job.run.stage(name).trial_steps
    if begun and len(trials) < len(RATE_FACTORS):
        raise ValueError(
            f"{job.workdir / _FILE} does not have the rates that {name} was begun with; expected it, for "
            f"config.{name}.sweep is true. Restore it, or choose another --workdir."
        )
    for factor in RATE_FACTORS[len(trials) :]:
        trials.append(_trial(_with_rates(job, name, factor), name, teacher, start, stopping) | {"factor": factor})
        _write(job, name, trials)
    best = _best(trials)
    if best["kl"] is None:
        tried = ", ".join(f"{trial['mixer_lr']:g}" for trial in trials)
        raise ValueError(
            f"{name}: after {steps:,} steps at each of the rates {tried} the held-out KL was not finite; expected one "
            f"that is. Lower config.{name}.lr and .mixer_lr, or use float32 (config.dtype)."
        )
    if not begun:
        show(_table(name, trials, best, steps))
    return _with_rates(job, name, best["factor"])


def taken(job: Job, name: str) -> Job | None:
    """The job with the rates that a stage, which is done, was trained by; with its own where there was no sweep.

    None where the file that has them is gone: nothing but what is told of the stage depends on it any more.
    """
    if not job.run.stage(name).sweep:
        return job
    trials = _read(job, name, begun=True)
    return _with_rates(job, name, _best(trials)["factor"]) if trials else None


def _best(trials: list[dict[str, Any]]) -> dict[str, Any]:
    return min(trials, key=lambda trial: math.inf if trial["kl"] is None else trial["kl"])


def _with_rates(job: Job, name: str, factor: float) -> Job:
    recipe = job.run.stage(name)
    return _with_recipe(job, name, {rate: factor * getattr(recipe, rate) for rate in RATES})


def _with_recipe(job: Job, name: str, values: dict[str, Any]) -> Job:
    recipe = dataclasses.replace(job.run.stage(name), **values)
    return dataclasses.replace(job, run=job.run.with_stage(name, recipe))


def _trial(
    job: Job,
    name: str,
    teacher: TeacherWeights,
    start: Callable[[Params | None], Params],
    stopping: Callable[[], int | None],
) -> dict[str, Any]:
    """Trains the stage's first steps by a recipe of as many; {lr, mixer_lr, kl}, kl None where it is not finite."""
    recipe = job.run.stage(name)
    steps = recipe.trial_steps
    tokens = steps * recipe.tokens_per_step
    short = _with_recipe(job, name, {"tokens": tokens, "warmup_steps": min(recipe.warmup_steps, fitting_warmup(steps))})
    student = _trained(short, short.stage_plan(name), teacher, start, stopping)
    kl = heldout.evaluate_job(short, short.student, student, teacher.held())["student"]["kl"]
    return {"lr": recipe.lr, "mixer_lr": recipe.mixer_lr, "kl": kl if math.isfinite(kl) else None}


def _trained(
    job: Job,
    plan: StagePlan,
    teacher: TeacherWeights,
    start: Callable[[Params | None], Params],
    stopping: Callable[[], int | None],
) -> Params:
    """The student after the plan's steps; nothing of them is kept elsewhere."""
    recipe = plan.recipe
    params, frozen = split_params(start(teacher.held()), plan.trains)
    state, step_fn, batches = create_state(plan, params), make_step(plan), job.batches(plan.name)
    weights = teacher.for_stage(plan)
    console = Console()
    label = f"{plan.name} at lr {recipe.mixer_lr:.3g}"
    bar = (Bar if console.is_terminal else Lines)(console, label, 0, recipe.steps) if hosts.is_first() else None
    try:
        for step in range(1, recipe.steps + 1):
            began = time.monotonic()
            batch = sharding.place_rows(job.mesh, next(batches), recipe.batch_size)
            state, metrics = step_fn(state, frozen, weights, batch)
            loss = float(metrics["loss"])
            if bar is not None:
                bar.loss = loss
                pace = None if step == 1 else recipe.tokens_per_step / (time.monotonic() - began)
                bar.move(step, pace, None)
            if signum := hosts.agreed(stopping() or 0):
                raise Interrupted(signum, f"a trial of {plan.name}'s rates", "which begins anew")
    finally:
        if bar is not None:
            bar.stop()
    return merge_params(state.params, frozen)


def _identity(job: Job, name: str) -> str:
    """Of what the trials depend on."""
    run, recipe = job.run, dataclasses.replace(job.run.stage(name), **FREE_OF_RECIPES)
    softened = (run.teacher.dtype, run.teacher.temperature, run.teacher.top_k)
    rows = (run.eval_tokens, run.data.cross_document, run.data.replay)
    told = (run.seed, run.stages, softened, job.student, run.student, run.optim, recipe, rows, RATE_FACTORS)
    depends = {part: job.depends.get(part) for part in ("teacher", "tokenizer", "data", "chats", "logits")}
    depends |= {"init_from": job.depends["init_from"]} if "init_from" in job.depends else {}
    return digest([repr(told), depends])


def _read(job: Job, name: str, *, begun: bool) -> list[dict[str, Any]]:
    """The stage's trials so far; none where the file's are of a run with other settings, which could not begin."""
    own = _stages(job).get(name, {})
    return own.get("trials", []) if begun or own.get("of run") == _identity(job, name) else []


def _stages(job: Job) -> dict[str, Any]:
    """What the file holds; ValueError where it is damaged."""
    path = job.workdir / _FILE
    if not path.exists():
        return {}
    stages = read_json(path, _ADVICE)
    for name, own in stages.items():
        trials = own.get("trials") if isinstance(own, dict) else None
        if not isinstance(trials, list) or not all(map(_is_trial, trials)):
            raise ValueError(f"{path}: {name} is {brief(repr(own))}; expected what a run wrote there. {_ADVICE}")
    return stages


def _is_trial(trial: Any) -> bool:
    """Whether these are a trial's rates and its KL."""
    numbers = isinstance(trial, dict) and {k: trial.get(k) for k in ("lr", "mixer_lr", "factor", "kl")}
    return bool(numbers) and all(isinstance(v, float) or (k == "kl" and v is None) for k, v in numbers.items())


def _write(job: Job, name: str, trials: list[dict[str, Any]]) -> None:
    """Writes DIR/sweep.json whole or not at all; the first host does."""
    if hosts.is_first():
        job.workdir.mkdir(parents=True, exist_ok=True)
        own = {"of run": _identity(job, name), "steps": job.run.stage(name).trial_steps, "trials": trials}
        stages = _stages(job) | {name: own}
        write_json(job.workdir / _FILE, stages, indent=1)
    hosts.barrier()


def _table(name: str, trials: list[dict[str, Any]], best: dict[str, Any], steps: int) -> Table:
    table = Table(title=f"{name}: rates after {steps:,} steps each", title_justify="left")
    for column in ("mixer_lr", "lr", "held-out KL", ""):
        table.add_column(column, justify="right")
    for trial in trials:
        kl = "not finite" if trial["kl"] is None else f"{trial['kl']:.4f}"
        table.add_row(f"{trial['mixer_lr']:.3g}", f"{trial['lr']:.3g}", kl, "taken" if trial is best else "")
    return table
