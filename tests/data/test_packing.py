"""Rows against a loop over single tokens, and the split between training and held-out text."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radlads_jax.data.binidx import TokenFile, TokenFileWriter, open_token_file
from radlads_jax.data.packing import PackedRows, eval_rows, held_out_start, train_rows


def token_file(directory: str | Path, lengths: list[int]) -> TokenFile:
    """Documents of the given lengths; the tokens count 1, 2, 3, ... through the whole file."""
    ends = np.cumsum(lengths)
    with TokenFileWriter(Path(directory) / "t", 65535) as writer:
        for end, length in zip(ends, lengths, strict=True):
            writer.add(np.arange(end - length, end) + 1)
    return open_token_file(Path(directory) / "t")


def slow_row(lengths: list[int], begin: int, end: int, seq_len: int) -> dict[str, list]:
    """One row, token by token."""
    owner = [document for document, length in enumerate(lengths) for _ in range(length)]
    tokens, segments, positions = [], [], []
    for at in range(begin, begin + seq_len):
        fresh = at == begin or (at < end and owner[at] != owner[at - 1])
        segment = (segments[-1] if segments else 0) + fresh
        position = 0 if fresh else positions[-1] + 1
        for column, value in ((tokens, at + 1), (segments, segment), (positions, position)):
            column.append(value if at < end else 0)
    mask = [float(s > 0 and s == after) for s, after in zip(segments, [*segments[1:], 0], strict=True)]
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    seq_len=st.integers(1, 12),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_rows_equal_a_loop(lengths: list[int], seq_len: int, cut: tuple[float, float]) -> None:
    total = sum(lengths)
    begin, end = sorted(round(each * total) for each in cut)
    with tempfile.TemporaryDirectory() as directory:
        rows = PackedRows(token_file(directory, lengths), seq_len, begin, end, keep_partial=True)
        assert len(rows) == -(-(end - begin) // seq_len)
        for index, row in enumerate(rows):
            expected = slow_row(lengths, begin + index * seq_len, end, seq_len)
            assert {key: value.tolist() for key, value in row.items()} == expected


def test_dtypes_and_shapes(tmp_path: Path) -> None:
    batch = train_rows(token_file(tmp_path, [7, 9]), 5).rows(np.array([2, 0, 1]))
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "tokens": ("int32", (3, 5)),
        "segment_ids": ("int32", (3, 5)),
        "positions": ("int32", (3, 5)),
        "loss_mask": ("float32", (3, 5)),
    }
    assert batch["tokens"][:, 0].tolist() == [11, 1, 6]


def test_cross_document_rows_are_one_segment(tmp_path: Path) -> None:
    row = train_rows(token_file(tmp_path, [3, 4, 5]), 12, cross_document=True)[0]
    assert row["segment_ids"].tolist() == [1] * 12
    assert row["positions"].tolist() == list(range(12))
    assert row["loss_mask"].tolist() == [1.0] * 11 + [0.0]


def test_training_rows_are_whole(tmp_path: Path) -> None:
    rows = train_rows(token_file(tmp_path, [13]), 5)
    assert len(rows) == 2
    with pytest.raises(IndexError, match="got row 2; expected 0 to 1"):
        rows[2]


def test_padding_row(tmp_path: Path) -> None:
    batch = eval_rows(token_file(tmp_path, [6]), 4, eval_tokens=6).rows(np.array([1, -1]))
    assert batch["tokens"].tolist() == [[5, 6, 0, 0], [0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(sum),
    share=st.floats(0, 1),
    seq_lens=st.tuples(st.integers(1, 9), st.integers(1, 30)),
)
def test_training_and_held_out_tokens_are_disjoint(lengths: list[int], share: float, seq_lens: tuple[int, int]) -> None:
    eval_tokens = round(share * sum(lengths))
    with tempfile.TemporaryDirectory() as directory:
        file = token_file(directory, lengths)
        seen = {
            t
            for seq_len in seq_lens
            for row in train_rows(file, seq_len, eval_tokens=eval_tokens)
            for t in row["tokens"]
        }
        held_out = [
            {t for row in eval_rows(file, seq_len, eval_tokens=eval_tokens) for t in row["tokens"]} - {0}
            for seq_len in seq_lens
        ]
        assert held_out[0] == held_out[1]
        assert len(held_out[0]) == eval_tokens
        assert not seen & held_out[0]


def test_held_out_text_begins_with_a_document(tmp_path: Path) -> None:
    file = token_file(tmp_path, [10, 10, 10, 10])
    assert held_out_start(file, 15) == 20
    assert held_out_start(file, 0) == 40


def test_held_out_text_is_cut_from_a_document_that_is_too_long(tmp_path: Path) -> None:
    assert held_out_start(token_file(tmp_path, [10, 100]), 15) == 95


@pytest.mark.parametrize("seq_len", [0, -4])
def test_sequence_length_has_to_be_positive(tmp_path: Path, seq_len: int) -> None:
    file = token_file(tmp_path, [10])
    for make in (lambda: train_rows(file, seq_len), lambda: eval_rows(file, seq_len, eval_tokens=5)):
        with pytest.raises(ValueError, match=rf" {seq_len}\b.*\b1\b.*\bseq_len\b"):
            make()


@pytest.mark.parametrize("eval_tokens", [-1, 11])
def test_more_held_out_than_there_is(tmp_path: Path, eval_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"eval_tokens={eval_tokens}\b.*\b0 to 10\b.*{re.escape(str(tmp_path))}"):
        held_out_start(token_file(tmp_path, [10]), eval_tokens)
