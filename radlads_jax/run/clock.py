"""What a stage takes while it trains."""

import math
import time
from typing import Any

from radlads_jax.run.metrics import is_spike, peak_bytes

# The mean of so many steps is what a summary calls the last loss.
_LOSSES_KEPT = 20


class Clock:
    """Time, losses and memory, carried over restarts in the checkpoints' meta; compilation and scores are not timed."""

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
        self.last_losses = [*self.last_losses[1 - _LOSSES_KEPT :], loss]
        return spike

    def meta(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "timed_steps": self.timed_steps,
            "first_loss": self.first_loss,
            "last_losses": self.last_losses,
            "peak_bytes": self.peak_bytes,
        }
