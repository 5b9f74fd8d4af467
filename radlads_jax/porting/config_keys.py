"""Typed access to the JSON objects of a model directory; a missing or wrong-typed value is a ValueError."""

import dataclasses
import math
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from radlads_jax.system.storage import AnyPath, as_path, size
from radlads_jax.system.untrusted import brief, parse_json

_LARGEST_DIM = 1 << 24
_LARGEST_NUMBER = 1e15
_REQUIRED = object()
# Tokenizers are the largest, with some ten million.
_MAX_JSON_BYTES = 1 << 28
# A git-lfs pointer is a text of three lines.
POINTER_BYTES = 200
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class ConfigKeys:
    """Typed access to one JSON object; a null counts as absent, and an absent key without a default is an error."""

    values: Mapping[str, Any]
    where: str = "config.json"

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = _LARGEST_DIM) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0, high: float = _LARGEST_NUMBER) -> float:
        """A finite number with low <= number <= high, and above 0."""
        value = self._get(key, default)
        # An integer of any size is compared as it is; as a float it could overflow.
        is_number = type(value) is int or (type(value) is float and math.isfinite(value))
        if not is_number or not (low <= value <= high and value > 0):
            raise self._wrong(key, value, f"a finite number above 0, from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default)
        if type(value) is not str:
            raise self._wrong(key, value, "a string")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object or null")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.where} has no {key!r}; every supported model needs it. Add the key and its value.")
        return default

    def _wrong(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(
            f"{self.where}: {key!r} is {brief(repr(value), 80)}; expected {expected}. Correct it in the model's config."
        )


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The parsed config.json of a model directory; ValueError where it is missing or no JSON object."""
    return read_json(as_path(directory) / "config.json")


def read_json(path: AnyPath) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file where it is missing or something else."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; expected a Hugging Face model directory with this file. "
            "Give the directory that holds the model's config.json and *.safetensors."
        )
    if (bytes_there := size(path)) > _MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {bytes_there} bytes; expected at most {_MAX_JSON_BYTES} of JSON. Download the file again."
        )
    data = path.read_bytes()
    refuse_pointer(path, data)
    value = parse_json(data, path)
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}; expected one JSON object. Download the file again."
        )
    return value


def refuse_pointer(path: AnyPath, beginning: bytes) -> None:
    """Raises ValueError where a file, of which this is the beginning, is what git-lfs leaves in the place of one."""
    if beginning.startswith(_POINTER):
        kept = re.search(rb"size (\d+)", beginning)
        raise ValueError(
            f"{path} is a git-lfs pointer to a file of {int(kept[1]) if kept else 0} bytes, not the file; expected the "
            f"file itself. Fetch what the pointers stand for: git -C {shlex.quote(str(path.parent))} lfs pull"
        )
