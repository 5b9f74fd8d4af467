"""Rows: the token stream of a file cut into equal lengths, with the documents inside each row marked."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from radlads_jax.data.binidx import TokenFile

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackedRows:
    """Random access to the rows stream[begin + i*T : begin + (i+1)*T] of a token file, T = seq_len.

    A row is a dict of
        tokens        int32 [T]
        segment_ids   int32 [T]    1, 2, ... for the segments of the row, its documents or parts of them, 0 for padding
        positions     int32 [T]    from 0 in every segment
        loss_mask     float32 [T]  1 where the next token of the row belongs to the same segment, so it can be a target
    Only a last row that the stream does not fill has padding, and only if `keep_partial`.
    With `cross_document` a row is one segment whatever documents it holds, as in the published training code.
    """

    token_file: TokenFile
    seq_len: int
    begin: int = 0
    end: int | None = None
    cross_document: bool = False
    keep_partial: bool = False

    def __post_init__(self) -> None:
        check_seq_len(self.seq_len)

    @property
    def num_tokens(self) -> int:
        end = self.token_file.num_tokens if self.end is None else self.end
        return end - self.begin

    def __len__(self) -> int:
        return -(-self.num_tokens // self.seq_len) if self.keep_partial else self.num_tokens // self.seq_len

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"got row {index}; expected 0 to {len(self) - 1}.")
        return {key: value[0] for key, value in self.rows(np.array([index])).items()}

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def rows(self, indices: np.ndarray) -> Batch:
        """The rows of the given numbers [B] as arrays [B, T]; a number of -1 or below gives a row of padding."""
        column = np.arange(self.seq_len)
        first = self.begin + indices.astype(np.int64) * self.seq_len
        filled = np.clip(self.begin + self.num_tokens - first, 0, self.seq_len)
        real = column < np.where(indices >= 0, filled, 0)[:, None]
        tokens = self.token_file.tokens[np.where(real, first[:, None] + column, 0)]
        starts = self._segment_starts(first) & (indices >= 0)[:, None]
        segment_begin = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
        segment_ids = np.where(real, 1 + np.cumsum(starts, axis=1), 0)
        loss_mask = np.zeros(tokens.shape, np.float32)
        loss_mask[:, :-1] = (segment_ids[:, 1:] == segment_ids[:, :-1]) & real[:, 1:]
        return {
            "tokens": np.where(real, tokens, 0).astype(np.int32),
            "segment_ids": segment_ids.astype(np.int32),
            "positions": np.where(real, column - segment_begin, 0).astype(np.int32),
            "loss_mask": loss_mask,
        }

    def _segment_starts(self, first: np.ndarray) -> np.ndarray:
        """Where a document begins inside a row, its first token excepted: bool [B, T]."""
        starts = np.zeros((len(first), self.seq_len), bool)
        if self.cross_document:
            return starts
        bounds = self.token_file.document_starts
        low = np.searchsorted(bounds, first, side="right")
        high = np.searchsorted(bounds, first + self.seq_len, side="left")
        for row in range(len(first)):
            starts[row, bounds[low[row] : high[row]] - first[row]] = True
        return starts


def whole_batches(count: int, size: int) -> list[Int[np.ndarray, " B"]]:
    """The numbers 0 to count in batches of `size`, or of all, the last one filled up with its last number.

    For rows that a compiled program reads: another number of them is another program.
    """
    size = min(size, count)
    return list(np.minimum(np.arange(-(-count // size) * size), count - 1).reshape(-1, size))


def check_seq_len(seq_len: int) -> None:
    """ValueError unless the length is positive."""
    if seq_len < 1:
        raise ValueError(f"got a sequence length of {seq_len}; expected at least 1; set seq_len to a positive number.")


def held_out_start(token_file: TokenFile, eval_tokens: int) -> int:
    """Where the held-out end of a token file begins: everything before it is for training.

    It lies at the start of a document where that costs at most as many tokens again as are asked for, so that no
    document is in both; otherwise exactly `eval_tokens` before the end. It does not depend on the sequence length:
    stages of different lengths share the same held-out tokens.
    """
    total = token_file.num_tokens
    if not 0 <= eval_tokens <= total:
        raise ValueError(
            f"got eval_tokens={eval_tokens}; expected 0 to {total}, the tokens in {token_file.prefix}.bin; hold out "
            "fewer tokens or bring more text."
        )
    if eval_tokens == 0:
        return total
    latest = total - eval_tokens
    bounds = token_file.document_starts
    aligned = int(bounds[np.searchsorted(bounds, latest, side="right") - 1])
    return aligned if latest - aligned <= eval_tokens and aligned > 0 else latest


def train_rows(
    token_file: TokenFile, seq_len: int, *, eval_tokens: int = 0, cross_document: bool = False
) -> PackedRows:
    """The whole rows before the held-out end."""
    return PackedRows(token_file, seq_len, 0, held_out_start(token_file, eval_tokens), cross_document)


def eval_rows(token_file: TokenFile, seq_len: int, *, eval_tokens: int, cross_document: bool = False) -> PackedRows:
    """The rows of the held-out end: eval_tokens of it, the last row padded."""
    check_seq_len(seq_len)
    begin = held_out_start(token_file, eval_tokens)
    return PackedRows(token_file, seq_len, begin, begin + eval_tokens, cross_document, keep_partial=True)
