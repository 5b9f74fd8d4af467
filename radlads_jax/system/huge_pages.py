"""Huge pages for a command's memory.

A step's arrays are new to the process at every step, and the kernel hands them out and clears them by pages of 4 KiB: a
sixth of the processor time of a step on CPU. By pages of 2 MiB that is next to nothing.
"""

import contextlib
import os
import platform
import sys
from pathlib import Path

_NAME = "glibc.malloc.hugetlb"
_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def on_request() -> bool:
    """Whether this system gives huge pages where a program asks for them, and glibc can."""
    try:
        return platform.libc_ver()[0] == "glibc" and _SYSTEM.is_file() and "[madvise]" in _SYSTEM.read_text()
    except OSError:
        return False


def setting() -> dict[str, str]:
    """The environment in which glibc's malloc asks for huge pages; empty where it need not, cannot or has been told."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _NAME in tunables or not on_request():
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{_NAME}=1")))}


def restart_with() -> None:
    """Begins this command anew with `setting`, which glibc reads as a process starts.

    Where that is empty, or the system does not let a process begin anew, it goes on without.
    """
    if not (sys.executable and (change := setting())):
        return
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | change)
