"""Long-context probes that need no download: pass key, one needle of many, recall, variables, copying, plain text.

Contexts are put together from token ids, so that their lengths are known.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from radlads_jax.data import synthetic
from radlads_jax.data.tokenise import Framing, before_all, prompt_beginning, tokenised
from radlads_jax.system import storage

# What a part stands behind when its ids are asked for.
_BEFORE = "a"
DEFAULT_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
NEEDLES = 8
# Variables that are set to a number, each of which one other variable is then set to.
CHAINS = 4

_FILLER = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
_CITIES = (
    *("London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Athens", "Dublin"),
    *("Cairo", "Lagos", "Tokyo", "Delhi", "Lima", "Oslo", "Sydney", "Boston"),
)
_WORDS = (
    *("apple", "river", "stone", "cloud", "horse", "table", "music", "garden", "winter", "silver"),
    *("window", "forest", "letter", "bridge", "market", "candle", "island", "mirror", "summer", "shadow"),
    *("bottle", "flower", "engine", "planet", "basket", "carpet", "doctor", "finger", "hammer", "jacket"),
    *("kitchen", "ladder", "monkey", "needle", "orange", "pencil", "rabbit", "saddle", "ticket", "violin"),
)


@dataclasses.dataclass(frozen=True)
class Example:
    """A row of tokens, and where its answer begins; chance: how often one is right who always gives the same answer.

    That is one in the number of answers that the context (or the task) offers; for copying, the answer's most frequent
    token.
    """

    ids: list[int]
    start: int
    chance: float = 0.0


class Text:
    """Token ids of text that is put together from parts."""

    def __init__(self, tokenizer: Any, seed: int):
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)
        self._of_files: dict[storage.AnyPath, np.ndarray] = {}

    def ids(self, text: str) -> list[int]:
        """Of a text that begins with a space, as it stands behind another one.

        For a SentencePiece tokenizer puts a space of its own before a text's first, a token that no running text has.
        """
        if text.startswith(" "):
            before, whole = (self._bare(words) for words in (_BEFORE, _BEFORE + text))
            if whole[: len(before)] == before:
                return whole[len(before) :]
        return self._bare(text)

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def of_file(self, file: storage.AnyPath) -> np.ndarray:
        """The ids of a file's text, which is read once; ValueError for one that is not UTF-8."""
        if file not in self._of_files:
            try:
                text = storage.read_text(file)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 ({error}); expected text. Convert the file to UTF-8.") from error
            (self._of_files[file],) = tokenised([text], self.tokenizer.backend_tokenizer, Framing(special_tokens=True))
        return self._of_files[file]

    def beginning(self) -> list[int]:
        """What stands before every context, so that its first token has one before it."""
        return before_all(self.tokenizer) or self.ids("\n")

    def filler(self, length: int) -> list[int]:
        """So many tokens of text that says nothing."""
        ids = self.ids("".join(_FILLER))
        return (ids * (length // len(ids) + 1))[:length]

    @functools.cached_property
    def ordinary(self) -> np.ndarray:
        """The ids of the tokens that stand for text."""
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        return np.asarray([i for i in range(len(self.tokenizer)) if i not in special])

    def number(self) -> str:
        return str(self.rng.integers(10_000, 99_999))

    def hidden_in(
        self, length: int, needles: Sequence[str], question: str, answer: str, chance: float = 1e-5
    ) -> Example:
        """The needles at random places of filler, in order, then the question and its answer; `length` tokens in all.

        Raises ValueError where they leave no room for any filler.
        """
        begin, end, answer_ids = self.beginning(), self.ids(question), self.ids(answer)
        parts = [self.ids(needle) for needle in needles]
        room = length - len(begin) - sum(map(len, parts)) - len(end) - len(answer_ids)
        if room < 1:
            raise ValueError(
                f"a probe of {length} tokens has no room for its {length - room} tokens of question and answer; "
                f"expected more. Raise the smallest of --probe_lengths above {length - room}."
            )
        filler = self.filler(room)
        places = np.sort(self.rng.integers(0, room + 1, len(parts))).tolist()
        ids, last = list(begin), 0
        for place, part in zip(places, parts, strict=True):
            ids += filler[last:place] + part
            last = place
        ids += filler[last:] + end
        return Example(ids + answer_ids, len(ids), chance)


def passkey(text: Text, length: int) -> Example:
    """One number hidden in `length` tokens."""
    number = text.number()
    needle = f" The pass key is {number}. Remember it. {number} is the pass key."
    return text.hidden_in(length, [needle], " What is the pass key? The pass key is", f" {number}")


def multi_key(text: Text, length: int) -> Example:
    """The number of one of NEEDLES cities, all hidden in `length` tokens."""
    cities = text.rng.permutation(_CITIES)[:NEEDLES].tolist()
    numbers = {city: text.number() for city in cities}
    needles = [f" The number of {city} is {number}." for city, number in numbers.items()]
    asked = cities[int(text.rng.integers(NEEDLES))]
    return text.hidden_in(length, needles, f" The number of {asked} is", f" {numbers[asked]}", 1 / NEEDLES)


def variables(text: Text, length: int) -> Example:
    """The number of one of CHAINS variables, each set to another that was set to a number, in `length` tokens."""
    names = text.rng.permutation(_WORDS)[: 2 * CHAINS].reshape(CHAINS, 2).tolist()
    numbers = [text.number() for _ in names]
    set_to = [f" VAR {first} = {number}." for (first, _), number in zip(names, numbers, strict=True)]
    set_to += [f" VAR {names[i][1]} = VAR {names[i][0]}." for i in text.rng.permutation(CHAINS)]
    asked = int(text.rng.integers(CHAINS))
    return text.hidden_in(length, set_to, f" The value of VAR {names[asked][1]} is", f" {numbers[asked]}", 1 / CHAINS)


def recall(text: Text, length: int) -> Example:
    """A list of three words and a digit a line, as long as fits into `length` tokens; one is asked for again."""
    pairs: dict[str, int] = {}
    ids = text.beginning()
    longest = max(len(text.ids(f" {word} {word} {word}: 0\n")) for word in _WORDS)
    while not pairs or len(ids) + 2 * longest <= length:
        key = " ".join(text.rng.choice(_WORDS, 3))
        if key not in pairs:
            pairs[key] = int(text.rng.integers(10))
            ids += text.ids(f" {key}: {pairs[key]}\n")
    asked = list(pairs)[int(text.rng.integers(len(pairs)))]
    ids += text.ids(f" {asked}:")
    return Example(ids + text.ids(f" {pairs[asked]}"), len(ids), 1 / 10)


def copy(text: Text, length: int) -> Example:
    """Random words in half of `length` tokens, then the same again, all of which is the answer.

    There are few words, so that every pair of them recurs in a long row: the token before does not tell what follows.
    """
    begin = text.beginning()
    half: list[int] = []
    while len(half) < (length - len(begin)) // 2:
        half += text.ids(f" {text.rng.choice(_WORDS)}")
    return _twice(begin, half[: (length - len(begin)) // 2])


def copy_tokens(text: Text, length: int) -> Example:
    """As `copy`, of random tokens that are all different; filler before them where the vocabulary has too few."""
    begin = text.beginning()
    count = min((length - len(begin)) // 2, len(text.ordinary))
    half = text.rng.permutation(text.ordinary)[:count].tolist()
    return _twice(begin + text.filler(length - len(begin) - 2 * count), half)


def _twice(before: list[int], half: list[int]) -> Example:
    # Its first token could be anything.
    answer = half[1:]
    chance = max(Counter(answer).values(), default=0) / max(len(answer), 1)
    return Example(before + half + half, len(before) + len(half) + 1, chance)


PROBES: dict[str, Callable[[Text, int], Example]] = {
    "passkey": passkey,
    "multi_key": multi_key,
    "recall": recall,
    "variables": variables,
    "copy": copy,
    "copy_tokens": copy_tokens,
}
# Whose answers are compared token by token, not as a whole.
COPYING = ("copy", "copy_tokens")


def check_lengths(
    tokenizer: Any,
    lengths: Sequence[int],
    text_file: storage.AnyPath | None = None,
    kinds: Collection[str] = tuple(PROBES),
) -> None:
    """Raises ValueError where a probe has no room in the smallest length, or the file too little text."""
    text, least = Text(tokenizer, 0), min(lengths)
    for name in kinds:
        example = PROBES[name](text, least)
        if len(example.ids) > least or example.start >= len(example.ids):
            raise ValueError(
                f"--probe_lengths has {least}, in which {name} has no room for a question and its answer; expected "
                f"more. Raise it above {max(len(example.ids), least)}."
            )
    if text_file is not None:
        document(text, max(lengths), text_file)


def rows_of_text(text: Text, count: int, length: int, file: storage.AnyPath | None) -> Int[np.ndarray, "N T"]:
    """`document`, of count * length tokens at most, in rows, before each what the tokenizer puts before a prompt."""
    begin = prompt_beginning(text.tokenizer)
    if not begin:
        return np.asarray(document(text, count * length, file).ids, np.int32).reshape(count, length)
    before, room = len(text.beginning()), length - len(begin)
    ids = np.asarray(document(text, before + count * room, file).ids[before:], np.int32).reshape(count, room)
    return np.concatenate([np.broadcast_to(np.asarray(begin, np.int32), (count, len(begin))), ids], axis=1)


def document(text: Text, length: int, file: storage.AnyPath | None) -> Example:
    """`length` tokens of the file's text from a random place, or of made-up tales; scored from the first on.

    Raises ValueError for a file with less text than that, or that is not UTF-8.
    """
    begin = text.beginning()
    if file is None:
        ids: list[int] = []
        while len(ids) < length:
            ids += text.ids(synthetic.document(int(text.rng.integers(1 << 30)), 0) + "\n\n")
        return Example((begin + ids)[:length], 1)
    of_file = text.of_file(file)
    if len(of_file) < length:
        raise ValueError(
            f"{file} holds {len(of_file)} tokens; expected at least the {length} of the longest probe. Give a longer "
            "--probe_text, or smaller --probe_lengths."
        )
    start = int(text.rng.integers(len(of_file) - length + 1))
    return Example((begin + of_file[start : start + length].tolist())[:length], 1)
