"""Batches: for every (token file, seq_len, batch_size, seed, step) exactly one, on any number of processes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import grain
import numpy as np

from radlads_jax.data.binidx import TokenFile
from radlads_jax.data.packing import Batch, check_seq_len, eval_rows, train_rows

_ENDLESS = 1 << 48
_PREFETCHED_BATCHES = 8


@runtime_checkable
class Rows(Protocol):
    """Rows by their numbers, as PackedRows has them."""

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> Batch: ...


def rows_available(token_file: TokenFile, seq_len: int, eval_tokens: int = 0) -> int:
    """How many rows there are to train on."""
    check_seq_len(seq_len)
    return len(train_rows(token_file, seq_len, eval_tokens=eval_tokens))


def repeats(token_file: TokenFile, seq_len: int, tokens: int, eval_tokens: int = 0) -> float:
    """How many times training on `tokens` goes through the data: 0.5 is half of it, 2.0 twice all of it."""
    rows = rows_available(token_file, seq_len, eval_tokens)
    return tokens / (rows * seq_len) if rows else float("inf")


def make_train_iterator(
    token_file: TokenFile,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    eval_tokens: int = 0,
    cross_document: bool = False,
    rows_of_batch: np.ndarray | None = None,
    beside: Callable[[np.ndarray], Batch] | None = None,
) -> grain.DatasetIterator:
    """Endless batches of shuffled rows, dicts of [rows, seq_len] arrays as PackedRows describes them.

    Row j of batch s is row order(seed, e)[i] of the data with e, i = divmod(s * batch_size + j, rows): a new order in
    every epoch, over the border of which a batch may reach. A process that computes only some rows of every batch gets
    these, and they do not depend on how many processes there are.
    get_state() is a small dict for JSON that set_state() goes back to; the state is the number of batches taken.

    Args:
        batch_size: rows of the global batch.
        rows_of_batch: the numbers of those that are wanted; None takes all.
        beside: what else there is of rows, by their numbers; it is put into their batch.

    Raises:
        ValueError: a size that is not positive, too little data for one batch.
    """
    share = _share(batch_size, rows_of_batch)
    rows = train_rows(token_file, seq_len, eval_tokens=eval_tokens, cross_document=cross_document)
    if len(rows) < batch_size:
        raise ValueError(
            f"got {rows.num_tokens} training tokens in {token_file.prefix}.bin, which make {len(rows)} rows of "
            f"{seq_len}; expected at least one batch of {batch_size} rows; bring more text, or lower seq_len, "
            "batch_size or eval_tokens."
        )
    return _iterator(_ShuffledBatches(rows, batch_size, seed, share, beside))


def make_mixed_iterator(
    first: Rows, second: Rows, *, first_rows: int, batch_size: int, seed: int, rows_of_batch: np.ndarray | None = None
) -> grain.DatasetIterator:
    """Endless batches whose first `first_rows` rows are of the one kind and the others of the other.

    Each kind is shuffled as in make_train_iterator, whose state and rows_of_batch these have too. Rows of both are of
    the same length. Raises ValueError where a kind has fewer rows than a batch takes of it.
    """
    share = _share(batch_size, rows_of_batch)
    kinds = ((first, 0, first_rows), (second, first_rows, batch_size - first_rows))
    parts = []
    for rows, begin, count in kinds:
        if len(rows) < count:
            raise ValueError(
                f"got {len(rows)} rows where a batch takes {count} of their kind; expected at least as many; bring "
                "more data, or lower seq_len or batch_size."
            )
        own = share[(share >= begin) & (share < begin + count)]
        if own.size:
            parts.append((np.isin(share, own), _ShuffledBatches(rows, count, seed, own - begin)))
    return _iterator(_MixedBatches(tuple(parts)))


def _iterator(batches: "_ShuffledBatches | _MixedBatches") -> grain.DatasetIterator:
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED_BATCHES)
    return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def make_eval_batches(
    token_file: TokenFile,
    *,
    seq_len: int,
    batch_size: int,
    eval_tokens: int,
    cross_document: bool = False,
    rows_of_batch: np.ndarray | None = None,
) -> list[Batch]:
    """The held-out rows in their order, in whole batches: what is missing in the last one is padding.

    eval_tokens: what training left out.
    """
    share = _share(batch_size, rows_of_batch)
    rows = eval_rows(token_file, seq_len, eval_tokens=eval_tokens, cross_document=cross_document)
    if len(rows) == 0:
        raise ValueError(
            f"got no held-out tokens (eval_tokens={eval_tokens}) of {token_file.prefix}.bin; expected at least one "
            "row; set eval_tokens to a positive number."
        )
    padded = np.full(-(-len(rows) // batch_size) * batch_size, -1)
    padded[: len(rows)] = np.arange(len(rows))
    return [rows.rows(batch[share]) for batch in padded.reshape(-1, batch_size)]


def _share(batch_size: int, rows_of_batch: np.ndarray | None) -> np.ndarray:
    """The numbers of the wanted rows of a global batch."""
    if batch_size < 1:
        raise ValueError(f"got batch_size={batch_size}; expected at least 1; set it to a positive number of rows.")
    share = np.arange(batch_size) if rows_of_batch is None else np.asarray(rows_of_batch)
    if share.size == 0 or share.min() < 0 or share.max() >= batch_size:
        raise ValueError(
            f"got rows_of_batch={share.tolist()} of a batch of {batch_size}; expected numbers from 0 to "
            f"{batch_size - 1}, at least one; leave it out to get all rows."
        )
    return share


@dataclass(frozen=True)
class _ShuffledBatches:
    """Batch number s, for any s: what Grain reads from."""

    rows: Rows
    batch_size: int
    seed: int
    share: np.ndarray
    beside: Callable[[np.ndarray], Batch] | None = None

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        samples = step * self.batch_size + self.share
        epochs, places = np.divmod(samples, len(self.rows))
        order = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order[here] = epoch_order(self.seed, int(epoch), len(self.rows))[places[here]]
        return self.rows.rows(order) | (self.beside(order) if self.beside is not None else {})


@dataclass(frozen=True)
class _MixedBatches:
    """Batch number s of several kinds. parts: which of the wanted rows, bool [rows], are of which."""

    parts: tuple[tuple[np.ndarray, _ShuffledBatches], ...]

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        batches = [(wanted, part[step]) for wanted, part in self.parts]
        return {key: self._placed([(wanted, batch[key]) for wanted, batch in batches]) for key in batches[0][1]}

    @staticmethod
    def _placed(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        whole = np.empty((len(parts[0][0]), *parts[0][1].shape[1:]), parts[0][1].dtype)
        for wanted, rows in parts:
            whole[wanted] = rows
        return whole


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The order of the rows in an epoch: the rows sorted by a hash of (seed, epoch, row).

    Plain integer arithmetic (SplitMix64), because the streams of random generators may change between library
    versions and a resumed run must not.
    """
    # One-element arrays wrap around silently where scalars would warn.
    stream = _mix(_mix(np.array([seed], np.int64).astype(np.uint64)) + np.array([epoch], np.uint64))
    order = np.argsort(_mix(stream + np.arange(rows, dtype=np.uint64)), kind="stable")
    order.flags.writeable = False
    return order


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, uint64 to uint64."""
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
