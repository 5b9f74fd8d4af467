"""Whether a teacher can do the prompts by which layers are chosen: windows take nothing from one that can not."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from radlads_jax.evaluation.intervals import wilson
from radlads_jax.evaluation.probes import Example
from radlads_jax.evaluation.swaps import Measured

# Standard errors by which a mean is below what a guess gives.
_CLEAR = 2.0


def of_kinds(kinds: Sequence[str], examples: Sequence[Example], teacher: Measured, vocab: int) -> list[dict[str, Any]]:
    """Of every kind of prompts (as many of each, one after the other) the teacher's answers beside a guess.

    "right": the share of its answers, "chance" that of always giving the same one; "nll" and "guess": nats a token, of
    the teacher and of a guess among the answers that the prompt offers, or among the whole vocabulary. "at the floor"
    where neither share nor NLL is above chance by more than its error.
    """
    of_each = len(examples) // len(kinds)
    return [
        _of_kind(kind, examples[begin : begin + of_each], teacher, begin, vocab)
        for kind, begin in zip(kinds, range(0, len(examples), of_each), strict=True)
    ]


def _of_kind(kind: str, examples: Sequence[Example], teacher: Measured, begin: int, vocab: int) -> dict[str, Any]:
    count = len(examples)
    nll, right = (values[begin : begin + count] for values in (teacher.nll, teacher.right))
    chance, guess = np.mean([e.chance for e in examples]), np.mean([_guess(e, vocab) for e in examples])
    knows = wilson(float(right.mean()), count)[0] > chance
    likely = nll.mean() + _CLEAR * nll.std() / count**0.5 < guess
    figures = {"right": right.mean(), "chance": chance, "nll": nll.mean(), "guess": guess}
    return {"kind": kind} | {name: float(x) for name, x in figures.items()} | {"at the floor": not (knows or likely)}


def _guess(example: Example, vocab: int) -> float:
    """Nats a token."""
    tokens = len(example.ids) - example.start
    return min(math.log(vocab), -math.log(example.chance) / tokens if example.chance else math.inf)


def counted(kinds: Sequence[Mapping[str, Any]], prompts: int) -> Bool[np.ndarray, " P"]:
    """Which of so many prompts say something: those of kinds that the teacher can do."""
    return np.repeat([not kind["at the floor"] for kind in kinds], prompts // len(kinds))


def warning(choice: Mapping[str, Any]) -> str:
    """What a choice by a teacher at the floor is worth, and what to do; "" where it can do all kinds."""
    low = [kind for kind in choice["recall"] if kind["at the floor"]]
    if not low:
        return ""
    figures = ", ".join(
        f"{k['kind']} {k['right']:.0%} right (chance {k['chance']:.0%}), NLL {k['nll']:.2f} (a guess {k['guess']:.2f})"
        for k in low
    )
    if len(low) < len(choice["recall"]):
        return f"The teacher is at chance in some prompts, which do not count: {figures}."
    return (
        f"The teacher is at chance in all of the prompts, so that nothing is known of recall and the layers are chosen "
        f"by KL on text alone: {figures}. Take even spacing (config.student.attention_every) or name the layers "
        "(config.student.attention_layers), unless KL is all that you want; or give a teacher that can answer."
    )
