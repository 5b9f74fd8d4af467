"""What a work directory says about its run, read for the report; nothing of it needs to be complete."""

import dataclasses
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from radlads_jax.config import StageConfig
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath, as_path

# A gap of so many times the usual is a pause of the run, not a slow step.
_PAUSE = 10
_PAUSE_SECONDS = 60.0
# Lines that a run writes together are nearer to each other than this.
_TOGETHER_SECONDS = 0.005
_LOSSES_MEANT = 20


@dataclasses.dataclass(frozen=True)
class StageLog:
    """A stage's records in order. recipe: its part of config.json, empty where there is none.

    log_every: how many lines the run writes together.
    """

    name: str
    records: tuple[dict[str, Any], ...]
    recipe: dict[str, Any]
    log_every: int = 1

    @property
    def steps_done(self) -> int:
        return self.records[-1]["step"] if self.records else 0

    @property
    def tokens_per_step(self) -> int | None:
        rows, length = (self.recipe.get(key) for key in ("batch_size", "seq_len"))
        return rows * length if isinstance(rows, int) and isinstance(length, int) and rows * length > 0 else None

    @property
    def steps_planned(self) -> int | None:
        if not self.tokens_per_step or not isinstance(self.recipe.get("tokens"), int):
            return None
        return StageConfig(**{key: self.recipe[key] for key in ("tokens", "batch_size", "seq_len")}).steps

    @property
    def x_unit(self) -> int:
        """What a step counts for on an x axis: its tokens, or 1 where they are not known."""
        return self.tokens_per_step or 1

    @property
    def x_name(self) -> str:
        return "tokens" if self.tokens_per_step else "steps"

    @property
    def x_end(self) -> float:
        return float(max(self.steps_planned or 0, self.steps_done, 1) * self.x_unit)

    def curve(self, key: str) -> list[tuple[float, float | None]]:
        """(x, value) of every record that has the metric; the value is None where it was not finite."""
        return [(float(r["step"] * self.x_unit), number(r[key])) for r in self.records if key in r]

    def layers(self) -> list[list[tuple[float, float | None]]]:
        """The curve of every recurrent layer's alignment error; empty in a stage that has none."""
        rows = [r for r in self.records if isinstance(r.get("layer_loss"), list)]
        count = max((len(r["layer_loss"]) for r in rows), default=0)
        return [
            [(float(r["step"] * self.x_unit), number(r["layer_loss"][i])) for r in rows if i < len(r["layer_loss"])]
            for i in range(count)
        ]

    def skipped(self) -> list[int]:
        """The steps whose loss or gradient was not finite, so that they changed nothing."""
        return [r["step"] for r in self.records if number(r.get("loss")) is None or r.get("finite", 1) == 0]

    def spikes(self) -> list[int]:
        """The steps whose loss stood out above those before them, as the run marked them."""
        return [r["step"] for r in self.records if r.get("spike")]

    def loss_at(self, *, last: bool) -> float | None:
        """The first finite loss, or the mean of the last _LOSSES_MEANT."""
        losses = [loss for r in self.records if (loss := number(r.get("loss"))) is not None]
        if not losses:
            return None
        return statistics.fmean(losses[-_LOSSES_MEANT:]) if last else losses[0]

    def _times_without_scores(self) -> list[tuple[int, float]]:
        """(step, second when its line was written), as if no time had gone by while the student was scored."""
        marks: list[tuple[int, float]] = []
        scoring = 0.0
        for record in self.records:
            if (written := number(record.get("time"))) is None:
                continue
            marks.append((record["step"], written - scoring))
            # A step is scored after its line is written.
            scoring += number(record.get("heldout_seconds")) or 0.0
        return marks

    def paces(self) -> list[tuple[float, float, float]]:
        """(x, steps, seconds) between the moments when lines were written; pauses and compilation are left out.

        So is the time of scores on held-out rows. A run writes the lines of some steps together, so only the first line
        of such a group tells a time.
        """
        marks = self._times_without_scores()
        apart = max(_TOGETHER_SECONDS, _usual_gap([t for _, t in marks], self.log_every) / 2)
        groups = marks[:1]
        for (_, before), (step, now) in itertools.pairwise(marks):
            if now - before >= apart:
                groups.append((step, now))
            else:
                groups[-1] = (step, groups[-1][1])
        pairs = itertools.pairwise(groups)
        gaps = [(last, last - first, end - begin) for (first, begin), (last, end) in pairs if last > first]
        if not gaps:
            return []
        usual = statistics.median_low([seconds / steps for _, steps, seconds in gaps])
        return [
            (float(last * self.x_unit), float(steps), seconds)
            for last, steps, seconds in gaps
            if seconds < _PAUSE_SECONDS + _PAUSE * usual * steps
        ]


@dataclasses.dataclass(frozen=True)
class RunLog:
    """A run as its work directory tells it; config, summary and evaluation are empty where their files are missing.

    The latter two also where the run goes on with more stages: they are of the student before those. trained: a
    summary's lines of stages, of such a one too. chosen_layers: the softmax layers, where the run chose them itself.
    converted_layers: those that it converts, where the teacher has recurrent ones itself.
    """

    workdir: AnyPath
    config: dict[str, Any]
    summary: dict[str, Any]
    stages: tuple[StageLog, ...]
    evaluation: dict[str, Any]
    chosen_layers: tuple[int, ...] = ()
    converted_layers: tuple[int, ...] = ()
    trained: tuple[dict[str, Any], ...] = ()

    @property
    def recurrent_layers(self) -> list[int]:
        """The layer that each alignment error belongs to: all but those that stay as they are."""
        if self.converted_layers:
            return list(self.converted_layers)
        student = self.config.get("student") or {}
        asked, every = student.get("attention_layers") or (), student.get("attention_every")
        kept = set(self.chosen_layers or (layer for layer in asked if isinstance(layer, int)))
        count = max((len(stage.layers()) for stage in self.stages), default=0)
        if every:
            return [layer for layer in range(2 * count + 1) if (layer + 1) % every][:count]
        return [layer for layer in range(count + len(kept)) if layer not in kept][:count]

    def stage_summary(self, name: str) -> dict[str, Any]:
        return next((line for line in self.trained if line.get("name") == name), {})


def read_run(workdir: str | os.PathLike) -> RunLog:
    """Reads config.json, metrics.jsonl, summary.json and evaluation.json (or the export's), as far as they are there.

    Raises ValueError where there is no run, or a file is broken.
    """
    directory = as_path(workdir)
    config, summary = _object(directory / "config.json"), _object(directory / "summary.json")
    evaluation = _object(directory / "evaluation.json") or _object(directory / "export" / "evaluation.json")
    trained = tuple(stage for stage in summary.get("stages") or () if isinstance(stage, dict))
    scored = [stage.get("name") for stage in trained]
    if scored and config.get("stages") and scored != list(config["stages"]):
        summary = evaluation = {}
    records = [record for record in read_metrics(directory) if _is_record(record)]
    if not config and not records:
        raise ValueError(
            f"{directory} holds no run (neither config.json nor metrics.jsonl); expected the --workdir of "
            "radlads_jax.launch. Check the path."
        )
    names = list(dict.fromkeys([*(config.get("stages") or ()), *(record["stage"] for record in records)]))
    every = max(int(number((config.get("train") or {}).get("log_every")) or 1), 1)
    stages = [
        StageLog(name, tuple(r for r in records if r["stage"] == name), config.get(name) or {}, every) for name in names
    ]
    converted = _numbers(_object(directory / "fingerprint.json").get("converted"))
    chosen = _chosen(directory, config)
    return RunLog(directory, config, summary, tuple(stages), evaluation, chosen, converted, trained)


def _chosen(directory: AnyPath, config: dict[str, Any]) -> tuple[int, ...]:
    """What choice.json holds, where the run was to choose."""
    asked = (config.get("student") or {}).get("attention_layers") or ()
    if not any(isinstance(layer, str) for layer in asked):
        return ()
    return _numbers(_object(directory / "choice.json").get("layers"))


def _numbers(layers: Any) -> tuple[int, ...]:
    return tuple(i for i in layers or () if isinstance(i, int))


def _object(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file of the run; empty where there is no file."""
    return read_json(path, "Remove the file, or restore it from the run.") if path.exists() else {}


def number(value: Any) -> float | None:
    """The value as a finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def ranges(steps: Iterable[int]) -> str:
    """Whole numbers in rising order as text: "3, 7 to 9"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1][1:] = [step]
        else:
            runs.append([step])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[1]}" for run in runs)


def _is_record(value: dict[str, Any]) -> bool:
    return isinstance(value.get("stage"), str) and isinstance(value.get("step"), int)


def _usual_gap(times: Sequence[float], together: int) -> float:
    """Seconds from line to line: the low median over windows of an eighth of the lines, which few pauses can't move.

    A window holds at least the `together` lines that are written at once; infinite where there are no more than those.
    """
    width = max(len(times) // 8, together)
    means = [(end - begin) / width for begin, end in zip(times, times[width:], strict=False)]
    return statistics.median_low(means) if means else math.inf
