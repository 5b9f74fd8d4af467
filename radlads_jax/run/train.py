"""The only loop and all of its I/O: stage after stage, resumable at any step, then evaluation and export."""

import dataclasses
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from radlads_jax.distill.optim import learning_rates
from radlads_jax.distill.program import abstract_state, create_state, is_trainable, make_step
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.train_state import TrainState
from radlads_jax.models import sharding
from radlads_jax.models.decoder import Params
from radlads_jax.models.tree import overlay_params, path_leaves, split_params
from radlads_jax.planning.cost import model_flops
from radlads_jax.porting.model_card import write_model_card
from radlads_jax.porting.save import save_params
from radlads_jax.porting.student import init_mixers, transfer_table, whole_student
from radlads_jax.reporting.sections import write_report
from radlads_jax.run import fingerprint, heldout
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.checkpoint_sums import DamagedCheckpoint
from radlads_jax.run.job import Job
from radlads_jax.run.metrics import MetricsLogger, is_spike, peak_bytes
from radlads_jax.run.wandb_curves import WandbCurves
from radlads_jax.system import hosts, storage
from radlads_jax.system.stopping import stop_signals

console = Console()

# The mean of so many steps is what a summary calls the last loss.
LOSSES_KEPT = 20
# After so long there is a line, however few steps it was.
LINE_SECONDS = 10


class Interrupted(RuntimeError):
    """The run was asked to stop, and has saved where it was. signum: the signal that asked."""

    def __init__(self, signum: int, where: str):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at {where}, which is saved; the same command continues there.")
        self.signum = signum


class TooManyNonFinite(RuntimeError):
    """The loss or its gradient was not finite for too many steps in a row."""


class Clock:
    """Time, losses and memory of a stage, carried over restarts in the checkpoints' meta; compilation is not timed."""

    def __init__(self, meta: dict[str, Any]):
        self.seconds: float = meta.get("seconds", 0.0)
        self.timed_steps: int = meta.get("timed_steps", 0)
        self.first_loss: float | None = meta.get("first_loss")
        self.last_losses: list[float] = list(meta.get("last_losses", []))
        self.peak_bytes: int = meta.get("peak_bytes", 0)
        self._mark, self._marked_step = 0.0, 0

    def start(self, step: int) -> None:
        """`step` has just been computed and the program compiled: what follows is timed."""
        self._mark, self._marked_step = time.monotonic(), step

    def waited(self, step: int | None = None) -> float:
        """Seconds since the last tick; with a step, on average of the steps until it."""
        steps = 1 if step is None else max(1, step - self._marked_step)
        return (time.monotonic() - self._mark) / steps

    def tick(self, step: int) -> float | None:
        """`step` has just been computed; returns the steps per second since the last tick."""
        now = time.monotonic()
        seconds, steps = now - self._mark, step - self._marked_step
        self.seconds, self.timed_steps = self.seconds + seconds, self.timed_steps + steps
        self._mark, self._marked_step = now, step
        self.peak_bytes = max(self.peak_bytes, peak_bytes())
        return steps / seconds if steps else None

    def note_loss(self, loss: float) -> bool:
        """Takes in the next step's loss; returns whether it is a spike above the last ones."""
        if not math.isfinite(loss):
            return False
        spike = is_spike(loss, self.last_losses)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_losses = [*self.last_losses[1 - LOSSES_KEPT :], loss]
        return spike

    def meta(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "timed_steps": self.timed_steps,
            "first_loss": self.first_loss,
            "last_losses": self.last_losses,
            "peak_bytes": self.peak_bytes,
        }


def convert(job: Job, teacher: Params | None = None) -> dict[str, Any]:
    """Runs what is left of the job, evaluates, exports; returns the summary that DIR/summary.json holds.

    teacher: its weights in the dtype it is run in, where they are loaded already.
    """
    console.quiet = not hosts.is_first()
    summary_path = job.workdir / "summary.json"
    if summary_path.exists() and (job.workdir / "export").is_dir():
        summary = json.loads(storage.read_text(summary_path))
        console.print(f"[bold]{job.workdir} is finished[/bold]; nothing to do. Its results, from {summary_path}:")
        console.print(heldout.results_table(summary))
        if hosts.is_first() and not (job.workdir / "report" / "index.html").exists():
            write_report(job.workdir)
        return summary
    fingerprint.remember(job.workdir, job.depends)
    if teacher is None and job.student.recurrent_mixer:
        teacher = job.load_teacher(job.run.teacher.dtype)
    project, settings = job.run.train.wandb_project, dataclasses.asdict(job.run)
    wandb = WandbCurves(job.workdir, project, settings) if project and hosts.is_first() else None
    with MetricsLogger(job.workdir, wandb=wandb) as logger, stop_signals() as stopping:
        stages, student = train_all(job, teacher, logger, stopping)
        if signum := hosts.agreed(stopping() or 0):
            raise Interrupted(signum, "the end of the last stage")
    console.print("evaluating on held-out rows")
    summary = heldout.evaluate_job(job, student, teacher) | {"stages": stages}
    console.print(f"exporting to {job.workdir / 'export'}")
    export(job, student, summary)
    if hosts.is_first():
        # Its presence says that everything before is whole.
        storage.write_text(summary_path, json.dumps(summary, indent=2) + "\n")
        console.print(heldout.results_table(summary))
        console.print(f"how it went, as a page: {write_report(job.workdir)}")
    return summary


def train_all(
    job: Job, teacher: Params | None, logger: MetricsLogger, stopping: Callable[[], int | None]
) -> tuple[list[dict[str, Any]], Params]:
    """Every stage's summary line, and the student after the last one."""
    while True:
        try:
            stages = [run_stage(job, name, teacher, logger, stopping) for name in job.run.stages]
            return stages, student_after(job, job.run.stages, teacher, whole=True)
        except DamagedCheckpoint as error:
            # It has been set aside: its stage goes on from the one before, to the same bits, and later stages stand.
            console.print(f"going back to repeat the steps up to {error.step}")


def run_stage(
    job: Job, name: str, teacher: Params | None, logger: MetricsLogger, stopping: Callable[[], int | None]
) -> dict[str, Any]:
    """Trains a stage from its newest checkpoint, or from what the stages before left; returns its summary line."""
    recipe, train = job.run.stage(name), job.run.train
    keep = {"keep": train.keep_checkpoints, "every": train.checkpoint_every}
    with Checkpoints(stage_directory(job, name), **keep) as checkpoints:
        abstract = abstract_state(job.run, job.student, name, job.mesh)
        done = recipe.steps
        start, saved = checkpoints.newest(
            lambda step: checkpoints.restore_meta(step) if step >= done else checkpoints.restore(step, abstract)
        ) or (0, None)
        if isinstance(saved, dict):
            console.print(f"{name}: all {recipe.steps} steps are done already")
            return _summary_line(job, name, saved)
        batches = job.batches(name)
        if saved is not None:
            state, data_state, meta = saved
            batches.set_state(data_state)
            frozen = _frozen_params(job, name, teacher)
            console.print(f"{name}: continuing from the checkpoint of step {start} of {recipe.steps}")
        else:
            student = _student_before(job, name, teacher)
            if name == job.run.stages[0] and teacher is not None:
                console.print(transfer_table(job.student, student, teacher, fresh_qkvo=job.run.student.fresh_qkvo))
            params, frozen = split_params(student, is_trainable(job.run, job.student, name))
            state, meta = create_state(job.run, name, params, job.mesh), {}
            del student, params
        teacher = teacher if STAGES[name].needs_teacher else None
        clock = Clock(meta)
        _train(job, name, state, frozen, teacher, batches, checkpoints, logger, clock, start, stopping)
    return _summary_line(job, name, clock.meta())


def _train(
    job: Job,
    name: str,
    state: TrainState,
    frozen: Params,
    teacher: Params | None,
    batches: Any,
    checkpoints: Checkpoints,
    logger: MetricsLogger,
    clock: Clock,
    start: int,
    stopping: Callable[[], int | None],
) -> None:
    """Steps start + 1 to the recipe's last; every step's metrics are logged once; saves as it goes."""
    recipe, train = job.run.stage(name), job.run.train
    step_fn = make_step(job.run, job.student, job.teacher, name, job.mesh)
    rates = learning_rates(recipe)
    pending: dict[int, dict[str, jax.Array]] = {}
    flops = model_flops(job.student, job.teacher, name, recipe.seq_len)
    tokens_per_step = recipe.batch_size * recipe.seq_len
    logger.begin(name, start, recipe.steps, tokens_per_step=tokens_per_step, flops_per_token=flops)
    in_a_row, late, seconds_each = 0, False, 0

    def flush() -> None:
        nonlocal in_a_row
        for step, values in jax.device_get(pending).items():
            spike = clock.note_loss(float(values["loss"]))
            lr = {f"lr_{group}": float(rate(step - 1)) for group, rate in rates.items()}
            logger.log(name, step, values | lr | {"spike": spike})
            in_a_row = int(values["skipped_in_a_row"])
            if in_a_row:
                logger.say(f"{name}: step {step} is skipped, its loss or gradient is not finite ({in_a_row} in a row)")
            if in_a_row > train.max_skipped:
                raise TooManyNonFinite(_non_finite_message(job.workdir, name, step, in_a_row))
        pending.clear()

    for step in range(start + 1, recipe.steps + 1):
        batch = sharding.place_rows(job.mesh, next(batches), recipe.batch_size)
        state, pending[step] = step_fn(state, frozen, teacher, batch)
        if step == start + 1:
            jax.block_until_ready(state.step)
            clock.start(step)
        # One step is queued behind the one that runs, no more: a signal is not to wait for a queue of them.
        jax.block_until_ready(pending.get(step - 1))
        is_last = step == recipe.steps
        wants_line = is_last or step % train.log_every == 0
        if jax.process_count() == 1:
            stop = stopping()
            wants_line = wants_line or clock.waited() > LINE_SECONDS
        else:
            # Several processes stop, and have their lines, at the same steps: they ask each other, at each long one.
            asks = wants_line or seconds_each > 0
            stop = (asks and hosts.agreed(stopping() or 0)) or None
            seconds_each = hosts.agreed(int(clock.waited(step))) if asks else seconds_each
            wants_line = wants_line or seconds_each > LINE_SECONDS
        must_save = is_last or stop is not None
        late = late or checkpoints.due(step)
        if must_save or late or wants_line:
            flush()
            pace = clock.tick(step)
            logger.progress(step, pace and pace * tokens_per_step)
        # A run of skipped steps that may end the run keeps the checkpoint from before it.
        if must_save or (late and not in_a_row):
            late = False
            logger.sync()
            checkpoints.save(step, state, data_state=batches.get_state(), meta=clock.meta(), wait=is_last)
        if stop is not None:
            checkpoints.wait()
            raise Interrupted(stop, f"step {step} of {recipe.steps} of {name}")


def _non_finite_message(workdir: storage.AnyPath, name: str, step: int, in_a_row: int) -> str:
    return (
        f"{name}: the {in_a_row} steps from {step - in_a_row + 1} to {step} had a loss or gradient that is not finite; "
        "expected no more than config.train.max_skipped in a row. They changed nothing, and the newest checkpoint is "
        f"from before them. Look at their data, lower the learning rate (config.{name}.lr, config.{name}.mixer_lr) or "
        f"use float32 (config.dtype); to go on from that checkpoint, change the setting in {workdir}/config.json too."
    )


def _summary_line(job: Job, name: str, meta: dict[str, Any]) -> dict[str, Any]:
    """A stage in summary.json. last_loss: the mean of the last steps; tokens_per_second: without compilation.

    peak_bytes: the most memory that the first device, on a CPU the process, had taken by the stage's end.
    """
    recipe = job.run.stage(name)
    tokens_per_step = recipe.batch_size * recipe.seq_len
    timed = meta["timed_steps"] * tokens_per_step
    return {
        "name": name,
        "steps": recipe.steps,
        "tokens": recipe.steps * tokens_per_step,
        "seconds": meta["seconds"],
        "tokens_per_second": timed / meta["seconds"] if meta["seconds"] else None,
        "first_loss": meta["first_loss"],
        "last_loss": statistics.fmean(meta["last_losses"]) if meta["last_losses"] else None,
        "peak_bytes": meta.get("peak_bytes"),
    }


def _frozen_params(job: Job, name: str, teacher: Params | None) -> Params:
    """The student's parameters that the stage reads and does not train; nothing is built where there are none."""
    if not job.run.stage(name).freeze:
        return {}
    return split_params(_student_before(job, name, teacher), is_trainable(job.run, job.student, name))[1]


def _student_before(job: Job, name: str, teacher: Params | None) -> Params:
    """What the stage starts from; for a stage that reads the mixers alone, only those."""
    earlier = job.run.stages[: job.run.stages.index(name)]
    return student_after(job, earlier, teacher, whole=STAGES[name].whole_student)


def student_after(job: Job, stages: Sequence[str], teacher: Params | None, *, whole: bool) -> Params:
    """The student as those stages left it (as stage 0 made it, where there are none), float32.

    Later stages train all that earlier ones did or more, so that their checkpoints are laid over each other in order.
    """
    params: Params = {}
    if job.student.recurrent_mixer is not None:
        fresh = job.run.student.fresh_qkvo
        params = init_mixers(job.student, teacher or {}, job.run.seed, fresh_qkvo=fresh, mesh=job.mesh)
        _check_frozen(job, params)
    if whole:
        params = whole_student(job.student, job.load_teacher("float32"), params)
    for name in stages:
        with Checkpoints(stage_directory(job, name)) as checkpoints:
            try:
                params = overlay_params(params, _stored_params(job, checkpoints, params, job.run.stage(name).steps))
            except DamagedCheckpoint as error:
                checkpoints.set_aside(error)
                raise
    return params


def _check_frozen(job: Job, mixers: Params) -> None:
    """Raises ValueError where the mixers' weights that a stage freezes are not those that the run began with."""
    values: dict[str, list[float]] = {}
    for name in job.run.stages:
        if job.run.stage(name).freeze:
            _, frozen = split_params(mixers, is_trainable(job.run, job.student, name))
            values |= fingerprint.of_values(path_leaves(frozen))
    if values:
        fingerprint.require_same_values(fingerprint.read(job.workdir).get("frozen", {}), values, job.workdir)
        fingerprint.remember(job.workdir, {"frozen": values})


def _stored_params(job: Job, checkpoints: Checkpoints, params: Params, step: int) -> Params:
    """The part of `params` that a checkpoint holds, read from it."""
    stored = checkpoints.shapes(step)
    wanted, _ = split_params(params, lambda path: f"params/{path}" in stored)
    return checkpoints.restore_params(step, sharding.abstract(job.mesh, wanted))


def stage_directory(job: Job, name: str) -> storage.AnyPath:
    return job.workdir / "checkpoints" / name


def export(job: Job, student: Params, summary: dict[str, Any]) -> None:
    """DIR/export: a Hugging Face directory, its model card with the run's recipe and scores."""
    options = job.run.export
    card = None
    if job.student.recurrent_mixer is not None:
        card = write_model_card(job.student, run=dataclasses.asdict(job.run), summary=summary)
    save_params(
        student,
        job.student,
        job.workdir / "export",
        base_config=job.base_config,
        dtype=options.dtype,
        max_shard_size=int(options.max_shard_gb * 1e9),
        tokenizer_from=job.tokenizer_dir,
        retie=options.retie,
        model_card=card,
    )
