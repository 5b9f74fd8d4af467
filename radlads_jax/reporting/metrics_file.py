"""metrics.jsonl, the log of a run, read back."""

import json
import os
from typing import Any

from radlads_jax.system.storage import as_path

FILE_NAME = "metrics.jsonl"


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of workdir/metrics.jsonl in order, without a last line that a killed run left unfinished.

    One for each step: a line of the same stage and step as the one before it adds to that one. Raises ValueError for a
    broken line before the last one.
    """
    path = as_path(workdir) / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}). Remove the line to go on.") from error
        if records and all(records[-1].get(key) == record.get(key) for key in ("stage", "step")):
            records[-1] |= record
        else:
            records.append(record)
    return records
