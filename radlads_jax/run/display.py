"""What a run shows on the terminal: sentences and tables, and how far a stage has come, as a bar or as plain lines."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from radlads_jax.system import hosts, terminal

_PLAIN_LINE_SECONDS = 30.0


def say(text: str) -> None:
    """Prints a sentence, once for all processes. Nothing of it is markup: a directory may be named [draft]."""
    if hosts.is_first():
        Console().print(text, markup=False, emoji=False, soft_wrap=True)


def show(table: Any) -> None:
    """Prints what rich can draw, once for all processes."""
    if hosts.is_first():
        terminal.tables().print(table)


class _Timer:
    """The time left, at the pace since the first report of a step: what came before holds the compilation."""

    def __init__(self, total: int):
        self.total = total
        self.first: tuple[int, float] | None = None

    def left(self, step: int) -> float | None:
        """Seconds from `step` to the last one; None before there is a pace."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        first_step, first_time = self.first
        if step >= self.total:
            return 0.0
        return (now - first_time) / (step - first_step) * (self.total - step) if step > first_step else None


class Bar:
    """A live progress bar."""

    def __init__(self, console: Console, stage: str, start: int, total: int):
        self.loss: float | None = None
        self._timer = _Timer(total)
        name, said = TextColumn("[bold]{task.description}"), TextColumn("{task.fields[said]}")
        self._progress = Progress(name, BarColumn(), MofNCompleteColumn(), said, console=console)
        self._task = self._progress.add_task(stage, total=total, completed=start, said="compiling")
        self._progress.start()

    def move(self, step: int, tokens_per_second: float | None, utilization: float | None) -> None:
        said = _describe(self.loss, tokens_per_second, utilization, self._timer.left(step))
        self._progress.update(self._task, completed=step, said=said)
        if step >= self._timer.total:
            self._progress.stop()

    def stop(self) -> None:
        self._progress.stop()


class Lines:
    """Plain lines for logs: the first report, the last step, and one every _PLAIN_LINE_SECONDS between."""

    def __init__(self, console: Console, stage: str, start: int, total: int):
        self.loss: float | None = None
        self._console, self._stage, self._total = console, stage, total
        self._timer = _Timer(total)
        self._printed: float | None = None
        self._print(start, f"starts after step {start}" if start else "starts")

    def move(self, step: int, tokens_per_second: float | None, utilization: float | None) -> None:
        left = self._timer.left(step)
        now = time.monotonic()
        if self._printed is not None and step < self._total and now - self._printed < _PLAIN_LINE_SECONDS:
            return
        self._printed = now
        self._print(step, _describe(self.loss, tokens_per_second, utilization, left))

    def stop(self) -> None:
        """Nothing to clear: lines stay."""

    def _print(self, step: int, said: str) -> None:
        line = f"{self._stage} {step}/{self._total}  {said}"
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _describe(
    loss: float | None, tokens_per_second: float | None, utilization: float | None, seconds_left: float | None
) -> str:
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4g}")
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
    if utilization is not None:
        parts.append(f"MFU {utilization:.1%}")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        parts.append(f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}")
    return "  ".join(parts)
