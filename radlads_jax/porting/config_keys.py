"""Typed access to the JSON objects of a model directory; a missing or wrong-typed value is a ValueError."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import as_path
from radlads_jax.system.untrusted import brief

_LARGEST_DIM = 1 << 24
_LARGEST_NUMBER = 1e15
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
            raise ValueError(
                f"{self.where} has no {key!r}; expected one, as all models have. Add the key and its value."
            )
        return default

    def _wrong(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(
            f"{self.where}: {key!r} is {brief(repr(value), 80)}; expected {expected}. Correct it in the model's config."
        )


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The parsed config.json of a model directory; ValueError where it is missing or no JSON object."""
    path = as_path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; expected a Hugging Face model directory with this file. "
            "Give the directory that holds the model's config.json and *.safetensors."
        )
    return read_json(path)
