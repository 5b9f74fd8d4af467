"""Texts to token ids: many at once, long ones in pieces whose joins change nothing, names of special tokens as text."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

# Enough text to keep all of the tokenizer's threads busy, little enough to stop soon after max_tokens.
BATCH_CHARACTERS = 1 << 20
# A tokenizer takes some hundred bytes of memory for a character of a text.
PIECE_CHARACTERS = 1 << 18
# What a piece shares with the next one, and how many tokens have to agree there: no token reaches so far.
OVERLAP_CHARACTERS = 1 << 12
_AGREEING_TOKENS = 32


@runtime_checkable
class BatchTokenizer(Protocol):
    """What is needed of a tokenizer: for each text a result with `.ids` and `.offsets`, as `tokenizers` gives."""

    encode_special_tokens: bool

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> Sequence[Any]: ...

    def to_str(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Framing:
    """What stands around a document's own tokens.

    beginning: ids before them. eos_id: the id after them, None for none. special_tokens: a special token's name in the
    text is that token; else it is text like any other. What a text then begins or ends with itself is not repeated.
    """

    beginning: tuple[int, ...] = ()
    eos_id: int | None = None
    special_tokens: bool = False

    def framed(self, ids: np.ndarray) -> np.ndarray:
        begun = self.special_tokens and tuple(ids[: len(self.beginning)].tolist()) == self.beginning
        ended = self.special_tokens and len(ids) > 0 and int(ids[-1]) == self.eos_id
        before = () if begun else self.beginning
        after = () if self.eos_id is None or ended else (self.eos_id,)
        return np.concatenate([np.array(before, np.int64), ids, np.array(after, np.int64)])


def prompt_beginning(tokenizer: Any) -> tuple[int, ...]:
    """The ids that a transformers tokenizer puts before a prompt: its BOS, or none."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    places = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return tuple(whole[: next(places, 0)])


def before_all(tokenizer: Any) -> list[int]:
    """What stands before a text without a context: [BOS], or else [the token that ends texts]; [] without either."""
    return [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]


def tokenised(texts: Iterable[str], tokenizer: BatchTokenizer, framing: Framing) -> Iterator[np.ndarray]:
    """Every text's ids, framed, int64 [length]."""
    for batch in _batches(texts):
        with _special_tokens(tokenizer, framing.special_tokens):
            encoded = _encode(batch, tokenizer)
        yield from map(framing.framed, encoded)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _special_tokens(tokenizer: BatchTokenizer, as_tokens: bool) -> Iterator[None]:
    """Lets the tokenizer take special tokens' names in a text for these tokens, or for text."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = not as_tokens
    try:
        yield
    finally:
        tokenizer.encode_special_tokens = before


def _encode(texts: list[str], tokenizer: BatchTokenizer) -> list[np.ndarray]:
    short = [text for text in texts if len(text) <= PIECE_CHARACTERS]
    whole = iter(tokenizer.encode_batch(short, add_special_tokens=False))
    return [
        np.array(next(whole).ids, np.int64) if len(text) <= PIECE_CHARACTERS else _encode_long(text, tokenizer)
        for text in texts
    ]


class _Piece(NamedTuple):
    """A piece's tokens: ids [n], and [n, 2] where each begins and ends in the whole text."""

    ids: np.ndarray
    spans: np.ndarray


def _encode_long(text: str, tokenizer: BatchTokenizer) -> np.ndarray:
    """The ids of a text, tokenised piece by piece.

    A piece begins before the one before it ends. Where both give the same tokens for the middle of what they share,
    neither's edge has any say there: the whole text has these tokens too. Where they differ, the piece grows.
    """
    done: list[np.ndarray] = []
    begin, end, skipped = 0, PIECE_CHARACTERS, 0
    piece = _encode_piece(text, begin, end, tokenizer)
    while end < len(text):
        next_begin, next_end = end - OVERLAP_CHARACTERS, end - OVERLAP_CHARACTERS + PIECE_CHARACTERS
        following = _encode_piece(text, next_begin, next_end, tokenizer)
        join = _join(piece, following, next_begin, end)
        end = next_end
        if join is None:
            # There is no place to cut, as in one letter over and over: this piece and the next are one.
            piece = _encode_piece(text, begin, end, tokenizer)
            continue
        done.append(piece.ids[skipped : join[0]])
        begin, piece, skipped = next_begin, following, join[1]
    return np.concatenate([*done, piece.ids[skipped:]])


def _encode_piece(text: str, begin: int, end: int, tokenizer: BatchTokenizer) -> _Piece:
    (encoding,) = tokenizer.encode_batch([text[begin:end]], add_special_tokens=False)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2) + begin
    return _Piece(np.array(encoding.ids, np.int64), spans)


def _join(left: _Piece, right: _Piece, begin: int, end: int) -> tuple[int, int] | None:
    """How many of the left piece's tokens come before the join, and with which of the right's it goes on."""
    low, high = begin + (end - begin) // 4, end - (end - begin) // 4
    shared_left, shared_right = (
        np.flatnonzero((piece.spans[:, 0] >= low) & (piece.spans[:, 1] <= high)) for piece in (left, right)
    )
    if len(shared_left) != len(shared_right) or len(shared_left) < _AGREEING_TOKENS:
        return None
    same = np.array_equal(left.ids[shared_left], right.ids[shared_right])
    if not same or not np.array_equal(left.spans[shared_left], right.spans[shared_right]):
        return None
    middle = len(shared_left) // 2
    return int(shared_left[middle]), int(shared_right[middle])
