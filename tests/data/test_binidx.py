"""Token files: the bytes of the format, round trips, and every way a file can be damaged."""

import errno
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from radlads_jax.data.binidx import TokenFileWriter, open_token_file

DOCUMENTS = [[5, 6, 7], [8], [], [9, 10, 11, 12]]
# The header, by byte: magic 0-8, version 9-16, dtype code 17, sequences 18-25, document index 26-33; then the sizes.
SIZES_AT = 34


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, vocab_size: int = 100) -> Path:
    with TokenFileWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return prefix


def patch(path: Path, at: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(("vocab_size", "code", "width"), [(100, 8, 2), (65535, 8, 2), (65536, 4, 4), (152064, 4, 4)])
def test_bytes_on_disk(tmp_path: Path, vocab_size: int, code: int, width: int) -> None:
    write(tmp_path / "t", vocab_size=vocab_size)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 4, 5)
    index += struct.pack("<4i", 3, 1, 0, 4) + struct.pack("<4q", 0, 3 * width, 4 * width, 4 * width)
    index += struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "t.idx").read_bytes() == index
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<8" + {2: "H", 4: "i"}[width], *range(5, 13))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["t.bin", "t.idx"]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "t.v1")
    file = open_token_file(f"{tmp_path / 't.v1'}{suffix}")
    assert [file.document(i).tolist() for i in range(file.num_documents)] == DOCUMENTS
    assert (file.num_tokens, file.num_documents) == (8, 4)
    with pytest.raises(IndexError, match="got document 4; expected 0 to 3"):
        file.document(4)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    file = open_token_file(write(tmp_path / "t"))
    file.check_vocab(13)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 't'))}\.bin .* 12 at position 7; .*\b0 to 11\b"):
        file.check_vocab(12)


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    write(tmp_path / "t")
    # The same four sequences as two documents: the first three, then the last.
    data = (tmp_path / "t.idx").read_bytes()
    patched = data[:26] + struct.pack("<Q", 3) + data[SIZES_AT : -5 * 8] + struct.pack("<3q", 0, 3, 4)
    (tmp_path / "t.idx").write_bytes(patched)
    file = open_token_file(tmp_path / "t")
    assert [file.document(i).tolist() for i in range(file.num_documents)] == [[5, 6, 7, 8], [9, 10, 11, 12]]


def test_empty_file_has_no_tokens(tmp_path: Path) -> None:
    assert open_token_file(write(tmp_path / "t", [])).num_tokens == 0


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"PKZIP", "expected b'MMIDIDX"),
        (9, struct.pack("<Q", 2), "version 2; expected 1"),
        (17, b"\x06", r"dtype code 6; expected one of \[1, 2, 3, 4, 5, 8\]"),
        (18, struct.pack("<Q", 5), "for the 5 sequences"),
        (18, struct.pack("<Q", 2**63), rf"\b{2**63} sequences\b"),
        (26, struct.pack("<Q", 4), "4 document boundaries"),
        (SIZES_AT, struct.pack("<i", -3), r"sequence 0\b.* -3 tokens\b"),
        (SIZES_AT, struct.pack("<i", 2), "sequence 1 at byte 6; expected byte 4"),
        (SIZES_AT + 12, struct.pack("<i", 5), "expected 18 for the 9 tokens"),
        (SIZES_AT + 16, struct.pack("<q", 1 << 40), f"at byte {1 << 40}; expected byte 0"),
        (SIZES_AT + 48, struct.pack("<q", 1), r"\b5 entries\b.*\b0 to the 4 sequences\b"),
        (SIZES_AT + 56, struct.pack("<q", 3), r"\b5 entries\b.*\b0 to the 4 sequences\b"),
        (SIZES_AT + 80, struct.pack("<q", 9), r"\b5 entries\b.*\b0 to the 4 sequences\b"),
    ],
)
def test_damaged_index(tmp_path: Path, at: int, value: bytes, message: str) -> None:
    write(tmp_path / "t")
    patch(tmp_path / "t.idx", at, value)
    with pytest.raises(ValueError, match=message) as error:
        open_token_file(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "keep"), [("t.bin", 10), ("t.idx", 0), ("t.idx", 20), ("t.idx", 60)])
def test_truncated(tmp_path: Path, name: str, keep: int) -> None:
    write(tmp_path / "t")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:keep])
    with pytest.raises(ValueError, match=name):
        open_token_file(tmp_path / "t")


@pytest.mark.parametrize("name", ["t.bin", "t.idx"])
def test_missing(tmp_path: Path, name: str) -> None:
    write(tmp_path / "t")
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=rf"\b{name} .*\bt\.bin and t\.idx\b"):
        open_token_file(tmp_path / "t")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad text"), TokenFileWriter(tmp_path / "t", 100) as writer:
        writer.add([1, 2])
        raise ValueError("bad text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError, OSError(errno.ENOSPC, "full"), RuntimeError])
def test_an_interrupted_writer_is_gone_on_with(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind), TokenFileWriter(tmp_path / "t", 100) as writer:
        writer.add([1, 2])
        writer.add([])
        raise error
    assert not (tmp_path / "t.idx").exists() and not (tmp_path / "t.bin").exists()
    with TokenFileWriter(tmp_path / "t", 100) as writer, TokenFileWriter(tmp_path / "t", 100) as beside:
        assert (writer.num_documents, writer.num_tokens, beside.num_documents) == (2, 2, 0)
        writer.add([3])
        beside.add([4])
    assert open_token_file(tmp_path / "t").tokens.tolist() == [1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


def test_an_interrupted_writer_keeps_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "t")
    with pytest.raises(ValueError, match=r"\b1 to 100\b.*\b0 to 99\b"):
        write(tmp_path / "t", [[1, 100]])
    assert open_token_file(tmp_path / "t").num_tokens == 8


@pytest.mark.parametrize("bad", [[-1, 3], [3, 100]])
def test_writer_refuses_ids_outside_the_vocabulary(tmp_path: Path, bad: list[int]) -> None:
    with pytest.raises(ValueError, match=rf" {min(bad)} to {max(bad)}\b.*\b0 to 99\b"):
        write(tmp_path / "t", [bad])


def test_check_vocab(tmp_path: Path) -> None:
    file = open_token_file(write(tmp_path / "t"))
    file.check_vocab(13)
    with pytest.raises(ValueError, match=r"\b12 at position 7\b.* 0 to 11\b"):
        file.check_vocab(12)


def test_check_vocab_finds_negative_ids(tmp_path: Path) -> None:
    write(tmp_path / "t", vocab_size=70000)
    patch(tmp_path / "t.bin", 8, np.array([-7], "<i4").tobytes())
    with pytest.raises(ValueError, match="token id -7 at position 2"):
        open_token_file(tmp_path / "t").check_vocab(70000)
