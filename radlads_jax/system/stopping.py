"""Ending a run by a signal: while it trains the first has it save and stop, and a second Ctrl-C ends it at once.

Before and after the training there is nothing to save, and the first ends it at once. Readers of its output may leave,
and its terminal may be closed.
"""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"


class Interrupted(RuntimeError):
    """The run was asked to stop, and has saved what it had. signum: the signal that asked; kept: what became of it."""

    def __init__(self, signum: int, where: str, kept: str = "which is saved"):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at {where}, {kept}; the same command continues there.")
        self.signum = signum


def leave_on_signals() -> None:
    """From here on one of SIGNALS ends the process with 128 + its number and a line that says so, at any moment.

    Nothing is lost by it, as by the second SIGINT in `stop_signals`. For a command line: it lasts until the process
    ends.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for signum in _heeded():
        signal.signal(signum, _do_nothing)
    threading.Thread(target=_watch, args=(reader, SIGNALS), daemon=True).start()


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which of SIGNALS has come first, if any.

    A SIGINT after that ends the process with 128 + SIGINT, even while its main thread waits for a device, for the
    compiler or for a bucket. Nothing is lost by it: what is being written then is not yet under its name. A signal
    that came when nobody asked any more is sent once again at the end, to whoever had it before.
    """
    received: list[int] = []
    told = False
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def note(signum: int, _: Any) -> None:
        received.append(signum)

    def first() -> int | None:
        nonlocal told
        told = bool(received)
        return received[0] if received else None

    before = {signum: signal.signal(signum, note) for signum in _heeded()}
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Python runs `note` when the main thread is back from compiled code; the number is in the pipe at once.
    watcher = threading.Thread(target=_watch, args=(reader, ()), daemon=True)
    watcher.start()
    try:
        yield first
    finally:
        signal.set_wakeup_fd(descriptor)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)
    if received and not told:
        signal.raise_signal(received[0])


def outlive_readers() -> None:
    """From here on the process goes on when nobody reads its output any more: behind `| head -1`, on a closed terminal.

    The first write that finds it so says it on stderr; all that follows is dropped. Metrics are files of their own.
    """
    _wrap_output(_go_on)


def leave_with_readers() -> None:
    """From here on the process ends, without a word and with 128 + SIGPIPE, when nobody reads its output any more.

    Not by the signal, which would also end it where a connection to a bucket or the hub breaks.
    """
    _wrap_output(lambda _: os._exit(128 + signal.SIGPIPE))


def _wrap_output(left: Callable[[int], None]) -> None:
    """left: what is done with the descriptor of stdout or stderr whose reader has left."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        # There is none where the shell has closed it.
        if stream is None:
            continue
        stream.flush()
        raw = io.BufferedWriter(_Output(stream.fileno(), left))
        # What the terminal has no character for is shown as an escape, and is no reason to end a run.
        text = io.TextIOWrapper(raw, encoding=stream.encoding, errors="backslashreplace", line_buffering=True)
        setattr(sys, name, text)


def _go_on(descriptor: int) -> None:
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
    with contextlib.suppress(OSError):
        os.write(2, b"nobody reads the output any more; going on without it.\n")


class _Output(io.FileIO):
    """A file descriptor, and what is done when its reader has left."""

    def __init__(self, descriptor: int, left: Callable[[int], None]):
        super().__init__(descriptor, "w", closefd=False)
        self._left = left

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # EIO is a terminal's that is gone.
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self._left(self.fileno())
            return len(data)


def leave(code: int, said: str) -> NoReturn:
    """Ends the process at once, from any thread and whatever the others do. said: on stderr."""
    cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
    # Nobody may be left to read it.
    with contextlib.suppress(OSError):
        os.write(2, f"{cursor}{said}".encode())
    os._exit(code)


def _heeded() -> list[signal.Signals]:
    """SIGNALS, but for SIGHUP where it is ignored: so nohup starts a run that is to outlive its terminal."""
    return [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


def _do_nothing(signum: int, _: Any) -> None:
    """Python writes a signal's number to the pipe only where it has a handler for it."""


def _watch(reader: int, ending: tuple[int, ...]) -> None:
    """ending: the signals that end the process; once one has asked for it, SIGINT does."""
    while number := os.read(reader, 1):
        if number[0] in ending:
            _leave(number[0])
        if number[0] in SIGNALS:
            ending = (signal.SIGINT,)


def _leave(signum: int) -> None:
    name = signal.Signals(signum).name
    leave(128 + signum, f"\nleaving at once by {name}; the same command continues from what is saved.\n")
