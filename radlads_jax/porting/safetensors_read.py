"""Lazy reading of safetensors: headers are checked in full, tensors are memory-mapped one at a time.

Source: the safetensors format: an 8-byte little-endian header length, a JSON header, then the tensors without gaps.
"""

import dataclasses
import math
import mmap
import shlex
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from radlads_jax.system.json_files import POINTER_BYTES, read_json, refuse_pointer
from radlads_jax.system.storage import AnyPath, in_bucket, read_ranges
from radlads_jax.system.storage import size as size_of
from radlads_jax.system.untrusted import brief, listed, parse_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_MAX_HEADER_BYTES = 100_000_000  # The format's own limit.
_MAX_DIMENSIONS = 64  # As in numpy.
_AGAIN = "Download or export the file again."


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that has not been read; start and stop are byte positions in the whole file."""

    file: AnyPath
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def open(self) -> np.ndarray:
        """The tensor as a read-only view of the mapped file: pages are read when touched, and freed with the array.

        From a bucket it is read whole.
        """
        if self.start == self.stop:
            return np.zeros(self.shape, self.dtype)
        if in_bucket(self.file):
            (data,) = read_ranges(self.file, [(self.start, self.stop)])
            return np.frombuffer(data, self.dtype).reshape(self.shape)
        page_start = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as file:
            pages = mmap.mmap(file.fileno(), self.stop - page_start, offset=page_start, access=mmap.ACCESS_READ)
        return np.frombuffer(pages, self.dtype, math.prod(self.shape), self.start - page_start).reshape(self.shape)

    def read_rows(self, wanted: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Some of the tensor: for each (begin, end) its rows [end - begin, ...], and hardly a byte beside them."""
        row = (self.stop - self.start) // self.shape[0]
        ranges = [(self.start + begin * row, self.start + end * row) for begin, end in wanted]
        arrays = (np.frombuffer(data, self.dtype) for data in read_ranges(self.file, ranges))
        return [a.reshape(end - begin, *self.shape[1:]) for a, (begin, end) in zip(arrays, wanted, strict=True)]


def open_checkpoint(directory: AnyPath) -> dict[str, StoredTensor]:
    """Every tensor of a model directory by name, not yet read.

    Where there is an index, what it lists: files may hold more, and what none holds is not there. Raises ValueError as
    `find_files` does, for an index of files that are not there, and for damaged files.
    """
    path = find_files(directory)
    return _read_indexed(path) if path.name == INDEX_FILE else read_header(path)


def find_files(directory: AnyPath) -> AnyPath:
    """A directory's model.safetensors, else its index, else its only safetensors file.

    Raises ValueError where none is, and where an adapter lies there, whose weights are only a difference to a model's.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; expected a Hugging Face model directory. Check the path.")
    adapter = [name for name in _ADAPTER_FILES if (directory / name).is_file()]
    if adapter:
        raise ValueError(
            f"{directory} holds an adapter ({', '.join(adapter)}), which would be left out; expected whole weights. "
            f"Merge it into its base model: {merge_command(directory)} and use merged/ instead; or, to use a base "
            "model that lies beside it as it is, move the adapter's files away."
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if (directory / name).is_file():
            return directory / name
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ValueError(
            f"{directory} holds {len(files)} safetensors files and no {INDEX_FILE}; expected the index that says "
            "which tensor is in which file. Download the index too."
        )
    if (directory / "export").is_dir():
        raise ValueError(
            f"{directory} holds no weights itself, as a run's directory does not; expected a model's, which is "
            f"{directory / 'export'} here. Name that one."
        )
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    held = (
        f"only {', '.join(pickles[:3])}, and pickles are never loaded: they can run code" if pickles else "no weights"
    )
    raise ValueError(
        f"{directory} holds {held}; expected {SINGLE_FILE} or {INDEX_FILE} with its files. Convert the model where "
        "you trust it: transformers' from_pretrained(old) and then save_pretrained(new) write safetensors."
    )


def merge_command(directory: AnyPath) -> str:
    """The command that writes an adapter's model with the adapter merged in."""
    code = (
        "import sys, peft, transformers; d = sys.argv[1]; "
        "peft.AutoPeftModelForCausalLM.from_pretrained(d, dtype='auto').merge_and_unload().save_pretrained('merged'); "
        "transformers.AutoTokenizer.from_pretrained(d).save_pretrained('merged')"
    )
    return f'python -c "{code}" {shlex.quote(str(directory))}'


def read_header(path: AnyPath) -> dict[str, StoredTensor]:
    """The tensors of one file; ValueError where the header is not exactly what the format asks for."""
    size = size_of(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix.startswith(b"version "):
            refuse_pointer(path, prefix + file.read(POINTER_BYTES))
        if prefix.isascii() and len(prefix) == 8 and prefix.decode().isprintable():
            raise ValueError(
                f"{path} begins with {prefix.decode()!r}, as text does; expected a safetensors file. It may be a "
                f"server's page that refuses it. {_AGAIN}"
            )
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise ValueError(
                f"{path} has {size} bytes but its header alone wants {8 + length if len(prefix) == 8 else 8} (at most "
                f"{_MAX_HEADER_BYTES}); expected a whole safetensors file. {_AGAIN}"
            )
        text = file.read(length)
    header = parse_json(text, f"{path}: the header", _AGAIN, strict=True)
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is a JSON {type(header).__name__}; expected an object. {_AGAIN}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(
            f"{path}: the header's __metadata__ is {brief(metadata)}; expected an object of texts. {_AGAIN}"
        )
    tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def indexed_files(index: AnyPath) -> list[str]:
    """The names of the files that an index lists, each once; ValueError for what is no index of files beside it."""
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: AnyPath) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map with entries; expected tensor names with file names. {_AGAIN}")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    strange = [repr(n) for n in weight_map.values() if not isinstance(n, str)]
    strange += [n for n in sorted(names) if not _is_plain(n)]
    if strange:
        raise ValueError(
            f"{index} points at {listed(strange)}; expected names of .safetensors files in its directory. {_AGAIN}"
        )
    return weight_map


def _read_indexed(index: AnyPath) -> dict[str, StoredTensor]:
    directory, weight_map = index.parent, _weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} lacks {listed(missing)}; expected all {len(names)} files that {INDEX_FILE} lists. "
            "Download them."
        )
    stored = {file: read_header(directory / file) for file in names}
    return {name: stored[file][name] for name, file in weight_map.items() if name in stored[file]}


def _is_plain(name: str) -> bool:
    """Whether a file name stays inside its directory on every system."""
    return name.endswith(".safetensors") and not any(sign in name for sign in "/\\:\0") and not name.startswith(".")


def _stored_tensor(path: AnyPath, name: str, entry: Any, data_start: int) -> StoredTensor:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(
            f"{path}: {brief(name)} has dtype {brief(repr(dtype))}; expected one of {', '.join(DTYPES)}. {_AGAIN}"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{path}: {brief(name)} has shape {brief(shape)} and data_offsets {brief(offsets)}; expected a list of "
            f"sizes and [start, stop] with start <= stop. {_AGAIN}"
        )
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"{path}: {brief(name)} takes {offsets[1] - offsets[0]} bytes; expected {wanted} for {dtype} "
            f"{brief(shape)}. {_AGAIN}"
        )
    return StoredTensor(path, DTYPES[dtype], tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= _MAX_DIMENSIONS
        and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    )


def _check_layout(path: AnyPath, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise ValueError(
                f"{path}: {brief(name)} starts at byte {tensor.start} and {what}; expected {end}. {_AGAIN}"
            )
        end = tensor.stop
    if end != size:
        state = "is truncated" if size < end else "is too long"
        raise ValueError(f"{path} {state}: got {size} bytes, expected {end}. {_AGAIN}")
