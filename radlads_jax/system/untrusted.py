"""What strangers' files say: parsed within bounds, and quoted in messages so that a terminal shows it as text."""

import collections
import json
from collections.abc import Collection
from typing import Any

_QUOTED_CHARACTERS = 120
_LISTED_NAMES = 12


def brief(value: Any, limit: int = _QUOTED_CHARACTERS) -> str:
    """The value's text on one line, cut after `limit` characters, with all that is not printable as an escape."""
    text = str(value)
    kept = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:limit])
    return kept if len(text) <= limit else f"{kept}..."


def listed(names: Collection[Any]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - _LISTED_NAMES
    first = [brief(name) for _, name in zip(range(_LISTED_NAMES), names, strict=False)]
    return ", ".join(first) + (f" and {more:,} more" if more > 0 else "")


def parse_json(text: str | bytes, where: Any, advice: str = "Download the file again.", *, strict: bool = False) -> Any:
    """The value of a JSON text; ValueError naming `where` for what is none, nested without end or a number without end.

    strict: also for what Python alone reads, NaN, Infinity and halves of surrogate pairs, and for a name that an object
    has twice, of which it reads the last.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if not strict:
            return json.loads(text)
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object_of_distinct)
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError as error:
        raise ValueError(f"{where} is JSON nested too deeply; expected a few levels. {advice}") from error
    # Also of bytes that are no UTF-8, and of numbers with more digits than Python reads.
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({brief(error)}); expected one JSON object. {advice}") from error


def _object_of_distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{brief(next(name for name, count in counts.items() if count > 1))!r} is given twice")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
