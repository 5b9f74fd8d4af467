"""Directories whose names hold *, ? or [ for epath, and so for Orbax.

etils' epath puts the directory's own name before the pattern of `glob`, unescaped: in "runs/[draft]" nothing is found,
and Orbax takes a checkpoint's parts for missing.
"""

import functools
import glob
import os
from collections.abc import Iterator
from typing import Any

from etils.epath import gpath

from radlads_jax.system.storage import in_bucket


@functools.cache
def install() -> None:
    """From here on epath's glob takes every character of the directory's name for itself."""
    gpath._GPath.glob = _glob


def _glob(self: Any, pattern: str) -> Iterator[Any]:
    if in_bucket(self):
        paths = self._backend.glob(f"{glob.escape(os.fspath(self))}/{pattern}")
        return (self._new(each) for each in paths)
    return (self / name for name in glob.iglob(pattern, root_dir=os.fspath(self)))
