"""Generators of bad data files, by kind, for fuzz_files.py."""

import gzip
import json
import struct
from pathlib import Path

import fuzz_readers as readers
import pyarrow
import pyarrow.parquet
from fuzz_damage import JUNK, Rng, deep, flipped, truncated
from fuzz_readers import MODEL


def token_file(rng: Rng, place: Path) -> None:
    """A .bin/.idx pair of which one field or file is wrong."""
    parts = readers.token_file_parts(rng)
    sizes, pointers, documents = parts["sizes"], parts["pointers"], parts["documents"]
    action = rng.randrange(11)
    lie = rng.choice((0, 1, len(sizes) - 1, len(sizes) + 1, 2**31, 2**40, 2**62, 2**64 - 1))
    if action == 0:
        parts["magic"] = flipped(rng, parts["magic"])
    elif action == 1:
        parts["version"] = rng.choice((0, 2, 2**32, 2**64 - 1))
    elif action == 2:
        parts["code"] = rng.choice((0, 6, 7, 9, 255))
    elif action == 3:
        parts["sequences"] = lie if lie != len(sizes) else 2**50
    elif action == 4:
        parts["boundaries"] = lie if lie != len(documents) else 2**50
    elif action == 5:
        sizes[rng.randrange(len(sizes))] += rng.choice((-1, 1, -(2**20), 2**30, -(2**31) + 100))
    elif action == 6:
        pointers[rng.randrange(len(pointers))] += rng.choice((-2, 2, 1, 2**40, -(2**62), 2**62))
    elif action == 7:
        documents[rng.choice((0, -1))] += rng.choice((-1, 1, 2**40, -(2**62)))
    elif action == 8:
        documents[len(documents) // 2] = rng.choice((-1, len(sizes) + 1, 2**62, -(2**63)))
    elif action == 9:
        parts["tokens"][rng.randrange(len(parts["tokens"]))] = rng.choice((MODEL.vocab_size, 65535))
    readers.write_token_file(place, parts)
    if action == 10:
        path = place / rng.choice(("t.bin", "t.idx"))
        data = path.read_bytes()
        path.write_bytes(rng.choice((truncated(rng, data), data + b"\0" * rng.randint(1, 9), b"")))


def token_file_bytes(rng: Rng, place: Path) -> None:
    readers.write_token_file(place, readers.token_file_parts(rng))
    path = place / rng.choice(("t.idx", "t.idx", "t.bin"))
    path.write_bytes(flipped(rng, path.read_bytes()))


def jsonl(rng: Rng, place: Path) -> None:
    lines = [json.dumps({"text": f"A line, number {i}.", "n": i}).encode() for i in range(rng.randint(1, 50))]
    at = rng.randrange(len(lines))
    good = lines[at]
    bad = (
        lambda: good[: rng.randrange(1, len(good))],
        lambda: good + b"}",
        lambda: b"\0" * rng.randint(1, 5),
        lambda: good.replace(b"line", b"li\0ne"),
        lambda: good.replace(b"line", b"li\xff\xfene"),
        lambda: deep(rng).encode(),
        lambda: b'{"text": ' + b"9" * 5000 + b"}",
        lambda: b'{"text": "\\ud800 alone"}',
        lambda: b'{"text": "a", "text"}',
        lambda: json.dumps(rng.choice([j for j in JUNK if not isinstance(j, dict)])).encode(),
        lambda: json.dumps({"text": rng.choice((1, 1.5, True, [], {}, ["a"], float("nan")))}).encode(),
        lambda: json.dumps({"body": "a"}).encode(),
        lambda: b"text: a",
        lambda: rng.randbytes(30).replace(b"\n", b"") + b"\xff",
    )
    lines[at] = rng.choice(bad)()
    (place / "data.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def jsonl_gz(rng: Rng, place: Path) -> None:
    text = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(300))
    whole = gzip.compress(text, mtime=0)
    # A line that never ends, in a file a thousandth of its size.
    endless = (lambda: gzip.compress(b'{"text": "' + bytes(300 << 20), 1, mtime=0)) if rng.random() < 0.02 else bytes
    damaged = (lambda: truncated(rng, whole), lambda: flipped(rng, whole, 20), lambda: flipped(rng, whole, 0, 3))
    data = endless() or rng.choice((*damaged, lambda: text, lambda: rng.randbytes(100), lambda: whole + b"garbage"))()
    (place / "data.jsonl.gz").write_bytes(data)


def text(rng: Rng, place: Path) -> None:
    data = b"A text with words. " * 20
    at = rng.randrange(len(data))
    bad = (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf")
    broken = data[:at] + rng.choice(bad) + data[at:]
    (place / "data.txt").write_bytes(rng.choice((broken, b"", b" \n" * 20, "words".encode("utf-16"))))


def parquet_column(rng: Rng, place: Path) -> None:
    """Sound files without the text column, or with one that holds no text."""
    wrong = ([1, 2], [1.5, 2.0], [True, False], [["a"], ["b"]], [{"a": 1}, {"a": 2}], [b"\xff", b"b"])
    columns = {rng.choice(("body", "Text", "text ", "", "../text")): ["a", "b"]}
    if rng.random() < 0.5:
        columns = {"text": rng.choice(wrong)}
    pyarrow.parquet.write_table(pyarrow.table(columns), place / "data.parquet")


def parquet_bytes(rng: Rng, place: Path) -> None:
    path, words = place / "data.parquet", [f"word {i}" * 3 for i in range(200)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": words}), path, compression=rng.choice(("snappy", "zstd", "none"))
    )
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    lengths = (0, 1, footer + 1, footer - 1, len(whole), 2**31 - 1, 2**31, 2**32 - 1)
    lying = whole[:-8] + struct.pack("<I", rng.choice(lengths)) + b"PAR1"
    # What the flips hit may be statistics, which nobody reads.
    choices = (
        truncated(rng, whole),
        flipped(rng, whole),
        flipped(rng, whole, len(whole) - footer - 8),
        lying,
        b"PAR1PAR1",
        b"",
    )
    path.write_bytes(rng.choice(choices))


def saved_dataset(rng: Rng, place: Path) -> None:
    """A directory of datasets' save_to_disk with a broken state, or one that points elsewhere."""
    readers.write_saved_dataset(place)
    (place.parent / "elsewhere.arrow").write_bytes((place / "data-00000-of-00001.arrow").read_bytes())
    state = json.loads((place / "state.json").read_text())
    action = rng.randrange(5)
    if action == 0:
        outside = (
            "../elsewhere.arrow",
            str(place.parent / "elsewhere.arrow"),
            "gone.arrow",
            "sub/../../elsewhere.arrow",
            "",
        )
        state["_data_files"] = [{"filename": rng.choice(outside)}]
    elif action == 1:
        state["_data_files"] = rng.choice((None, 1, "a", [1], [{}], [{"filename": 1}], [{"filename": None}], {"a": 1}))
    elif action == 2:
        path = place / rng.choice(("state.json", "dataset_info.json"))
        path.write_bytes(
            rng.choice((truncated(rng, path.read_bytes().strip()), deep(rng).encode(), b"[1]", b"\xff", b"9" * 5000))
        )
        return
    elif action == 3:
        path = place / "data-00000-of-00001.arrow"
        path.write_bytes(rng.choice((truncated(rng, path.read_bytes()[:-16]), b"", rng.randbytes(200))))
        return
    else:
        del state["_data_files"]
    (place / "state.json").write_text(json.dumps(state))
