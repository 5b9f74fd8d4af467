"""TensorBoard curves, written where they are asked for.

tensorboardX's own SummaryWriter hands them to a thread by a short queue. An error in that thread, a full disk for one,
ends it unseen, and the training then waits for ever for room in the queue.
"""

import os
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Curves:
    """Scalars by name and step, in a new event file in `directory`, which is made when missing.

    purge_step: the step from which on TensorBoard hides what earlier files of the directory hold. Everything raises
    OSError where the file cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, *, purge_step: int):
        os.makedirs(directory, exist_ok=True)
        # The name's own time is in seconds, and a file of the same name would be written over.
        self._events = EventsWriter(os.path.join(directory, "events"), f".{time.time_ns()}")
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._write(Event(step=step, summary=scalar(name, value)))

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
