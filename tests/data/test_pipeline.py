"""Batches: the order as a function of (seed, step), restoring, epochs, and any number of processes."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radlads_jax.data.binidx import TokenFile, TokenFileWriter, open_token_file
from radlads_jax.data.packing import train_rows
from radlads_jax.data.pipeline import (
    _mix,
    epoch_order,
    make_eval_batches,
    make_train_iterator,
    repeats,
    rows_available,
)

SEQ_LEN = 8


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    """Fifty documents, 1000 tokens that count from 0."""
    with TokenFileWriter(tmp_path / "t", 1000) as writer:
        for start in range(0, 1000, 20):
            writer.add(np.arange(start, start + 20))
    return open_token_file(tmp_path / "t")


def iterate(file: TokenFile, **changes: Any) -> Any:
    settings = {"seq_len": SEQ_LEN, "batch_size": 6, "seed": 3} | changes
    return make_train_iterator(file, **settings)


def equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def row_numbers(batch: dict[str, np.ndarray]) -> list[int]:
    return (batch["tokens"][:, 0] // SEQ_LEN).tolist()


def test_every_epoch_has_every_row_once_in_a_new_order(file: TokenFile) -> None:
    # 125 rows and batches of 25: five batches an epoch.
    iterator = iterate(file, batch_size=25)
    epochs = [[row for _ in range(5) for row in row_numbers(next(iterator))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(125)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != list(range(125))


def test_a_batch_may_reach_over_the_end_of_an_epoch(file: TokenFile) -> None:
    iterator = iterate(file, batch_size=100)
    rows = [row for _ in range(5) for row in row_numbers(next(iterator))]
    assert [sorted(rows[at : at + 125]) for at in range(0, 500, 125)] == [list(range(125))] * 4


def test_rows_come_whole(file: TokenFile) -> None:
    rows = train_rows(file, SEQ_LEN)
    batch = next(iterate(file))
    for place, number in enumerate(row_numbers(batch)):
        assert equal({key: value[place] for key, value in batch.items()}, rows[number])


@pytest.mark.parametrize("taken", [0, 1, 7, 40])
def test_a_restored_iterator_goes_on_with_the_same_batches(file: TokenFile, taken: int) -> None:
    iterator = iterate(file)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(30)]
    restored = iterate(file)
    next(restored)
    restored.set_state(state)
    assert all(equal(batch, next(restored)) for batch in expected)


@pytest.mark.parametrize("shares", [[[0, 1, 2], [3, 4, 5]], [[5], [0, 2], [1, 3, 4]], [[0, 1, 2, 3, 4, 5]] * 2])
def test_processes_share_the_batch_of_one(file: TokenFile, shares: list[list[int]]) -> None:
    whole = iterate(file)
    parts = [iterate(file, rows_of_batch=np.array(share)) for share in shares]
    for _ in range(30):
        batch = next(whole)
        for part, share in zip(parts, shares, strict=True):
            assert equal(next(part), {key: rows[share] for key, rows in batch.items()})


def test_seeds_differ_and_repeat(file: TokenFile) -> None:
    first = {seed: row_numbers(next(iterate(file, seed=seed))) for seed in (0, 1, -1, 2**40)}
    assert len({tuple(rows) for rows in first.values()}) == 4
    assert row_numbers(next(iterate(file, seed=1))) == first[1]


def test_held_out_rows_are_not_trained_on(file: TokenFile) -> None:
    two_epochs = itertools.islice(iterate(file, eval_tokens=200), 200 // 6 + 1)
    seen = {t for batch in two_epochs for t in batch["tokens"].ravel()}
    held_out = make_eval_batches(file, seq_len=SEQ_LEN, batch_size=6, eval_tokens=200)
    tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in held_out])
    assert tokens.tolist() == list(range(800, 1000))
    assert max(seen) < 800
    assert [batch["tokens"].shape for batch in held_out] == [(6, SEQ_LEN)] * 5
    assert held_out[-1]["loss_mask"][1:].sum() == 0


def test_eval_batches_of_a_whole_file_on_two_processes(file: TokenFile) -> None:
    whole = make_eval_batches(file, seq_len=SEQ_LEN, batch_size=6, eval_tokens=1000)
    shares = (np.arange(3), np.arange(3, 6))
    parts = [
        make_eval_batches(file, seq_len=SEQ_LEN, batch_size=6, eval_tokens=1000, rows_of_batch=share)
        for share in shares
    ]
    assert sum(int((batch["segment_ids"] > 0).sum()) for batch in whole) == 1000
    for batch, left, right in zip(whole, *parts, strict=True):
        assert equal(batch, {key: np.concatenate([left[key], right[key]]) for key in left})


def test_counting(file: TokenFile) -> None:
    assert rows_available(file, SEQ_LEN) == 125
    assert rows_available(file, SEQ_LEN, eval_tokens=200) == 100
    assert repeats(file, SEQ_LEN, 2000) == 2.0
    assert repeats(file, SEQ_LEN, 200, eval_tokens=200) == 0.25
    assert repeats(file, 2000, 1) == float("inf")


def test_the_order_never_changes() -> None:
    # Published outputs of SplitMix64 from state 0.
    assert _mix(np.arange(3, dtype=np.uint64)).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    order = epoch_order(5, 2, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    assert order[:6].tolist() == [676, 488, 71, 313, 438, 25]
    # A shuffle leaves no trace of the old order: the correlation of 1000 pairs is below 4 / sqrt(1000).
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, r" 0\b.*\b1\b.*\bseq_len\b"),
        ({"seq_len": 200}, r"\b5 rows of 200\b.*\b6 rows\b"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"rows_of_batch": np.array([4, 6])}, r"got rows_of_batch=\[4, 6\] of a batch of 6"),
        ({"rows_of_batch": np.array([], int)}, r"got rows_of_batch=\[\] of a batch of 6"),
        ({"eval_tokens": 1001}, "got eval_tokens=1001; expected 0 to 1000"),
    ],
)
def test_bad_settings(file: TokenFile, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        iterate(file, **changes)
    assert "\n" not in str(error.value)


def test_eval_needs_tokens(file: TokenFile) -> None:
    with pytest.raises(ValueError, match=rf"eval_tokens=0\b.*{re.escape(str(file.prefix))}"):
        make_eval_batches(file, seq_len=SEQ_LEN, batch_size=6, eval_tokens=0)
