"""Files of text: which ones of a directory are read, what is plainly of another kind, and what tells contents apart."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from radlads_jax.system.storage import AnyPath, files_below, in_bucket, read_ranges, size

SUFFIXES = {"text": (".txt",), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}
# Of files that hold data of some kind, read or not: a directory that has such beside what is read says so.
_KNOWN = re.compile(r"\.(txt|text|md|jsonl?|parquet|arrow|csv|tsv|bin|idx)(\.(gz|zst|bz2|xz|zip))?$", re.IGNORECASE)

_JSON_LIST = "a list in JSON"
_HEAD_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 16
# Samples of a file, while there are few files and where there are many: 4 MiB and 256 KiB of each.
_SAMPLES, _SAMPLES_OF_MANY, _MANY_FILES = 64, 4, 64
# What a file begins with that is no text, and the setting under which it is read, or what to do with it.
_MAGIC = {
    b"PAR1": "parquet",
    b"MMIDIDX": "binidx",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
}


def data_files(directory: AnyPath) -> list[AnyPath]:
    """Every file in a directory and in those below it, sorted; links are followed, what begins with a dot is not read.

    A directory to which several names lead is read once, under the first of them.
    """
    if in_bucket(directory):
        skip = len(directory.parts)
        return [file for file in files_below(directory) if not _is_hidden(file.parts[skip:])]
    kept: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(Path(directory), followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        kept += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(file for file in kept if file.is_file())


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def each_once(files: Sequence[AnyPath]) -> list[AnyPath]:
    """The files without links to others of them, and of several links to one file elsewhere without all but one."""
    first: dict[str, AnyPath] = {}
    for file in sorted(files, key=lambda file: not in_bucket(file) and Path(file).is_symlink()):
        first.setdefault(_real_name(file), file)
    chosen = set(first.values())
    return [file for file in files if file in chosen]


def _real_name(file: AnyPath) -> str:
    return str(file) if in_bucket(file) else os.path.realpath(file)


def left_out(directory: AnyPath, read: Sequence[AnyPath]) -> list[str]:
    """The names of the data files in a directory that are not among those that are read."""
    chosen = set(map(_real_name, read))
    files = [file for file in data_files(directory) if _KNOWN.search(file.name) and _real_name(file) not in chosen]
    return [file.relative_to(directory).as_posix() for file in files]


def check_kind(file: AnyPath, kind: str) -> None:
    """Raises ValueError for a file that is plainly of another kind than text, jsonl or parquet, whichever is asked."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    is_whole = len(head) < _HEAD_BYTES
    head = head.removeprefix(codecs.BOM_UTF8)
    other = _plain_kind(head, is_whole)
    if kind == "jsonl" and (other == "gzip" or head.lstrip()[:1] == b"{" or not head.strip()):
        return
    if other == kind or (kind == "text" and other is None):
        return
    if other is None:
        if kind == "jsonl" or not _is_text(head):
            # Where it is read, the line that is none is named, or what is damaged.
            return
        other = "text"
    if other in ("jsonl", "parquet", "binidx", "text"):
        advice = f"Set --config.data.source={other}."
    elif other == _JSON_LIST:
        advice = "Write its objects one a line, as .jsonl, for --config.data.source=jsonl."
    else:
        advice = "Unpack it, or give .jsonl.gz as --config.data.source=jsonl."
    raise ValueError(
        f"{file} was given as {kind} and holds {other}; expected a file of the kind that config.data.source names. "
        f"{advice}"
    )


def _plain_kind(head: bytes, is_whole: bool) -> str | None:
    """What a file that begins so is without doubt; None for what may be text."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return kind
    lines = [line for line in head.split(b"\n") if line.strip()]
    # The last line is cut off where the file goes on; a single one that long may still begin as an object does.
    whole = lines if is_whole or len(lines) < 2 else lines[:-1]
    if whole and all(_is_object(line, cut=not is_whole and len(lines) < 2) for line in whole):
        return "jsonl"
    return _JSON_LIST if re.match(rb'\s*\[\s*\{\s*"[^"]*"\s*:', head) else None


def _is_text(head: bytes) -> bool:
    # A character that the end cuts in two counts as whole.
    return bool(head) and b"\0" not in head and "\ufffd" not in head[:-3].decode("utf-8", errors="replace")


def _is_object(line: bytes, *, cut: bool) -> bool:
    if cut:
        return re.match(rb'\s*\{\s*"[^"]*"\s*:', line) is not None
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def identity(file: AnyPath, *, of_many: bool = False) -> list:
    """[bytes, hash]: what tells a file's contents from others', wherever it lies; of large ones by samples."""
    length = size(file)
    count = _SAMPLES_OF_MANY if of_many else _SAMPLES
    if length <= count * _SAMPLE_BYTES:
        ranges = [(0, length)] if length else []
    else:
        last = length - _SAMPLE_BYTES
        ranges = [(last * i // (count - 1), last * i // (count - 1) + _SAMPLE_BYTES) for i in range(count)]
    digest = hashlib.sha256()
    for sample in read_ranges(file, ranges):
        digest.update(sample)
    return [length, digest.hexdigest()[:16]]


def identities(files: Sequence[AnyPath], below: AnyPath | None = None) -> dict[str, list]:
    """Every file's identity by its name in the directory; a file that is given alone may have any name."""
    of_many = len(files) > _MANY_FILES
    names = [file.relative_to(below).as_posix() if below is not None else "" for file in files]
    return {name: identity(file, of_many=of_many) for name, file in zip(names, files, strict=True)}
