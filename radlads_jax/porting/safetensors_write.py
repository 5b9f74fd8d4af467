"""Streaming writer of sharded safetensors: tensors are asked for one at a time, and never held together.

Source: the safetensors format; names and index as transformers' save_pretrained writes them.
"""

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np

from radlads_jax.porting.safetensors_read import DTYPES, INDEX_FILE, SINGLE_FILE
from radlads_jax.system.json_files import write_json
from radlads_jax.system.storage import AnyPath, writing

_Fetch = Callable[[], np.ndarray]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written; fetch() gives it, in this shape and dtype, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: _Fetch

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: list[PlannedTensor], max_shard_size: int) -> dict[str, list[PlannedTensor]]:
    """The tensors of every file by its name; a file grows until the next tensor would pass max_shard_size bytes."""
    shards: list[list[PlannedTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_file(path: AnyPath, tensors: list[PlannedTensor]) -> None:
    """One safetensors file, safe on the disk or in the bucket."""
    with writing(path) as file:
        file.write(_header(tensors))
        for tensor in tensors:
            file.write(_as_bytes(tensor, tensor.fetch()))


def write_index(directory: AnyPath, files: dict[str, list[PlannedTensor]]) -> None:
    """The index of several files: which tensor is in which, and the bytes of all."""
    total_size = sum(tensor.num_bytes for tensors in files.values() for tensor in tensors)
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_FILE, index)


def _header(tensors: list[PlannedTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.num_bytes
        dtype = _DTYPE_NAMES[tensor.dtype]
        entries[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    # Readers map the data in place, which wants it aligned to 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _as_bytes(planned: PlannedTensor, array: np.ndarray) -> memoryview:
    if array.shape != planned.shape or array.dtype != planned.dtype:
        raise ValueError(
            f"{planned.name} came as {array.dtype} {array.shape}; expected {planned.dtype} {planned.shape}, which the "
            "header already says. Fetch the tensor that was planned."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
