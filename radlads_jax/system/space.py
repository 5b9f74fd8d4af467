"""Bytes: how many a disk has left, and how a number of them is written."""

import os
import shutil
from pathlib import Path

from radlads_jax.system.storage import in_bucket

_UNITS = ("kB", "MB", "GB", "TB")
# What three digits round to the next unit's one.
_NEXT_UNIT = 999.5


def free_bytes(directory: str | os.PathLike) -> int | None:
    """Free space on the disk of a directory, which need not be there yet; None for a bucket."""
    if in_bucket(directory):
        return None
    path = Path(directory).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def shown_bytes(count: int | float) -> str:
    """A number of bytes in powers of 1000, three digits: "3.07 kB"."""
    size, unit = float(count), "B"
    for larger in _UNITS:
        if size < _NEXT_UNIT:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if size < _NEXT_UNIT else f"{size:,.0f} {unit}"
