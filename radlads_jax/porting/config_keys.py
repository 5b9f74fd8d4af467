"""Typed access to the JSON objects of a model directory; a missing or wrong-typed value is a ValueError."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST_DIM = 1 << 24
_REQUIRED = object()


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

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0, high: float = math.inf) -> float:
        """A finite number with low <= number <= high, and above 0."""
        value = self._get(key, default)
        is_number = type(value) in (int, float) and math.isfinite(value)
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
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        return ValueError(f"{self.where}: {key!r} is {shown}; expected {expected}. Correct it in the model's config.")


def read_config(directory: str | Path) -> dict[str, Any]:
    """The parsed config.json of a model directory; ValueError where it is missing or no JSON object."""
    return read_json(Path(directory) / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError naming the file where it is missing or something else."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; expected a Hugging Face model directory with this file. "
            "Give the directory that holds the model's config.json and *.safetensors."
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); expected one JSON object. Download the file again.") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a JSON {type(value).__name__}; expected one JSON object. Download the file again."
        )
    return value
