"""The training loop and all of its I/O: stage after stage, resumable at any step, then its ending."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from radlads_jax.distill.calibrate import calibrated, has_queries
from radlads_jax.distill.optim import learning_rates
from radlads_jax.distill.program import abstract_state, create_state, make_step
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.train_state import TrainState
from radlads_jax.models import placement, sharding
from radlads_jax.models.tree import Params, merge_params, overlay_params, path_leaves, split_params
from radlads_jax.planning.cost import model_flops
from radlads_jax.porting.student import aligned_alone, init_mixers, transfer_table, whole_student
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import earlier_mixers, ending, fingerprint, heldout, sweep
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.checkpoint_sums import DamagedCheckpoint
from radlads_jax.run.clock import Clock
from radlads_jax.run.display import say, show
from radlads_jax.run.job import Job
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.run.wandb_curves import WandbCurves
from radlads_jax.system import hosts, storage
from radlads_jax.system.stopping import Interrupted, stop_signals

# After so long there is a line, however few steps it was.
_LINE_SECONDS = 10


class TooManyNonFinite(RuntimeError):
    """The loss or its gradient was not finite for too many steps in a row."""


def convert(
    job: Job, teacher: TeacherWeights | None = None, begun: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Runs what is left of the job, exports, evaluates; returns the summary that DIR/summary.json holds.

    teacher: its weights, where something else has asked for them before. begun: called when nothing of the settings can
    be refused any more: a step has been computed, or none is left to do; by every process.
    """
    if job.to_choose:
        raise ValueError(
            f"config.student.attention_layers is 'auto:{job.to_choose}', and nothing has chosen them; expected a job "
            "of radlads_jax.run.softmax_layers.decide. Run it before."
        )
    ending.check(job)
    if (summary := fingerprint.finished(job.workdir, job.run.stages)) is not None:
        begun()
        return ending.go_on(job, summary)
    fingerprint.begin(job.workdir, job.depends)
    if job.earlier is not None:
        earlier = earlier_mixers.copied(job.earlier, job.workdir, job.student, job.mesh)
        job = dataclasses.replace(job, earlier=earlier)
    weights = teacher or TeacherWeights(job)
    project, settings = job.run.train.wandb_project, job.run.settings()
    wandb = WandbCurves(job.workdir, project, settings) if project and hosts.is_first() else None
    with MetricsLogger(job.workdir, wandb=wandb) as logger, stop_signals() as stopping:
        stages, student = _train_all(_Run(job, weights, logger, stopping, begun))
        begun()
        if signum := hosts.agreed(stopping() or 0):
            raise Interrupted(signum, "the end of the last stage")
    return ending.finish(job, student, weights.held(), stages)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all stages of a run share."""

    job: Job
    teacher: TeacherWeights
    logger: MetricsLogger
    stopping: Callable[[], int | None]
    begun: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class _Resume:
    """A checkpoint to go on from; state is None for that of the stage's last step, after which nothing is left."""

    meta: dict[str, Any]
    data_state: dict[str, Any]
    state: TrainState | None = None


def _train_all(run: _Run) -> tuple[list[dict[str, Any]], Params]:
    """Every stage's summary line, and the student after the last one."""
    names = run.job.run.stages
    while True:
        try:
            stages = [_run_stage(run, name) for name in names]
            return stages, student_after(run.job, names, run.teacher.held(), whole=True)
        except DamagedCheckpoint as error:
            # It has been set aside, once and no more: its stage goes on from the one before, to the same bits, and
            # later stages stand.
            say(f"going back to repeat the steps up to {error.step}")


def _run_stage(run: _Run, name: str) -> dict[str, Any]:
    """Trains a stage from its newest checkpoint, or from what the stages before left; returns its summary line."""
    job, train = run.job, run.job.run.train
    last = job.run.stage(name).steps
    with Checkpoints(
        stage_directory(job, name), keep=train.keep_checkpoints, every=train.checkpoint_every
    ) as checkpoints:
        newest = checkpoints.newest(lambda step: _resume(job, name, checkpoints, step))
        start, saved = newest or (0, None)
        if _unscored(job, name, start):
            say(f"{name}: step {start:,} is without its scores, for the run ended while they were measured")
        if saved is not None and saved.state is None:
            say(f"{name}: all {last} steps are done already")
            return _summary_line(job, name, saved.meta, sweep.taken(job, name))
        clock = Clock(saved.meta if saved is not None else {})
        if saved is not None:
            say(f"{name}: continuing from the checkpoint of step {start} of {last}")
        if job.run.stage(name).sweep:
            start_of = functools.partial(_student_before, job, name)
            job = sweep.decided(job, name, run.teacher, start_of, run.stopping, begun=saved is not None)
            run = dataclasses.replace(run, job=job)
        _StageRun(run, name, checkpoints, clock).train(start, saved)
    return _summary_line(job, name, clock.meta(), job)


def _resume(job: Job, name: str, checkpoints: Checkpoints, step: int) -> _Resume:
    if step >= job.run.stage(name).steps:
        return _Resume(checkpoints.restore_meta(step), {})
    state, data_state, meta = checkpoints.restore(step, abstract_state(job.stage_plan(name)))
    return _Resume(meta, data_state, state)


def _scores_after(job: Job, name: str, step: int) -> bool:
    """Whether the student is scored after this step of a stage."""
    every = job.run.train.eval_every if STAGES[name].whole_student else 0
    return bool(every) and (step % every == 0 or step == job.run.stage(name).steps)


def _unscored(job: Job, name: str, step: int) -> bool:
    """Whether the step is saved and logged, and its scores are not."""
    if not (_scores_after(job, name, step) and hosts.is_first()):
        return False
    logged = [line for line in read_metrics(job.workdir) if (line["stage"], line["step"]) == (name, step)]
    return bool(logged) and not any(heldout.SECONDS in line for line in logged)


class _StageRun:
    """One stage while it trains: every step's metrics are logged once, and it saves as it goes."""

    def __init__(self, run: _Run, name: str, checkpoints: Checkpoints, clock: Clock):
        job = run.job
        self.run, self.job, self.name, self.checkpoints, self.clock = run, job, name, checkpoints, clock
        self.plan, self.options = job.stage_plan(name), job.run.train
        self.recipe = self.plan.recipe
        self.batches = job.batches(name)
        self.step = make_step(self.plan)
        self.rates = learning_rates(self.recipe)
        self.pending: dict[int, dict[str, jax.Array]] = {}
        self.skipped_in_a_row = 0

    def train(self, start: int, saved: _Resume | None) -> None:
        """Steps start + 1 to the recipe's last."""
        state, frozen = self._begin(saved)
        teacher, stored = self.run.teacher.for_stage(self.plan), self.plan.reads_logits
        flops = model_flops(self.job.student, self.job.teacher, self.name, self.recipe.seq_len, stored=stored)
        self.run.logger.begin(
            self.name, start, self.recipe.steps, tokens_per_step=self.recipe.tokens_per_step, flops_per_token=flops
        )
        policy = _StopPolicy(self.run.stopping, self.clock, self.options.log_every, self.recipe.steps)
        late = False
        for step in range(start + 1, self.recipe.steps + 1):
            batch = sharding.place_rows(self.job.mesh, next(self.batches), self.recipe.batch_size)
            state, self.pending[step] = self.step(state, frozen, teacher, batch)
            if step == start + 1:
                jax.block_until_ready(state.step)
                self.run.begun()
                self.clock.start(step)
            # One step is queued behind the one that runs, no more: a signal is not to wait for a queue of them.
            jax.block_until_ready(self.pending.get(step - 1))
            stop, wants_line = policy.ask(step)
            must_save = step == self.recipe.steps or stop is not None
            late = late or self.checkpoints.due(step)
            if must_save or late or wants_line or _scores_after(self.job, self.name, step):
                jax.block_until_ready(state.step)
                pace = self.clock.tick(step)
                self._flush()
                self.clock.start(step)
                self.run.logger.progress(step, pace and pace * self.recipe.tokens_per_step)
            # A run of skipped steps that may end the run keeps the checkpoint from before it.
            if must_save or (late and not self.skipped_in_a_row):
                late = False
                self._save(step, state)
            if stop is not None:
                if _scores_after(self.job, self.name, step):
                    self.run.logger.say(f"{self.name}: the scores after step {step:,} are left out, for it is stopped")
                self.checkpoints.wait()
                raise Interrupted(stop, f"step {step} of {self.recipe.steps} of {self.name}")
            if _scores_after(self.job, self.name, step):
                self._score(step, state, frozen, teacher)

    def _begin(self, saved: _Resume | None) -> tuple[TrainState, Params]:
        """The state to go on with, and the parameters that the stage reads and does not train."""
        job, name = self.job, self.name
        if saved is not None:
            assert saved.state is not None
            self.batches.set_state(saved.data_state)
            return saved.state, _frozen_params(job, name, self.run.teacher)
        teacher = self.run.teacher.held()
        student = _student_before(job, name, teacher)
        if name == job.run.stages[0] and teacher is not None:
            _show_start(job, student, teacher)
        params, frozen = split_params(student, self.plan.trains)
        del student
        return create_state(self.plan, params), frozen

    def _score(self, step: int, state: TrainState, frozen: Params, teacher: Params | None) -> None:
        """Scores the student on held-out rows, beside its teacher where the stage has its weights; logs and says it.

        With the seconds that it took, which are no training's.
        """
        begun = time.monotonic()
        scores = heldout.evaluate_in_training(self.job, merge_params(state.params, frozen), teacher)
        self.run.logger.add(scores | {heldout.SECONDS: time.monotonic() - begun})
        self.run.logger.say(f"{self.name}: after step {step:,} {heldout.in_words(scores)}", style="")
        self.clock.start(step)

    def _flush(self) -> None:
        """Logs the steps that have been computed since the last time; TooManyNonFinite where they are to end it."""
        for step, values in jax.device_get(self.pending).items():
            spike = self.clock.note_loss(float(values["loss"]))
            in_a_row = self.skipped_in_a_row = int(values["skipped_in_a_row"])
            # A skipped step moves no schedule.
            updates = step - 1 - int(values["skipped"]) + (in_a_row > 0)
            lr = {f"lr_{group}": float(rate(updates)) for group, rate in self.rates.items()}
            self.run.logger.log(self.name, step, values | lr | {"spike": spike})
            if in_a_row:
                self.run.logger.say(
                    f"{self.name}: step {step} is skipped, its loss or gradient is not finite ({in_a_row} in a row)"
                )
            if in_a_row > self.options.max_skipped:
                raise TooManyNonFinite(_non_finite_message(self.job.workdir, self.name, step, in_a_row))
        self.pending.clear()

    def _save(self, step: int, state: TrainState) -> None:
        self.run.logger.sync()
        data_state, meta = self.batches.get_state(), self.clock.meta()
        self.checkpoints.save(step, state, data_state=data_state, meta=meta, wait=step == self.recipe.steps)


class _StopPolicy:
    """When a stage stops, and when it has a line: in every process at the same steps."""

    def __init__(self, stopping: Callable[[], int | None], clock: Clock, every: int, last: int):
        self.stopping, self.clock, self.every, self.last = stopping, clock, every, last
        self.seconds_each = 0

    def ask(self, step: int) -> tuple[int | None, bool]:
        """(the signal to stop by after this step, if any; whether the step has a line)."""
        wants_line = step == self.last or step % self.every == 0
        if jax.process_count() == 1:
            return self.stopping(), wants_line or self.clock.waited() > _LINE_SECONDS
        # Several processes ask each other, at each long step.
        asks = wants_line or self.seconds_each > 0
        stop = (asks and hosts.agreed(self.stopping() or 0)) or None
        self.seconds_each = hosts.agreed(int(self.clock.waited(step))) if asks else self.seconds_each
        return stop, wants_line or self.seconds_each > _LINE_SECONDS


def _non_finite_message(workdir: storage.AnyPath, name: str, step: int, in_a_row: int) -> str:
    return (
        f"{name}: the {in_a_row} steps from {step - in_a_row + 1} to {step} had a loss or gradient that is not finite; "
        "expected no more than config.train.max_skipped in a row. They changed nothing, and the newest checkpoint is "
        f"from before them. Look at their data, lower the learning rate (config.{name}.lr, config.{name}.mixer_lr) or "
        f"use float32 (config.dtype); to go on from that checkpoint, change the setting in {workdir}/config.json too."
    )


def _summary_line(job: Job, name: str, meta: dict[str, Any], trained_by: Job | None) -> dict[str, Any]:
    """A stage in summary.json. last_loss: the mean of the last steps; tokens_per_second: without compilation.

    peak_bytes: the most memory that the first device, on a CPU the process, had taken by the stage's end. rates: those
    that trained it, of the job trained_by; left out where they are not known any more.
    """
    recipe = job.run.stage(name)
    timed = meta["timed_steps"] * recipe.tokens_per_step
    return {
        "name": name,
        "trains": STAGES[name].trains,
        "loss": job.stage_plan(name).loss,
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.tokens_per_step,
        "seconds": meta["seconds"],
        "tokens_per_second": timed / meta["seconds"] if meta["seconds"] else None,
        "first_loss": meta["first_loss"],
        "last_loss": statistics.fmean(meta["last_losses"]) if meta["last_losses"] else None,
        "peak_bytes": meta.get("peak_bytes"),
        **({"rates": {rate: getattr(trained_by.run.stage(name), rate) for rate in sweep.RATES}} if trained_by else {}),
    }


def _show_start(job: Job, student: Params, teacher: Params) -> None:
    """Where the student's weights come from."""
    fresh, earlier = job.run.student.fresh_qkvo, job.earlier
    show(transfer_table(job.student, student, teacher, fresh_qkvo=fresh, earlier=earlier is not None))
    if earlier is not None:
        say(f"the converted layers begin with {earlier_mixers.described(earlier, job.student)}")


def _frozen_params(job: Job, name: str, teacher: TeacherWeights) -> Params:
    """The student's parameters that the stage reads and does not train; nothing is built where there are none."""
    if not job.run.stage(name).freeze:
        return {}
    return split_params(_student_before(job, name, teacher.held()), job.stage_plan(name).trains)[1]


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
        if job.run.student.init == "calibrated":
            params = _calibrated(job, params, teacher)
        if job.earlier is not None:
            params = overlay_params(params, earlier_mixers.load(job.earlier, job.student, job.mesh))
        _check_frozen(job, params)
        params = params if whole else aligned_alone(job.student, params)
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


def _calibrated(job: Job, mixers: Params, teacher: Params | None) -> Params:
    """The mixers by what the teacher does on the first stage's first batch, the same one at every continuation."""
    assert teacher is not None  # a run that converts has loaded it
    first = job.run.stages[0]
    rows = next(job.batches(first))
    if not hosts.agreed(int(has_queries(rows))):
        raise ValueError(
            "config.student.init is 'calibrated', and no document of the first batch is long enough to see where the "
            "teacher looks; expected some of more than 8 tokens. Bring longer ones, or leave init out."
        )
    batch = sharding.place_rows(job.mesh, rows, job.run.stage(first).batch_size)
    return calibrated(job.student, job.teacher, mixers, teacher, batch, job.run.student.calibrate, job.mesh)


def _check_frozen(job: Job, mixers: Params) -> None:
    """Raises ValueError where the mixers' weights that a stage freezes are not those that the run began with."""
    values: dict[str, list[float]] = {}
    for name, recipe in job.run.recipes.items():
        if recipe.freeze:
            _, frozen = split_params(mixers, job.stage_plan(name).trains)
            values |= fingerprint.of_values(path_leaves(frozen))
    if values:
        fingerprint.require_same_values(fingerprint.read(job.workdir).get("frozen", {}), values, job.workdir)
        fingerprint.remember(job.workdir, {"frozen": values})


def _stored_params(job: Job, checkpoints: Checkpoints, params: Params, step: int) -> Params:
    """The part of `params` that a checkpoint holds, read from it."""
    stored = checkpoints.shapes(step)
    wanted, _ = split_params(params, lambda path: f"params/{path}" in stored)
    return checkpoints.restore_params(step, placement.abstract(job.mesh, wanted, job.student))


def stage_directory(job: Job, name: str) -> storage.AnyPath:
    return job.workdir / "checkpoints" / name
