"""Files that hold one JSON object: read within bounds, written whole, told by a short hash."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

from radlads_jax.system.storage import AnyPath, size, write_text
from radlads_jax.system.untrusted import parse_json

# Tokenizers are the largest, with some ten million.
_MAX_BYTES = 1 << 28
# A git-lfs pointer is a text of three lines.
POINTER_BYTES = 200
_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: AnyPath, advice: str = "Download the file again.") -> dict[str, Any]:
    """A file's JSON object; ValueError naming the file, and ending in `advice`, where it is missing or no object."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a file with one JSON object. {advice}")
    if (bytes_there := size(path)) > _MAX_BYTES:
        raise ValueError(f"{path} has {bytes_there} bytes; expected at most {_MAX_BYTES} of JSON. {advice}")
    data = path.read_bytes()
    refuse_pointer(path, data)
    value = parse_json(data, path, advice)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected one JSON object. {advice}")
    return value


def write_json(path: AnyPath, value: Mapping[str, Any], *, indent: int = 2, ascii_only: bool = True) -> None:
    """Writes a file's JSON object, whole or not at all. ascii_only: what is beyond ASCII is escaped."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=ascii_only) + "\n")


def digest(value: Any) -> str:
    """A short hash of what JSON can say, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def refuse_pointer(path: AnyPath, beginning: bytes) -> None:
    """Raises ValueError where a file, of which this is the beginning, is what git-lfs leaves in the place of one."""
    if beginning.startswith(_POINTER):
        kept = re.search(rb"size (\d+)", beginning)
        raise ValueError(
            f"{path} is a git-lfs pointer to a file of {int(kept[1]) if kept else 0} bytes, not the file; expected the "
            f"file itself. Fetch what the pointers stand for: git -C {shlex.quote(str(path.parent))} lfs pull"
        )
