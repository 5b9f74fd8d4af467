"""A run's hold on its work directory: one run at a time, and no leftovers of the ones before."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Iterator
from typing import TextIO

import jax
from absl import logging
from etils import epath

from radlads_jax.system import hosts
from radlads_jax.system.storage import AnyPath, as_path, in_bucket, write_text

_LOCK = ".lock"
# Under these names files and directories are written before they get their own.
_UNFINISHED = (".seen-*", ".*.partial", "*/.*.partial", "metrics.tmp", "data/*.tmp-*")
# What a file system says that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps other runs out of the directory, and removes what interrupted writes have left there.

    The lock is a POSIX one on DIR/.lock, which the system takes back when the process ends, however it ends. It holds
    between processes of one machine, and between machines where the file system passes locks on, as NFS and Lustre do.
    A bucket has none, and nothing keeps a second run out of it. Of several processes of one run the first has the lock.
    Where the body leaves nothing, neither the lock nor directories made for it stay. Raises ValueError, in every
    process, where another run has it, and where the processes do not share the directory.
    """
    with contextlib.ExitStack() as stack:
        refused = _locked(as_path(workdir), stack) if hosts.is_first() else None
        if hosts.agreed(int(refused is not None)):
            raise ValueError(refused or f"process 0 could not begin in {workdir}, and says why.")
        _require_shared(as_path(workdir))
        if hosts.is_first():
            _remove_unfinished(workdir)
        yield


def require_free(workdir: pathlib.Path) -> None:
    """Raises ValueError where another process has this disk's directory."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((workdir / _LOCK).open("r+", encoding="utf-8"))
        except FileNotFoundError:
            return
        if refused := _taken(file, workdir):
            raise ValueError(refused)


def _require_shared(workdir: AnyPath) -> None:
    """Raises ValueError, in every process, where one of them does not see what the first one writes to the directory.

    Such a process finds no checkpoint, and begins what the others continue.
    """
    if jax.process_count() == 1:
        return
    # A name that nobody has asked for before: a network's file system may remember that it was not there.
    mark = workdir / hosts.said_by_first(f".seen-{uuid.uuid4().hex}")
    if hosts.is_first():
        write_text(mark, "")
    hosts.barrier()
    unseen = hosts.agreed(int(not mark.exists()))
    if hosts.is_first():
        mark.unlink()
    if unseen:
        raise ValueError(
            f"what process 0 wrote to {workdir} is not there for all processes; expected a work directory that all "
            "hosts share. Put it on a disk that all of them see, or in a bucket."
        )


def _remove_unfinished(workdir: str | os.PathLike) -> None:
    """Removes every file and directory that an interrupted write has left, each named in the log."""
    for pattern in _UNFINISHED:
        for path in sorted(as_path(workdir).glob(pattern)):
            logging.warning("removing the unfinished %s: its writing was interrupted", path)
            if path.is_dir():
                epath.Path(path).rmtree()
            else:
                path.unlink()


def _locked(workdir: AnyPath, stack: contextlib.ExitStack) -> str | None:
    """Takes the lock until the stack ends; returns what to say where it could not."""
    if in_bucket(workdir):
        return None
    directory = pathlib.Path(workdir)
    stack.callback(_remove_empty, [path for path in (directory, *directory.parents) if not path.exists()])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context((directory / _LOCK).open("a+", encoding="utf-8"))
    except OSError as error:
        return f"--workdir {workdir} cannot be written to: {error}. Choose another, or make room and give permission."
    if refused := _taken(file, workdir):
        return refused
    if not _still_named(file, directory / _LOCK):
        # A run that left nothing has removed it since it was opened: the lock on it would keep nobody out.
        return _locked(workdir, stack)
    stack.callback(_remove_lone_lock, directory)
    # Without these lines the lock holds as well: a full disk is for what follows to tell of.
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    return None


def _taken(file: TextIO, workdir: AnyPath) -> str | None:
    """Takes the lock on an open file; returns what to say where another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.seek(0)
            owner = file.read().strip() if error.errno in (errno.EACCES, errno.EAGAIN) else error
            return (
                f"{workdir} is in use by another run ({owner}); expected one run at a time in a work directory. Wait "
                "for its end or stop it, or choose another --workdir."
            )
        logging.warning("%s is on a file system without locks: nothing keeps a second run out of it", workdir)
    return None


def _still_named(file: TextIO, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_lone_lock(directory: pathlib.Path) -> None:
    """Comes before the lock is let go of, so that whoever has it by then finds that it is no longer there."""
    with contextlib.suppress(OSError):
        if os.listdir(directory) == [_LOCK]:
            (directory / _LOCK).unlink()


def _remove_empty(directories: list[pathlib.Path]) -> None:
    """Removes directories, each of them in the next, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()
