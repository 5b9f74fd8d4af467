"""The order in which a TPU kernel's work is written down: routines take turns.

The compiler fills a cycle's slots from what stands near in the program. So work that keeps one unit busy (exponentials,
products) has to stand beside other heads' work for the others, and what depends on each other some way apart.
"""

from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

_T = TypeVar("_T")
# Pauses at each yield, and returns its result.
Routine = Generator[None, None, _T]


def each(results: Iterable[_T]) -> Routine[list[_T]]:
    """All results, with a pause after each."""
    made = []
    for result in results:
        made.append(result)
        yield
    return made


def staggered(routines: Sequence[Routine[_T]], lag: int) -> Routine[list[_T]]:
    """The routines' results: they take turns, with a pause after each; one starts `lag` turns after the one before."""
    results: dict[int, _T] = {}
    turn = 0
    while len(results) < len(routines):
        for index, routine in enumerate(routines[: turn // lag + 1]):
            if index in results:
                continue
            try:
                next(routine)
            except StopIteration as end:
                results[index] = end.value
            yield
        turn += 1
    return [results[index] for index in range(len(routines))]


def finished(routine: Routine[_T]) -> _T:
    """The result, without a pause."""
    while True:
        try:
            next(routine)
        except StopIteration as end:
            return end.value
