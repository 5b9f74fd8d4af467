"""Token files: the .bin/.idx pair of Megatron's memory-mapped indexed dataset, which RADLADS and RWKV-LM read too.

    .bin    the tokens of all sequences, one after another
    .idx    magic "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), number of sequences (u64), length of the document
            index (u64, one more than there are documents), sizes in tokens (i32 each), offsets in bytes (i64 each),
            document index: the number of each document's first sequence, then the number of sequences (i64 each)

All numbers are little-endian.
"""

import contextlib
import fcntl
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from radlads_jax.system.storage import AnyPath, as_path, children, local_copy, publish, unpublished

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_SCAN_BLOCK = 1 << 22
# After so many tokens what was written is made to outlive the machine.
SAFE_TOKENS = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A validated, memory-mapped token file.

    Attributes:
        prefix: path of the pair without .bin or .idx.
        tokens: [num_tokens], all documents one after another, in the file's own integer type.
        document_starts: [num_documents + 1] int64, where each document begins in `tokens`; ends with num_tokens.
    """

    prefix: AnyPath
    tokens: np.ndarray
    document_starts: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, int32 [length]."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"got document {index}; expected 0 to {self.num_documents - 1} in {self.prefix}.bin.")
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]].astype(np.int32)

    def check_vocab(self, vocab_size: int) -> None:
        """Read every token once; ValueError unless all of them lie in [0, vocab_size)."""
        for start in range(0, self.num_tokens, _SCAN_BLOCK):
            block = self.tokens[start : start + _SCAN_BLOCK]
            low, high = int(block.min()), int(block.max())
            if low < 0 or high >= vocab_size:
                bad = low if low < 0 else high
                where = start + int(np.argmax(block == bad))
                raise ValueError(
                    f"{self.prefix}.bin holds token id {bad} at position {where}; expected ids from 0 to "
                    f"{vocab_size - 1}, the model's vocabulary; prepare the data with the model's own tokenizer."
                )


def open_token_file(path: str | os.PathLike) -> TokenFile:
    """Map a token file; `path` is its prefix or either file of the pair. Of one in a bucket, this host's copy.

    Raises:
        ValueError: a file is missing, truncated, of another format, or its index contradicts itself or the tokens.
    """
    prefix = _prefix(path)
    bin_path, idx_path = _with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")
    for each in (bin_path, idx_path):
        if not each.is_file():
            raise ValueError(
                f"{each} does not exist; expected a token file as a pair {bin_path.name} and {idx_path.name}; "
                "check the path, or copy the missing file beside the other."
            )
    bin_path, idx_path = local_copy(bin_path), local_copy(idx_path)
    dtype, sizes, pointers, doc_idx = _read_index(idx_path)
    _check_layout(idx_path, sizes, pointers, dtype.itemsize)
    total = int(sizes.sum(dtype=np.int64))
    size, expected = bin_path.stat().st_size, total * dtype.itemsize
    if size != expected:
        raise ValueError(
            f"{bin_path} has {size} bytes; expected {expected} for the {total} tokens of {dtype.itemsize} bytes "
            f"that {idx_path.name} lists; the two belong to different files or one is truncated: copy both again."
        )
    _check_documents(idx_path, doc_idx, len(sizes))
    starts = np.append(pointers // dtype.itemsize, total)[doc_idx]
    tokens = np.memmap(bin_path, dtype=dtype, mode="r") if total else np.zeros(0, dtype)
    return TokenFile(prefix, tokens, starts)


def _prefix(path: str | os.PathLike) -> AnyPath:
    path = as_path(path)
    if path.is_dir() and not _with_suffix(path, ".idx").is_file():
        indices = [name for name in children(path) if name.endswith(".idx")]
        if len(indices) != 1:
            raise ValueError(
                f"{path} is a directory with {len(indices)} token files; expected one (a pair NAME.bin and NAME.idx); "
                "give its path without .bin."
            )
        path = path / indices[0]
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _with_suffix(prefix: AnyPath, suffix: str) -> AnyPath:
    return prefix.with_name(prefix.name + suffix)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of an .idx file: element type of the .bin, sizes, byte offsets, document index."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC:
        raise ValueError(
            f"{path} begins with {header[: len(_MAGIC)]!r}; expected {_MAGIC!r}, the mark of a Megatron memory-mapped "
            "index; make the token file with a tool that writes the MMapIndexedDataset format."
        )
    if len(header) < _HEADER.size:
        raise ValueError(
            f"{path} has {size} bytes; expected at least {_HEADER.size} for the header; the file is truncated: copy it "
            "again."
        )
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}; expected {_VERSION}, the only one there is; write it again.")
    if code not in _DTYPES:
        raise ValueError(
            f"{path} has dtype code {code}; expected one of {sorted(_DTYPES)} (integers of 1, 2, 4 or 8 bytes); token "
            "ids must be whole numbers: write the file as uint16 or int32."
        )
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes; expected {expected} for the {sequences} sequences and {documents} document "
            "boundaries that its header counts; the file is truncated or its counts are wrong: copy or write it again."
        )
    with path.open("rb") as file:
        file.seek(_HEADER.size)
        sizes = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        doc_idx = np.fromfile(file, "<i8", documents)
    return np.dtype(_DTYPES[code]), sizes, pointers, doc_idx


def _check_layout(path: Path, sizes: np.ndarray, pointers: np.ndarray, itemsize: int) -> None:
    """Sequences lie one after another from byte 0 on, as every writer of the format puts them."""
    if len(sizes) and sizes.min() < 0:
        bad = int(np.argmax(sizes < 0))
        raise ValueError(
            f"{path} gives sequence {bad} a size of {sizes[bad]} tokens; expected at least 0; the index is damaged: "
            "copy or write it again."
        )
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    expected = np.concatenate([np.zeros(1, np.int64), ends])[: len(sizes)]
    if not np.array_equal(pointers, expected):
        bad = int(np.argmax(pointers != expected))
        raise ValueError(
            f"{path} puts sequence {bad} at byte {pointers[bad]}; expected byte {expected[bad]}, right after the "
            "sequence before it; the index is damaged or belongs to another file: copy or write it again."
        )


def _check_documents(path: Path, doc_idx: np.ndarray, sequences: int) -> None:
    ordered = len(doc_idx) > 0 and doc_idx[0] == 0 and doc_idx[-1] == sequences and bool((np.diff(doc_idx) >= 0).all())
    if not ordered:
        raise ValueError(
            f"{path} has a document index of {len(doc_idx)} entries that does not rise from 0 to the {sequences} "
            "sequences of the file; expected the number of each document's first sequence; write the file again."
        )


class TokenFileWriter:
    """Writes a token file document by document; the pair appears under its name only when it is whole.

    Used as a context manager. A ValueError, of bad text, leaves nothing; where the process ends or is told to, the disk
    is full or a server does not answer, what was written waits under another name: the next writer of the same prefix
    goes on behind its `num_documents`, and the caller skips so many.
    Tokens are stored as uint16 for vocabularies below 65536, else as int32.
    """

    def __init__(self, prefix: str | os.PathLike, vocab_size: int):
        self._prefix = _prefix(prefix)
        self._vocab_size = vocab_size
        self._code = 8 if vocab_size < 65536 else 4
        self._dtype = np.dtype(_DTYPES[self._code])
        self._sizes = array("i")
        self.num_tokens = 0

    def __enter__(self) -> "TokenFileWriter":
        tokens, sizes = (unpublished(_with_suffix(self._prefix, suffix), kept=True) for suffix in (".bin", ".sizes"))
        tokens.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as files:
            self._file = files.enter_context(tokens.open("a+b"))
            self._sizes_file = files.enter_context(sizes.open("a+b"))
            if not _locked(self._file):
                # Another process of this machine is writing the same.
                tokens, sizes = (unpublished(_with_suffix(self._prefix, suffix)) for suffix in (".bin", ".sizes"))
                files.close()
                self._file = files.enter_context(tokens.open("w+b"))
                self._sizes_file = files.enter_context(sizes.open("w+b"))
            self._files = files.pop_all()
        self._written = (tokens, sizes)
        self._recover()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._files:
            if kind is None:
                self._flush()
                self._publish()
            elif issubclass(kind, ValueError) and not issubclass(kind, OSError):
                self._written[0].unlink()
            else:
                # What is not on the disk by then is made again.
                with contextlib.suppress(OSError):
                    self._flush()
                return
            self._written[1].unlink()

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    def add(self, document: Sequence[int] | np.ndarray) -> None:
        """Append one document."""
        tokens = np.asarray(document, np.int64)
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            raise ValueError(
                f"got token ids from {tokens.min()} to {tokens.max()}; expected 0 to {self._vocab_size - 1}; give the "
                f"vocabulary size of the tokenizer that made them (document {len(self._sizes)} of {self._prefix})."
            )
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._sizes.append(len(tokens))
        self.num_tokens += len(tokens)
        self._unsafe += len(tokens)
        if self._unsafe >= SAFE_TOKENS:
            self._flush()

    def _recover(self) -> None:
        """Takes over what an interrupted writer left: the documents of which both size and tokens are there."""
        written = self._file.seek(0, os.SEEK_END) // self._dtype.itemsize
        self._sizes_file.seek(0)
        known = np.frombuffer(self._sizes_file.read(), np.uint8)
        sizes = known[: len(known) // 4 * 4].view(np.int32)
        whole = int(np.searchsorted(np.cumsum(sizes, dtype=np.int64), written, side="right"))
        self._sizes = array("i", sizes[:whole].tolist())
        self.num_tokens = int(sizes[:whole].sum(dtype=np.int64))
        self._file.truncate(self.num_tokens * self._dtype.itemsize)
        self._sizes_file.truncate(4 * whole)
        self._safe_documents, self._unsafe = whole, 0

    def _flush(self) -> None:
        """Puts on the disk what was added, tokens before their sizes: a size says that its tokens are there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._sizes_file.write(self._sizes[self._safe_documents :].tobytes())
        self._sizes_file.flush()
        self._safe_documents, self._unsafe = len(self._sizes), 0

    def _publish(self) -> None:
        sizes = np.frombuffer(self._sizes, np.int32) if self._sizes else np.zeros(0, np.int32)
        ends = np.cumsum(sizes, dtype=np.int64) * self._dtype.itemsize
        documents = np.arange(len(sizes) + 1, dtype="<i8")
        index = unpublished(_with_suffix(self._prefix, ".idx"))
        with index.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, self._code, len(sizes), len(documents)))
            file.write(sizes.astype("<i4").tobytes())
            file.write((ends - sizes.astype(np.int64) * self._dtype.itemsize).astype("<i8").tobytes())
            file.write(documents.tobytes())
        # The index goes last, and an older one first: at no moment does an index stand beside tokens of another file.
        _with_suffix(self._prefix, ".idx").unlink(missing_ok=True)
        publish(self._written[0], _with_suffix(self._prefix, ".bin"))
        publish(index, _with_suffix(self._prefix, ".idx"))


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # A file system without locks.
        return True
    return True
