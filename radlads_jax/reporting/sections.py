"""The page of a run: what it holds, section by section."""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from radlads_jax.reporting.charts import Curve, Real, heat_height, heat_map, line_chart, short
from radlads_jax.reporting.page import (
    amount,
    charts,
    digits,
    duration,
    facts,
    none,
    page,
    percent,
    progress,
    table,
    tiles,
)
from radlads_jax.reporting.quality import evaluation, quality, samples
from radlads_jax.reporting.run_log import RunLog, StageLog, number, ranges, read_run
from radlads_jax.student import Student
from radlads_jax.system import storage
from radlads_jax.system.space import shown_bytes


def write_report(
    workdir: str | os.PathLike,
    *,
    usd_per_hour: Real | None = None,
    losses: Mapping[str, str] | None = None,
    mixers: Mapping[str, str] | None = None,
) -> storage.AnyPath:
    """Writes the page from what the directory holds so far; returns its path.

    usd_per_hour: price of the whole machine, for the cost. losses: what each stage's loss is, in words. mixers: what
    each mixer is called, where not by its setting. Raises ValueError where there is no run.
    """
    html = _report_html(read_run(workdir), usd_per_hour, losses or {}, mixers or {})
    path = storage.as_path(workdir) / "report" / "index.html"
    path.parent.mkdir(exist_ok=True)
    storage.write_text(path, html)
    return path


def _report_html(run: RunLog, usd_per_hour: Real | None, losses: Mapping[str, str], mixers: Mapping[str, str]) -> str:
    """The page as text. Whatever comes from the run is escaped."""
    teacher, student = _names_of(run, mixers)
    title = f"{Path(teacher).name or 'A run from scratch'} to {student}" if teacher or student else run.workdir.name
    trained = [stage for stage in run.stages if stage.records]
    sections = [
        ("quality", "Student beside teacher", quality(run)),
        ("evaluation", "Evaluation", evaluation(run.evaluation)),
        ("samples", "Samples", samples(run.summary.get("samples") or [])),
        ("stages", "Stages", _stages_table(run)),
        ("loss", "Loss", _loss_charts(trained, losses)),
        *_held_out(trained),
        ("rates", "Learning rate", _rate_charts(trained)),
        ("alignment", "Alignment error by layer", _alignment(run)),
        ("gradient", "Gradient norm", _one_chart_each(trained, "grad_norm", "norm before the clip")),
        ("throughput", "Throughput", _throughput(trained)),
        ("skipped", "Skipped steps and spikes", _skipped(trained) + _spikes(trained)),
        ("memory", "Memory and cost", _memory(run) + _cost(run, usd_per_hour)),
        ("recipe", "Recipe and data", _recipe(run, mixers)),
    ]
    return page(title, sections, _head(run))


def _names_of(run: RunLog, mixers: Mapping[str, str]) -> tuple[str, str]:
    """The teacher's path and the student's mixer as one says them."""
    teacher = str((run.config.get("teacher") or {}).get("path") or "")
    mixer = str((run.config.get("student") or {}).get("mixer") or "")
    return teacher, mixers.get(mixer, mixer)


def _head(run: RunLog) -> str:
    """Where the run stands, and its figures in large."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    state = "finished" if run.summary else _where(run)
    line = f'<p class="soft">{escape(str(run.workdir))}: {escape(state)}. Page written {written}.</p>'
    student, control = run.summary.get("student") or {}, run.summary.get("control") or {}
    answers = [score for score in (run.summary.get("answers") or {}).get("scores", []) if "teacher" in score]
    done = sum(stage.steps_done * (stage.tokens_per_step or 0) for stage in run.stages)
    planned = sum(stage.x_end for stage in run.stages if stage.steps_planned)
    figures = [
        ("top-1 relative to the teacher", percent(run.summary.get("relative_top1"))),
        ("KL to the teacher, held-out text", digits(student.get("kl"))),
        ("KL of the untrained control, a window in the converted layers", digits(control.get("kl"))),
        ("same top-1 as the teacher", percent(student.get("agreement"))),
        *((_answered(score), percent(score["student"])) for score in answers),
        (f"of {amount(planned)} tokens" if planned else "tokens", amount(done or None)),
        ("training time", duration(sum(filter(None, (_seconds(run, s) for s in run.stages))) or None)),
    ]
    return line + tiles([(name, value) for name, value in figures if value])


def _answered(score: Mapping[str, Any]) -> str:
    """What was asked, and what the other models say."""
    others = ", ".join(f"{name} {score[name]:.0%}" for name in ("teacher", "control") if name in score)
    return f"{score['what']} ({others})"


def _where(run: RunLog) -> str:
    begun = [stage for stage in run.stages if stage.records]
    if not begun:
        return "no step logged yet"
    last = begun[-1]
    of = f" of {last.steps_planned:,}" if last.steps_planned else ""
    return f"unfinished, at step {last.steps_done:,}{of} of {last.name}"


def _stages_table(run: RunLog) -> str:
    """How far every stage has come, and how fast."""
    rows = []
    for stage in run.stages:
        of = f" / {stage.steps_planned:,}" if stage.steps_planned else ""
        bar = progress(stage.steps_done, stage.steps_planned)
        losses = (digits(stage.loss_at(last=last)) or "-" for last in (False, True))
        tokens = amount(stage.steps_done * stage.tokens_per_step) if stage.tokens_per_step else None
        pace, taken = _tokens_per_second(run, stage), duration(_seconds(run, stage))
        speed = "" if pace is None else f"{pace:,.0f}"
        done = f"{bar}{stage.steps_done:,}{of}"
        rows.append([escape(stage.name), done, tokens or "-", *losses, speed or "-", taken or "-"])
    columns = ["stage", "steps", "tokens", "first loss", "last loss", "tokens/s", "time"]
    notes = ["The last loss is the mean of 20 steps at most."]
    if earlier := number((run.summary.get("earlier") or {}).get("tokens")):
        notes.append(f"The mixers began as {amount(earlier)} tokens of an earlier run's stage 1 left them.")
    return table(columns, rows) + f'<p class="soft">{" ".join(notes)}</p>'


def _loss_charts(stages: Sequence[StageLog], losses: Mapping[str, str]) -> str:
    if not stages:
        return none("No step logged yet.")
    figures = []
    for stage in stages:
        marks = [float(step * stage.x_unit) for step in stage.skipped()]
        what = losses.get(stage.name, "loss")
        figures.append(_chart(stage, [Curve("loss", stage.curve("loss"))], what, marks=marks))
    return charts(figures) + '<p class="soft">Many steps are drawn as their mean with their range as a shade.</p>'


def _held_out(stages: Sequence[StageLog]) -> list[tuple[str, str, str]]:
    """The student's scores while it trained, where config.train.eval_every asked for them."""
    text = {"kl": "KL to the teacher", "relative_top1": "top-1 relative to the teacher's", "loss": "loss"}
    tales = {"facts_recalled": "facts recalled", "lists_repeated": "lists repeated", "counts": "counts"}
    kinds = {f"heldout_{key}": f"held-out text: {what}" for key, what in text.items()}
    kinds |= {f"heldout_{key}": f"made-up tales: {what}" for key, what in tales.items()}
    figures = [
        _chart(stage, [Curve(what, points)], what)
        for stage in stages
        for key, what in kinds.items()
        if (points := stage.curve(key))
    ]
    return [("heldout", "Held-out text while training", charts(figures))] if figures else []


def _rate_charts(stages: Sequence[StageLog]) -> str:
    figures = []
    for stage in stages:
        mixers, rest = stage.curve("lr_mixer"), stage.curve("lr_rest")
        curves = [Curve("mixers", mixers), Curve("everything else", rest, 2)]
        figures.append(_chart(stage, curves[:1] if mixers == rest else curves, "learning rate"))
    return charts(figures) if figures else none("No step logged yet.")


def _one_chart_each(stages: Sequence[StageLog], key: str, what: str) -> str:
    """A chart of one metric for every stage that has it."""
    figures = [_chart(stage, [Curve(what, points)], what) for stage in stages if (points := stage.curve(key))]
    return charts(figures) if figures else none("Nothing logged.")


def _alignment(run: RunLog) -> str:
    """The layers' errors over time, and the first beside the last by layer."""
    stage = next((stage for stage in run.stages if stage.layers()), None)
    if stage is None:
        return none("Logged in stage 1, which this run has not begun or does not have.")
    layers = list(zip(run.recurrent_layers, stage.layers(), strict=True))
    what = f"{stage.name}'s error"
    over_time = heat_map(
        "Every layer over time",
        [(str(layer), points) for layer, points in layers],
        what=what,
        x_name=stage.x_name,
        x_end=stage.x_end,
    )
    ends = [
        Curve(name, [(float(layer), _mean_of(points[part])) for layer, points in layers], color)
        for name, part, color in (("first step", slice(0, 1), 2), ("last steps, at most 20", slice(-20, None), 1))
    ]
    by_layer = line_chart(
        "First and last steps", ends, what=what, x_name="layer", x_end=layers[-1][0], height=heat_height(len(layers))
    )
    return charts([over_time, by_layer])


def _throughput(stages: Sequence[StageLog]) -> str:
    figures = []
    for stage in stages:
        points = [(x, steps * stage.x_unit / seconds) for x, steps, seconds in stage.paces()]
        if points:
            unit = f"{stage.x_name} per second"
            figures.append(_chart(stage, [Curve(unit, points, 3)], unit, from_zero=True))
    if not figures:
        return none("Too few steps logged yet.")
    return charts(figures) + '<p class="soft">From the times of the log lines, pauses left out.</p>'


def _skipped(stages: Sequence[StageLog]) -> str:
    """The steps that were not finite."""
    rows = [[escape(stage.name), f"{len(steps):,}", ranges(steps)] for stage in stages if (steps := stage.skipped())]
    if not rows:
        return (
            '<p class="good">None: every step had a finite loss and gradient.</p>' if stages else none("No step yet.")
        )
    said = "Their loss or gradient was not finite, so they changed no weight."
    return table(["stage", "skipped", "which"], rows) + f'<p class="soft">{said}</p>'


def _spikes(stages: Sequence[StageLog]) -> str:
    """The steps whose loss stood out."""
    rows = [[escape(stage.name), f"{len(steps):,}", ranges(steps)] for stage in stages if (steps := stage.spikes())]
    if not rows:
        return ""
    said = "Their loss lay far above those of the 20 steps before: six deviations, and a tenth of it."
    return table(["stage", "spikes", "which"], rows) + f'<p class="soft">{said}</p>'


def _memory(run: RunLog) -> str:
    """The most memory that was taken by the end of every stage."""
    peaks = [(stage.name, number(run.stage_summary(stage.name).get("peak_bytes"))) for stage in run.stages]
    rows = [[escape(name), shown_bytes(size)] for name, size in peaks if size]
    if not rows:
        return none("Measured when the run has finished.")
    said = "Of the first device, on a CPU of the process, from the run's start on."
    return table(["stage", "peak memory"], rows) + f'<p class="soft">{said}</p>'


def _cost(run: RunLog, usd_per_hour: Real | None) -> str:
    seconds = sum(filter(None, (_seconds(run, stage) for stage in run.stages)))
    if usd_per_hour is None or not seconds:
        return ""
    usd = seconds / 3600 * usd_per_hour
    said = f"{duration(seconds)} of training without compilation, at USD {usd_per_hour:,.2f} an hour:"
    return f"<p>{said} <b>USD {usd:,.2f}</b></p>"


def _recipe(run: RunLog, mixers: Mapping[str, str]) -> str:
    """The settings one asks for first; all of them below, folded."""
    if not run.config:
        return none("The directory has no config.json.")
    teacher, student = _names_of(run, mixers)
    data, student_config = run.config.get("data") or {}, run.config.get("student") or {}
    chosen = dataclasses.asdict(Student())
    switches = {k: v for k, v in student_config.items() if v not in ("", [], None, chosen.get(k)) and k != "mixer"}
    if run.chosen_layers:
        switches["attention_layers"] = (
            f"{', '.join(map(str, run.chosen_layers))} ({_plain(switches['attention_layers'])})"
        )
    apart = "see each other" if data.get("cross_document") else "are kept apart"
    lines = [
        ("teacher", teacher),
        ("student", ", ".join([student, *(f"{k}: {_plain(v)}" for k, v in switches.items())])),
        ("data", " ".join(str(data.get(key) or "") for key in ("source", "path", "name", "split")).strip()),
        ("rows", f"documents in a row {apart}; {data.get('eval_rows')} rows are held out"),
        ("computed in", f"{run.config.get('dtype')}, teacher in {(run.config.get('teacher') or {}).get('dtype')}"),
        ("seed", str(run.config.get("seed", ""))),
    ]
    columns = ["stage", "tokens", "row length", "rows", "rate of mixers", "rate of the rest", "warm-up", "frozen"]
    rows = [_recipe_row(stage, run.stage_summary(stage.name)) for stage in run.stages if stage.recipe]
    whole = escape(json.dumps(run.config, indent=2, sort_keys=True, ensure_ascii=False))
    return facts(lines) + table(columns, rows) + f"<details><summary>All settings</summary><pre>{whole}</pre></details>"


def _recipe_row(stage: StageLog, summary: Mapping[str, Any]) -> list[str]:
    # The rates of a sweep are not the recipe's.
    values = stage.recipe | (summary.get("rates") or {})
    untried = " (its sweep's middle)" if stage.recipe.get("sweep") and "rates" not in summary else ""

    def rate(prefix: str) -> str:
        first, last = (number(values.get(f"{prefix}{end}")) for end in ("", "_final"))
        shown = [short(value) for value in (first, last) if value is not None]
        return (" to ".join(dict.fromkeys(shown)) or "-") + untried

    tokens = amount(number(values.get("tokens"))) or "-"
    cells = [stage.name, tokens, *(_plain(values.get(key)) for key in ("seq_len", "batch_size"))]
    cells += [rate("mixer_lr"), rate("lr"), f"{_plain(values.get('warmup_steps'))} steps", _plain(values.get("freeze"))]
    return [escape(cell) for cell in cells]


def _chart(stage: StageLog, curves: Sequence[Curve], what: str, **options: Any) -> str:
    return line_chart(stage.name, curves, what=what, x_name=stage.x_name, x_end=stage.x_end, **options)


def _seconds(run: RunLog, stage: StageLog) -> float | None:
    """Seconds of training without compilation and pauses: as the run timed them, else from the log lines."""
    timed = number(run.stage_summary(stage.name).get("seconds"))
    return timed if timed else sum(seconds for _, _, seconds in stage.paces()) or None


def _tokens_per_second(run: RunLog, stage: StageLog) -> float | None:
    timed = number(run.stage_summary(stage.name).get("tokens_per_second"))
    paces = stage.paces()
    if timed or not paces or not stage.tokens_per_step:
        return timed
    return stage.tokens_per_step * sum(steps for _, steps, _ in paces) / sum(seconds for _, _, seconds in paces)


def _mean_of(points: Sequence[tuple[float, float | None]]) -> float | None:
    values = [y for _, y in points if y is not None]
    return statistics.fmean(values) if values else None


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
