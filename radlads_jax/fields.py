"""The fields of a run's settings: the values that one may hold, and those that follow others until they are set."""

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


class _Bounds(NamedTuple):
    """What a field may hold: one_of these, or a finite number of at least `least`, above `above` and below `below`."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    one_of: tuple[Any, ...] = ()

    def hold(self, value: Any) -> bool:
        if self.one_of:
            return value in self.one_of
        return self.least <= value and self.above < value < self.below

    def __str__(self) -> str:
        if self.one_of:
            *most, last = map(repr, self.one_of)
            return f"{', '.join(most)} or {last}"
        ends = [(self.least, "at least"), (self.above, "more than"), (self.below, "less than")]
        return "a number of " + " and ".join(f"{word} {end:g}" for end, word in ends if math.isfinite(end))


def bounded(default: Any, **bounds: Any) -> Any:
    """A dataclass field with a default and the _Bounds of its value."""
    return dataclasses.field(default=default, metadata={"bounds": _Bounds(**bounds)})


def with_placeholders(group: Any) -> dict[str, Any]:
    """A group's fields; for one that may be None, and is, a value that knows which type the command line is to give."""
    values = {}
    for name, hint in typing.get_type_hints(type(group)).items():
        value = getattr(group, name)
        if dataclasses.is_dataclass(value):
            value = with_placeholders(value)
        values[name] = placeholder(set_type(hint)) if value is None else value
    return values


def set_type(hint: Any) -> Any:
    """bool of bool | None; any other type as it is."""
    given = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return given[0] if isinstance(hint, types.UnionType) else hint


class _Computation(NamedTuple):
    fn: Callable[..., Any]
    args: Sequence[FieldReference]


class _Following(FieldReference):
    """A ConfigDict's field that is computed from others, as they are when it is read, until it is set itself."""

    @property
    def is_set(self) -> bool:
        return not self._ops


def follow(group: ConfigDict, name: str, rule: Callable[..., Any], *others: str) -> None:
    """Lets a field of the group be rule(the values of the others), unless a config file or the command line sets it."""
    kind = group.get_type(name)
    sources = [group.get_ref(other) for other in others]

    def computed(_: Any, *values: Any) -> Any:
        # A value of another type is refused when all fields are checked, for which this one must be read.
        sound = all(isinstance(value, source.get_type()) for value, source in zip(values, sources, strict=True))
        return rule(*values) if sound else kind()

    with group.unlocked():
        del group[name]
        group[name] = _Following(kind(), kind, _Computation(computed, sources))


def following(config: ConfigDict, where: str = "config") -> dict[str, tuple[ConfigDict, str]]:
    """The group and name of every field, by its path, that still follows others."""
    found: dict[str, tuple[ConfigDict, str]] = {}
    for name, value in config.items(preserve_field_references=True):
        path = f"{where}.{name}"
        if isinstance(value, ConfigDict):
            found |= following(value, path)
        elif isinstance(value, _Following) and not value.is_set:
            found[path] = (config, name)
    return found
