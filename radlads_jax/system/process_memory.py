"""Keeps a process from growing with every checkpoint.

What tensorstore makes for Python out of its JSON has one reference too many in _VERSIONS, and stays for as long as the
process lives. Orbax asks for such values in two places. No issue of github.com/google/tensorstore is about it yet.

glibc gives threads heaps of their own, up to eight for a core. What a checkpoint's threads take from one and free is
rarely reused by those that run next, so that with every save a little more of each heap has been touched.
"""

import ctypes
import functools
import importlib.metadata
import os
import platform
import re
from typing import Any

import tensorstore

HEAPS = 4
# The first and the last in which it was measured. tests/test_process_memory.py tells whether a later one needs it.
_VERSIONS = ((0, 1, 76), (0, 1, 86))
_M_ARENA_MAX = -8


@functools.cache
def install() -> None:
    """Holds from here on until the process ends; for the heaps best before there are many threads."""
    if needed(importlib.metadata.version("tensorstore")):
        tensorstore.KvStore.Spec.to_json = _file_spec_to_json  # type: ignore[method-assign]
        # Two lists of counters a save, for a line in Orbax's log.
        tensorstore.experimental_collect_matching_metrics = lambda *_, **__: []
    chosen = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and not chosen:
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, HEAPS)


def needed(version: str) -> bool:
    """Whether this tensorstore is one of those that keep too many references."""
    first, last = _VERSIONS
    return first <= tuple(int(part) for part in re.findall(r"\d+", version)[:3]) <= last


_to_json = tensorstore.KvStore.Spec.to_json


def _file_spec_to_json(self: tensorstore.KvStore.Spec, include_defaults: bool = False) -> Any:
    """KvStore.Spec.to_json. Orbax takes that of a plain directory, for every array of a save."""
    plain = {"driver": "file", "path": self.path}
    if not include_defaults and self == tensorstore.KvStore.Spec(plain):
        return plain
    return _to_json(self, include_defaults=include_defaults)
