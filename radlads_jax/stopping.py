"""Ending a run by a signal: the first asks it to save and stop, a second Ctrl-C ends the process at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = "\x1b[?25h"


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells which of SIGINT and SIGTERM has come first, if any.

    A SIGINT after that ends the process with 128 + SIGINT, even while its main thread waits for a device, for the
    compiler or for a bucket. Nothing is lost by it: what is being written then is not yet under its name.
    """
    received: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def note(signum: int, _: Any) -> None:
        received.append(signum)

    before = {signum: signal.signal(signum, note) for signum in SIGNALS}
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # Python runs `note` when the main thread is back from compiled code; the number is in the pipe at once.
    watcher = threading.Thread(target=_watch, args=(reader,), daemon=True)
    watcher.start()
    try:
        yield lambda: received[0] if received else None
    finally:
        signal.set_wakeup_fd(descriptor)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int) -> None:
    asked = False
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT and asked:
            _leave()
        asked = asked or number[0] in SIGNALS


def _leave() -> None:
    cursor = SHOW_CURSOR if sys.stderr.isatty() else ""
    os.write(2, f"{cursor}\nleaving at once; the same command continues from the newest checkpoint.\n".encode())
    os._exit(128 + signal.SIGINT)
