"""Long-context probes that need no download: pass key, one needle of many, recall, copying, loss by position.

Contexts are put together from token ids, so that their lengths are known, and scored without generating: an answer is
right when each of its tokens is the most likely one after those before it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from radlads_jax.data import synthetic
from radlads_jax.decoding.loaded import Model
from radlads_jax.evaluation.scoring import score_rows
from radlads_jax.system import storage

DEFAULT_LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
NEEDLES = 8
# Bins of the loss by position, each twice as wide as the one before it.
_FIRST_BIN = 16

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
class _Example:
    """A row of tokens, and where its answer begins."""

    ids: list[int]
    start: int


class Text:
    """Token ids of text that is put together from parts."""

    def __init__(self, tokenizer: Any, seed: int):
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(seed)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def beginning(self) -> list[int]:
        """What stands before every context, so that its first token has one before it."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [i for i in ids if i is not None][:1] or self.ids("\n")

    def filler(self, length: int) -> list[int]:
        """So many tokens of text that says nothing."""
        ids = self.ids("".join(_FILLER))
        return (ids * (length // len(ids) + 1))[:length]

    def number(self) -> str:
        return str(self.rng.integers(10_000, 99_999))

    def hidden_in(self, length: int, needles: Sequence[str], question: str, answer: str) -> _Example:
        """The needles at random places of filler, then the question and its answer; `length` tokens in all.

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
        return _Example(ids + answer_ids, len(ids))


def passkey(text: Text, length: int) -> _Example:
    """One number hidden in `length` tokens."""
    number = text.number()
    needle = f" The pass key is {number}. Remember it. {number} is the pass key."
    return text.hidden_in(length, [needle], " What is the pass key? The pass key is", f" {number}")


def multi_key(text: Text, length: int) -> _Example:
    """The number of one of NEEDLES cities, all hidden in `length` tokens."""
    cities = text.rng.permutation(_CITIES)[:NEEDLES].tolist()
    numbers = {city: text.number() for city in cities}
    needles = [f" The number of {city} is {number}." for city, number in numbers.items()]
    asked = cities[int(text.rng.integers(NEEDLES))]
    return text.hidden_in(length, needles, f" The number of {asked} is", f" {numbers[asked]}")


def recall(text: Text, length: int) -> _Example:
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
    return _Example(ids + text.ids(f" {pairs[asked]}"), len(ids))


def copy(text: Text, length: int) -> _Example:
    """Random words in half of `length` tokens, then the same again, all of which is the answer."""
    begin = text.beginning()
    half: list[int] = []
    while len(half) < (length - len(begin)) // 2:
        half += text.ids(f" {text.rng.choice(_WORDS)}")
    half = half[: (length - len(begin)) // 2]
    # Its first token could be anything.
    return _Example(begin + half + half, len(begin) + len(half) + 1)


PROBES: dict[str, Callable[[Text, int], _Example]] = {
    "passkey": passkey,
    "multi_key": multi_key,
    "recall": recall,
    "copy": copy,
}


def document(text: Text, length: int, file: storage.AnyPath | None) -> _Example:
    """`length` tokens of the file's text from a random place, or of made-up tales; scored from the first on.

    Raises ValueError for a file with less text than that.
    """
    begin = text.beginning()
    if file is None:
        ids: list[int] = []
        while len(ids) < length:
            ids += text.ids(synthetic.document(int(text.rng.integers(1 << 30)), 0) + "\n\n")
        return _Example((begin + ids)[:length], 1)
    ids = text.ids(storage.read_text(file))
    if len(ids) < length:
        raise ValueError(
            f"{file} holds {len(ids)} tokens; expected at least the {length} of the longest probe. Give a longer "
            "--probe_text, or smaller --probe_lengths."
        )
    start = int(text.rng.integers(len(ids) - length + 1))
    return _Example((begin + ids[start : start + length])[:length], 1)


def run_probes(
    model: Model,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 8,
    text_file: storage.AnyPath | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """{probe: {"lengths", "accuracy"} for PROBES, "loss_by_position": {"positions", "loss"}} of one model.

    accuracy: the share of right answers, for copy: of right tokens. loss: nats a token, over positions from the bin
    before up to this one. The same seed makes the same contexts for every model with the same tokenizer.
    """
    lengths = sorted(lengths)
    results: dict[str, Any] = {}
    for name, make in PROBES.items():
        accuracy = []
        for length in lengths:
            text = Text(model.tokenizer, seed + length)
            examples = [make(text, length) for _ in range(samples)]
            scores = _scores(model, examples, batch_size)
            right = [score.is_best.mean() if name == "copy" else score.is_best.all() for score in scores]
            accuracy.append(float(np.mean(right)))
            log(f"{name} {length:,}: {accuracy[-1]:.0%}")
        results[name] = {"lengths": list(lengths), "accuracy": accuracy}
    text = Text(model.tokenizer, seed)
    documents = [document(text, lengths[-1], text_file) for _ in range(samples)]
    losses = np.mean([-score.log_probabilities for score in _scores(model, documents, batch_size)], axis=0)
    results["loss_by_position"] = _by_position(losses)
    return results


def _scores(model: Model, examples: list[_Example], batch_size: int):
    rows, starts = [example.ids for example in examples], [example.start for example in examples]
    return score_rows(model.cfg, model.params, rows, starts, min(batch_size, len(rows)))


def _by_position(losses: np.ndarray) -> dict[str, list[float]]:
    """Means over bins that end at 16, 32, 64, ... tokens."""
    ends = [_FIRST_BIN]
    while ends[-1] < len(losses):
        ends.append(2 * ends[-1])
    ends[-1] = min(ends[-1], len(losses))
    begins = [0, *ends[:-1]]
    means = [float(losses[begin:end].mean()) for begin, end in zip(begins, ends, strict=True)]
    return {"positions": [float(end) for end in ends], "loss": means}
