"""The fields of a run's settings: the values that one may hold, and those that follow others until they are set."""

import dataclasses
import difflib
import math
import re
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
        said = [f"{word} {end:{',' if isinstance(end, int) else 'g'}}" for end, word in ends if math.isfinite(end)]
        return f"a number of {' and '.join(said)}"


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
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if isinstance(hint, types.UnionType) else hint


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
    fields: dict[str, tuple[ConfigDict, str]] = {}
    for name, value in config.items(preserve_field_references=True):
        path = f"{where}.{name}"
        if isinstance(value, ConfigDict):
            fields |= following(value, path)
        elif isinstance(value, _Following) and not value.is_set:
            fields[path] = (config, name)
    return fields


def check_bounds(where: str, group: Any) -> None:
    """Raises ValueError for the first field of a group that holds what its bounds do not allow."""
    for field in dataclasses.fields(group):
        bounds, value = field.metadata.get("bounds"), getattr(group, field.name)
        require(bounds is None or bounds.hold(value), f"{where}.{field.name}", value, str(bounds))


def require(fine: bool, field: str, got: Any, expected: str) -> None:
    """Raises ValueError naming the field, what was got and what is expected, unless all is fine."""
    if not fine:
        raise ValueError(f"{field} is {got!r}; expected {expected}.")


def check_regex(field: str, pattern: str) -> None:
    """Raises ValueError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} holds {pattern!r}, which is no regular expression ({error}).") from error


def type_of(cls: type, name: str, where: str) -> Any:
    """The type of a group's field. Raises ValueError naming the nearest for one that it lacks."""
    hints = typing.get_type_hints(cls)
    if name not in hints:
        raise ValueError(f"{where}.{name} is not a field{nearest(name, hints)}")
    return hints[name]


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A group of values, each of its field's type. Raises ValueError naming the field that is not."""
    return cls(**typed(cls, values, where))


def typed(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values as their fields' types have them. Raises ValueError naming the field that is not."""
    hints = {name: type_of(cls, name, where) for name in values}
    return {k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()}


def parse(text: str, kind: type, where: str) -> Any:
    """A bool or a number as a command line has it. Raises ValueError naming the field for what is none."""
    if kind is bool:
        require(text.lower() in ("", "1", "0", "true", "false"), where, text, "true or false")
        return text.lower() in ("", "1", "true")
    try:
        return kind(text)
    except ValueError as error:
        expected = "a whole number such as 200000" if kind is int else "a number such as 1e-5"
        raise ValueError(f"{where} is {text!r}; expected {expected}.") from error


def parse_arg(arg: str | None, **known: Any) -> ConfigDict:
    """Reads "name=value,name=value" (the part behind the colon in --config file.py:arg) with `known` as defaults."""
    values = dict(known)
    for part in filter(None, (arg or "").split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise ValueError(f"the config's argument {key!r} is not known{nearest(key, known)}")
        values[key] = parse(text, type(known[key]), f"the config's argument {key}")
    return ConfigDict(values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; expected a group of fields.")
        return build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise ValueError(f"{where} is {value!r}; expected a tuple of {set_type(item).__name__}.")
        # What "--config.name=" comes as.
        if list(value) == [""]:
            return ()
        return tuple(_convert(item, v, where) for v in value)
    if typing.get_origin(hint) is dict:
        return dict(value)
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    # One of several types.
    if isinstance(hint, types.UnionType) and type(value) in typing.get_args(hint):
        return value
    hint = set_type(hint)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}); expected {hint.__name__}.")
    return value


def nearest(name: str, known: Any) -> str:
    """The end of a message about a name that is not known."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}."
