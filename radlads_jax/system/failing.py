"""An error that one of several processes meets alone ends all of them, at once and with its exit code.

Otherwise the others stand in a collective, jax has the one wait for them before it may end, and after minutes all of
them abort, which a launcher takes for a host that was lost.
"""

import atexit
import contextlib
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # the processes' common store of keys has no public name

from radlads_jax.system.stopping import leave

_KEY = "radlads_jax/ended"
_POLL_SECONDS = 1.0
# Since the key is there, or was seen. All have time to see it, and to say what they met themselves; the store is in
# process 0, without which the others would abort.
_LEAVE_SECONDS, _FIRST_LEAVES_SECONDS = 2.0, 4.0

_client: Any = None
_has_said_why = threading.Event()


def watch() -> None:
    """From here on this process ends where another calls `end_all`. Comes when the processes have joined."""
    global _client
    if distributed.global_state.num_processes == 1:
        return
    _client, ended = distributed.global_state.client, threading.Event()
    thread = threading.Thread(target=_watch, args=(ended,), daemon=True)
    thread.start()

    def stop() -> None:
        ended.set()
        thread.join()

    # Runs before jax's own, which takes the client away: a thread that used it then would abort the process.
    atexit.register(stop)


def end_all(code: int) -> int:
    """Ends all processes with the code of the one that came here first; `code` itself where there is no other.

    Comes after the error has been told.
    """
    if _client is None:
        return code
    _has_said_why.set()
    sys.stdout.flush()
    sys.stderr.flush()
    # Another may have been the first, or the store is gone with process 0.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client.key_value_set(_KEY, f"{code} {distributed.global_state.process_id}")
    _leave(*(_ended() or (code, 0)))
    raise AssertionError("the process has ended")


def _watch(ended: threading.Event) -> None:
    while not ended.wait(_POLL_SECONDS):
        if (found := _ended()) is not None:
            _leave(*found)


def _ended() -> tuple[int, int] | None:
    """The exit code that all end with, and the process that says why; None where nobody has called `end_all`."""
    try:
        code, process = _client.key_value_try_get(_KEY).split()
    except jax.errors.JaxRuntimeError:
        return None
    return int(code), int(process)


def _leave(code: int, process: int) -> None:
    time.sleep(_LEAVE_SECONDS if distributed.global_state.process_id else _FIRST_LEAVES_SECONDS)
    leave(code, "" if _has_said_why.is_set() else f"error: process {process} could not go on, and says why.\n")
