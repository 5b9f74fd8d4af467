"""Multiple choice by letters, where a model may know a letter in place of an answer: the options are moved, and asked
for again.

With the options moved by r places, the pick of a model that knows the answer moves by r too, and over all r each letter
is picked as often; the pick of one that is stuck stays where it is. Tasks that score the options' own words have no
letters to be stuck on.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Documents of a task, or of each part of a group, that are asked again, each once less than it has options.
_DOCUMENTS = 50


class _Request(NamedTuple):
    """All that an adapter reads of lm-eval's Instance: a context and what may follow it."""

    args: tuple[str, str]


def best_constant(samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The score of always giving the same option, the one that is right most often; None where none is a number.

    Also where one is right in all: such a task lists the right one first, and no model is told the order.
    """
    targets = [sample["target"] for sample in samples]
    if not all(type(target) is int for target in targets) or len(set(targets)) < 2:
        return None
    return max(Counter(targets).values()) / len(targets)


def check(adapter: Any, parts: Sequence[tuple[Any, Sequence[Mapping[str, Any]]]]) -> dict[str, Any] | None:
    """Of the first documents: {"documents", "letter", "share", "follows", "stuck"}; None for tasks without letters.

    parts: a task and its samples; of a group all of them, whose picks count together. letter, share: the most picked
    one, and how often it is over all moves; follows: the share of moved picks that are of the same option as before.
    stuck: the share is above the middle between an even one and always. Of several sets of letters the most frequent
    one is asked.
    """
    questions = (_question(task, sample) for task, samples in parts for sample in samples[:_DOCUMENTS])
    asked = [question for question in questions if question is not None]
    if not asked:
        return None
    (common, _), *_ = Counter(tuple(letters) for letters, _ in asked).most_common(1)
    letters = list(common)
    picks = np.asarray([_picks(adapter, *question) for question in asked if question[0] == letters])
    counts = np.bincount(picks.ravel(), minlength=len(letters))
    share = float(counts.max() / counts.sum())
    # Moved by r, the option that was at i stands at i - r.
    options = (picks + np.arange(len(letters))) % len(letters)
    return {
        "documents": len(picks),
        "letter": letters[int(counts.argmax())].strip(),
        "share": share,
        "follows": float((options[:, 1:] == options[:, :1]).mean()),
        "stuck": share > (1 + 1 / len(letters)) / 2,
    }


def _question(task: Any, sample: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """The letters, and the contexts with the options moved by 0, 1, ... places; None where that can not be done."""
    pairs = [arguments[:2] for arguments in sample["arguments"]]
    # A text that is scored by itself has no context, and one that is to be written no letter.
    if not pairs or any(len(pair) < 2 or not isinstance(pair[1], str) for pair in pairs):
        return None
    contexts, letters = zip(*pairs, strict=True)
    if len(letters) < 2 or any(len(letter.strip()) != 1 for letter in letters) or len(set(contexts)) > 1:
        return None
    document, text = sample["doc"], task.doc_to_text(sample["doc"])
    field = _options_field(document, [letter.strip() for letter in letters])
    # At the end, or before what a chat template writes behind it.
    place = contexts[0].rfind(text) if isinstance(text, str) else -1
    if field is None or not text or place < 0:
        return None
    moved = [task.doc_to_text(_moved(document, field, places)) for places in range(len(letters))]
    if len(set(moved)) == 1:
        return None
    before, behind = contexts[0][:place], contexts[0][place + len(text) :]
    return list(letters), [before + other + behind for other in moved]


def _options_field(document: Mapping[str, Any], letters: Sequence[str]) -> tuple[str, ...] | None:
    """Where a document's options stand, a list of as many texts; None where that is nowhere, or not sure."""
    fields: list[tuple[str, ...]] = []
    for name, value in document.items():
        inner = value.items() if isinstance(value, Mapping) else ()
        fields += [(name,)] if _are_options(value, letters) else []
        fields += [(name, key) for key, values in inner if _are_options(values, letters)]
    return fields[0] if len(fields) == 1 else None


def _are_options(value: Any, letters: Sequence[str]) -> bool:
    are_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return are_texts and len(value) == len(letters) and list(value) != list(letters)


def _moved(document: Mapping[str, Any], field: tuple[str, ...], places: int) -> dict[str, Any]:
    name, *rest = field
    value = document[name]
    moved = _moved(value, tuple(rest), places) if rest else [*value[places:], *value[:places]]
    return {**document, name: moved}


def _picks(adapter: Any, letters: Sequence[str], contexts: Sequence[str]) -> list[int]:
    """The letter's number that is likeliest after each context."""
    pairs = [(context, letter) for context in contexts for letter in letters]
    answers = adapter.loglikelihood([_Request(pair) for pair in pairs], disable_tqdm=True)
    scores = np.asarray([score for score, _ in answers])
    return scores.reshape(len(contexts), len(letters)).argmax(1).tolist()


def warnings(tasks: Mapping[str, Mapping[str, Any]], roles: Sequence[str]) -> list[str]:
    """A sentence for each model that is stuck on a letter in a task. tasks: as `tasks.compare` gives them."""
    return [
        f"The {role} is stuck on {options['letter']} in {task}: {100 * options['share']:.0f}% of its picks, with the "
        f"options moved through all places ({options['documents']} documents), so that its score says nothing."
        for task, line in tasks.items()
        for role in roles
        if (options := line.get(role, {}).get("options")) and options["stuck"]
    ]
