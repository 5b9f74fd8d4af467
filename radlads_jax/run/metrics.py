"""What a run says about itself while it trains: a JSON line per step, TensorBoard curves, a progress bar, MFU."""

import contextlib
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
import numpy as np
from absl import logging
from rich.console import Console

from pallas_kernels.chips import chip_of_kind
from radlads_jax.reporting.metrics_file import FILE_NAME, read_metrics
from radlads_jax.run.curves import Curves
from radlads_jax.run.display import Bar, Lines
from radlads_jax.run.wandb_curves import WandbCurves
from radlads_jax.system.storage import Mirror, access_errors, as_path
from radlads_jax.system.untrusted import brief

_SPIKE_NEEDS = 10
# Between two sendings of all that was logged, where the work directory is in a bucket.
_SEND_SECONDS = 60.0


class MetricsLogger:
    """Writes a run's metrics: workdir/metrics.jsonl, workdir/tensorboard/<stage>, and the console.

    Of several processes only the first writes. On a terminal there is a bar; elsewhere a plain line now and then.
    """

    def __init__(self, workdir: str | os.PathLike, *, console: Console | None = None, wandb: WandbCurves | None = None):
        self.workdir = as_path(workdir)
        self._mirror = Mirror(self.workdir)
        self._enabled = jax.process_index() == 0
        self._console = console or Console()
        self._wandb = wandb
        self._file: TextIO | None = None
        self._writer: Curves | None = None
        self._display: Bar | Lines | None = None
        self._stage: str | None = None
        self._last_step = 0
        self._unsent = False
        self._tokens_per_step = 0
        self._flops_per_token: float | None = None

    def begin(
        self, stage: str, start: int, total: int, *, tokens_per_step: int, flops_per_token: float | None = None
    ) -> None:
        """Opens a stage that continues after step `start` of `total`; what was logged beyond `start` is dropped.

        tokens_per_step: of the global batch. flops_per_token: of a whole training step, for MFU.
        """
        self._end_stage()
        self._stage, self._last_step = stage, start
        self._tokens_per_step, self._flops_per_token = tokens_per_step, flops_per_token
        if not self._enabled:
            return
        self._mirror.path.mkdir(parents=True, exist_ok=True)
        self._mirror.fetch(FILE_NAME)
        path = self._mirror.path / FILE_NAME
        logged = _drop_lines_beyond(path, stage, start)
        if self._wandb is not None:
            # A run of wandb's can not be cut: what an interrupted run logged beyond `start` stays, and counts.
            self._wandb.begin(stage, start, logged)
        self._file = path.open("a", encoding="utf-8")
        # purge_step hides the curves' points beyond `start` that an interrupted run left.
        self._writer = Curves(self._mirror.path / "tensorboard" / stage, purge_step=start + 1)
        self._display = (Bar if self._console.is_terminal else Lines)(self._console, stage, start, total)

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Records the values of one step, as {"stage", "step", "tokens", "time", **values}.

        tokens: seen by the stage so far. time: Unix seconds.
        values: scalars, or arrays [n] which become a list and go to the JSON line alone; what is not finite becomes
        null there.
        """
        if stage != self._stage or step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} of {stage} came after step {self._last_step} of {self._stage}; "
                "a stage's steps are logged once, in order. Call begin when a stage starts or continues."
            )
        self._last_step = step
        tokens = step * self._tokens_per_step
        self._write({"stage": stage, "step": step, "tokens": tokens, "time": round(time.time(), 3)}, values)

    def add(self, values: Mapping[str, Any]) -> None:
        """Records more values of the step that was logged last, in a line of their own with its stage and step."""
        self._write({"stage": self._stage, "step": self._last_step}, values)

    def _write(self, place: dict[str, Any], values: Mapping[str, Any]) -> None:
        if self._file is None or self._writer is None or self._display is None:
            return
        numbers = {name: np.asarray(value, np.float64).tolist() for name, value in values.items()}
        finite = {name: _finite(value) for name, value in numbers.items()}
        # A value of the same name, the tokens that one step's loss counted, gives way.
        self._file.write(json.dumps(place | finite | place) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            if not isinstance(value, list):
                self._writer.add_scalar(name, value, place["step"])
        if self._wandb is not None:
            self._wandb.log(place["stage"], place["step"], numbers)
        self._display.loss = numbers.get("loss", self._display.loss)

    def sync(self) -> None:
        """Has what was logged reach the bucket, or the disk itself, where a machine that is switched off leaves it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._send()

    def say(self, text: str, *, style: str = "yellow") -> None:
        """Prints a line, above the bar where there is one."""
        if self._enabled:
            self._console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def progress(self, step: int, tokens_per_second: float | None = None) -> None:
        """Moves the bar to `step` and shows the newest loss, the rate and the time left.

        tokens_per_second: of the whole run; also goes to TensorBoard, with MFU where the chip's peak is known.
        """
        if self._writer is None or self._display is None:
            return
        utilization = None
        if tokens_per_second is not None:
            self._writer.add_scalar("tokens_per_second", tokens_per_second, step)
            utilization = mfu(tokens_per_second, self._flops_per_token)
        if utilization is not None:
            self._writer.add_scalar("mfu", utilization, step)
        self._writer.flush()
        self._send(every=_SEND_SECONDS)
        self._display.move(step, tokens_per_second, utilization)

    def close(self) -> None:
        """Flushes and closes everything; may be called twice."""
        self._end_stage()
        self._mirror.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None

    def __enter__(self) -> "MetricsLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, *, every: float = 0.0) -> None:
        """Sends to the bucket; where that fails the training goes on, with one warning until it succeeds again."""
        try:
            if self._mirror.send(every=every):
                self._unsent = False
        except access_errors() as error:
            if not self._unsent:
                logging.warning(
                    "metrics and curves did not reach %s (%s); the run goes on, and tries again",
                    self.workdir,
                    brief(error) or type(error).__name__,
                )
            self._unsent = True

    def _end_stage(self) -> None:
        display, file, writer = self._display, self._file, self._writer
        self._display = self._file = self._writer = self._stage = None
        with contextlib.ExitStack() as stack:
            # All of them, in the reverse order, whatever one of them raises. The terminal first: a bar left running
            # hides the cursor and garbles a traceback. The bucket last.
            if writer is not None:
                stack.callback(self._send)
            if writer is not None:
                stack.callback(writer.close)
            if file is not None:
                stack.callback(file.close)
            if display is not None:
                stack.callback(display.stop)


def is_spike(loss: float, before: Sequence[float]) -> bool:
    """Whether a loss stands out above those of the steps before it.

    By more than six of their deviations (1.4826 times the median distance from the median, a normal distribution's
    deviation, but not moved by the spikes themselves) and by more than a tenth of their median; never with fewer than
    _SPIKE_NEEDS to compare with.
    """
    if len(before) < _SPIKE_NEEDS or not math.isfinite(loss):
        return False
    middle = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in before)
    return loss > middle + max(6 * deviation, 0.1 * abs(middle))


def _finite(value: Any) -> Any:
    """The number, or None where it is not finite; item by item for a list."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def peak_bytes() -> int:
    """The most memory taken so far: of the first device, or of this process where devices do not tell, as on a CPU."""
    told = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if told is not None:
        return int(told)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mfu(tokens_per_second: float, flops_per_token: float | None) -> float | None:
    """Model FLOPs utilization over all devices: tokens/s * FLOPs per token / (devices * peak); None where unknown."""
    chip = chip_of_kind(jax.devices()[0].device_kind)
    if chip is None or not flops_per_token:
        return None
    return tokens_per_second * flops_per_token / (chip.flops * jax.device_count())


def _drop_lines_beyond(path: Path, stage: str, start: int) -> int:
    """Rewrites the file without the stage's steps beyond `start` and a torn last line; returns the last it had."""
    if not path.exists():
        return 0
    records = read_metrics(path.parent)
    last = max((r["step"] for r in records if r["stage"] == stage), default=0)
    kept = [r for r in records if r["stage"] != stage or r["step"] <= start]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if path.read_text(encoding="utf-8", errors="replace") == text:
        return last
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return last
