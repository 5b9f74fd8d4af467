"""A model's answers to the probes: generated, and with the right tokens before each (teacher-forced).

A generated answer is right when the text begins with it; teacher-forced it is right when each of its tokens is the
most likely one after the right ones. Both are of the same contexts, and differ where the same text has other tokens,
and in copying, where a generated copy goes on from its own mistakes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from radlads_jax.data.packing import whole_batches
from radlads_jax.decoding.generation import generate
from radlads_jax.decoding.loaded import Model
from radlads_jax.decoding.loop import UNREAD, empty_sequences, left_padded, prefill
from radlads_jax.evaluation.intervals import wilson
from radlads_jax.evaluation.probes import COPYING, DEFAULT_LENGTHS, PROBES, Example, Text, check_lengths, document
from radlads_jax.evaluation.scoring import FULL_BATCH_WIDTH, padded_width, score_continuations, score_rows
from radlads_jax.system import storage

DEFAULT_SAMPLES = 32
# Up to this length there are as many samples as asked for, then fewer, but not fewer than LEAST_SAMPLES of them.
_FULL_LENGTH = 4096
_LEAST_SAMPLES = 8
# Of a copy, so many tokens are generated.
_COPIED = 64
# Bins of the loss by position, each twice as wide as the one before it.
_FIRST_BIN = 16


def samples_of(length: int, samples: int) -> int:
    """How many contexts of this length are asked, where `samples` are of short ones."""
    return samples if length <= _FULL_LENGTH else max(min(samples, _LEAST_SAMPLES), samples * _FULL_LENGTH // length)


def run_probes(
    model: Model,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    batch_size: int = 8,
    text_file: storage.AnyPath | None = None,
    by_position: bool = True,
    kinds: Sequence[str] = tuple(PROBES),
    log: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """{probe: {"lengths", "generated", "interval", "accuracy", "chance", "samples"} for the kinds of PROBES,
    "loss_by_position": {"positions", "loss"} where by_position is asked for} of one model.

    generated: the share of right answers (for copies: of right tokens); interval: of 95%; accuracy: teacher-forced.
    chance: of always giving the same answer. loss: nats a token, over positions from the bin before up to this one. The
    same seed makes the same contexts for every model with the same tokenizer. Raises ValueError for lengths in which a
    probe has no room, before the first one runs. keep: called with the results so far, after every kind.
    """
    lengths = sorted(lengths)
    check_lengths(model.tokenizer, lengths, text_file if by_position else None, kinds)
    results: dict[str, Any] = {}
    asked = 0
    for name in kinds:
        make, lines = PROBES[name], []
        for length in lengths:
            text = Text(model.tokenizer, seed + length)
            examples = [make(text, length) for _ in range(samples_of(length, samples))]
            lines.append(_answers(model, name, examples, batch_size))
            low, high = lines[-1]["interval"]
            asked += 1
            said = f"{lines[-1]['generated']:.0%} ({low:.0%} to {high:.0%})"
            log(f"{name} {length:,}: {said}, {asked} of {len(kinds) * len(lengths)}")
        results[name] = {"lengths": list(lengths)} | {key: [line[key] for line in lines] for key in lines[0]}
        keep(results)
    if by_position:
        text = Text(model.tokenizer, seed)
        documents = [document(text, lengths[-1], text_file) for _ in range(samples_of(lengths[-1], samples))]
        rows, starts = [text.ids for text in documents], [text.start for text in documents]
        scores = score_rows(model.cfg, model.params, rows, starts, min(batch_size, len(rows)))
        losses = np.mean([-score.log_probabilities for score in scores], axis=0)
        results["loss_by_position"] = _by_position(losses)
    return results


def _answers(model: Model, name: str, examples: list[Example], batch_size: int) -> dict[str, Any]:
    longest = max(example.start for example in examples)
    size = min(batch_size, max(1, batch_size * FULL_BATCH_WIDTH // longest))
    forced: list[float] = []
    right: list[float] = []
    for numbers in whole_batches(len(examples), size):
        of_batch = _answers_of_batch(model, [examples[i] for i in numbers], longest, copies=name in COPYING)
        for found, scores in zip((forced, right), of_batch, strict=True):
            found += scores
    forced, right = forced[: len(examples)], right[: len(examples)]
    generated = float(np.mean(right))
    return {
        "generated": generated,
        "interval": list(wilson(generated, len(examples))),
        "accuracy": float(np.mean(forced)),
        "chance": float(np.mean([example.chance for example in examples])),
        "samples": len(examples),
    }


def _answers_of_batch(
    model: Model, examples: list[Example], longest: int, *, copies: bool
) -> tuple[list[float], list[float]]:
    """How right each answer is, 0 to 1: teacher-forced, and of what the model says by itself.

    Their contexts, of up to `longest` tokens, are read once for both.
    """
    prompts = [example.ids[: example.start] for example in examples]
    answers = [example.ids[example.start :] for example in examples]
    most = max(map(len, answers))
    room = longest + padded_width(UNREAD + most)
    read = prefill(model.cfg, model.params, empty_sequences(model.cfg, len(prompts), room), left_padded(prompts))
    scores = score_continuations(model.cfg, model.params, *read, answers)
    forced = [float(s.is_best.mean() if copies else s.is_best.all()) for s in scores]
    # One more than the answer, to see that it ends there.
    count = min(_COPIED, most) if copies else most + 1
    texts = [""] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in generate(model, prompts, max_tokens=count, read=read):
        texts = [text + new for text, new in zip(texts, step.texts, strict=True)]
        tokens = [made + new for made, new in zip(tokens, step.tokens, strict=True)]
    right = [
        _same_tokens(made, answer[:count]) if copies else _begins_with(model, text, answer)
        for text, made, answer in zip(texts, tokens, answers, strict=True)
    ]
    return forced, right


def _same_tokens(made: list[int], answer: list[int]) -> float:
    """The share of the answer's tokens that stand in their places."""
    return sum(a == b for a, b in zip(made, answer, strict=False)) / len(answer)


def _begins_with(model: Model, text: str, answer: list[int]) -> float:
    """Whether the text begins with the answer, and with no longer word or number."""
    expected, said = model.tokenizer.decode(answer).strip(), text.strip()
    return float(said.startswith(expected) and not said[len(expected) : len(expected) + 1].isalnum())


def _by_position(losses: np.ndarray) -> dict[str, list[float]]:
    """Means over bins that end at 16, 32, 64, ... tokens."""
    ends = [_FIRST_BIN]
    while ends[-1] < len(losses):
        ends.append(2 * ends[-1])
    ends[-1] = min(ends[-1], len(losses))
    begins = [0, *ends[:-1]]
    means = [float(losses[begin:end].mean()) for begin, end in zip(begins, ends, strict=True)]
    return {"positions": [float(end) for end in ends], "loss": means}
