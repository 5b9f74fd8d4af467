"""The teacher's likeliest tokens at every place of a token file's training rows: DIR/logits.json and DIR/rows-*.bin.

    logits.json           what it was made of and how (JSON), there from the beginning
    rows-<first row>.bin  the records of BLOCK_ROWS rows [R, T], the last block with what is left; a record is
                          indices [k] (u16 or i32), log_probs [k] (f16 or f32, of the whole vocabulary), rest (f32),
                          the probability of all other tokens

Numbers are little-endian. Row i is row i of `packing.train_rows` with the same seq_len and cross_document, however many
tokens are held out at the end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from radlads_jax.system import storage
from radlads_jax.system.json_files import write_json
from radlads_jax.system.storage import AnyPath, read_ranges
from radlads_jax.system.untrusted import brief, parse_json

FILE = "logits.json"
BLOCK_ROWS = 64
_PRECISIONS = ("float16", "float32")
_VERSION = 1
_SIZES = ("version", "top_k", "vocab_size", "seq_len", "rows", "block_rows")


@dataclasses.dataclass(frozen=True)
class StoredLogits:
    """A directory of them. recipe: what logits.json holds."""

    directory: AnyPath
    recipe: dict[str, Any]

    @property
    def top_k(self) -> int:
        return self.recipe["top_k"]

    @property
    def num_rows(self) -> int:
        return self.recipe["rows"]

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self._row_bytes

    @property
    def _record(self) -> np.dtype:
        index = "<u2" if self.recipe["vocab_size"] <= 1 << 16 else "<i4"
        value = "<f2" if self.recipe["log_probs"] == "float16" else "<f4"
        k = (self.top_k,)
        return np.dtype([("indices", index, k), ("log_probs", value, k), ("rest", "<f4")])

    @property
    def _row_bytes(self) -> int:
        return self.recipe["seq_len"] * self._record.itemsize

    def block_rows(self, block: int) -> np.ndarray:
        """The numbers of a block's rows."""
        size = self.recipe["block_rows"]
        return np.arange(block * size, min((block + 1) * size, self.num_rows))

    def missing(self) -> list[int]:
        """The numbers of the blocks that are not there whole."""
        sizes = storage.sizes_below(self.directory)
        blocks = range(-(-self.num_rows // self.recipe["block_rows"]))
        return [b for b in blocks if sizes.get(_name(self, b)) != len(self.block_rows(b)) * self._row_bytes]

    def write(
        self,
        block: int,
        indices: Int[np.ndarray, "R T k"],
        log_probs: Float[np.ndarray, "R T k"],
        rest: Float[np.ndarray, "R T"],
    ) -> None:
        """Writes a block, whole or not at all."""
        records = np.empty(rest.shape, self._record)
        records["indices"], records["log_probs"], records["rest"] = indices, log_probs, rest
        path = self.directory / _name(self, block)
        unfinished = storage.unpublished(path, kept=True)
        with storage.writing(unfinished) as file:
            file.write(records.tobytes())
        # Read by ranges, wherever they are: a copy of all on this disk would serve nobody.
        storage.publish(unfinished, path, keep=False)

    def rows(self, numbers: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """{"teacher_indices": int32 [B, T, k], "teacher_log_probs": float32 [B, T, k]} of rows.

        What rounding took from the k probabilities together is given back: with the rest they are 1.
        """
        records = np.stack([self._row(int(number)) for number in numbers])
        log_probs = records["log_probs"].astype(np.float32)
        known = np.log(np.exp(log_probs).sum(-1)) - np.log1p(-records["rest"])
        return {
            "teacher_indices": records["indices"].astype(np.int32),
            "teacher_log_probs": log_probs - known[..., None],
        }

    def _row(self, number: int) -> np.ndarray:
        block, place = divmod(number, self.recipe["block_rows"])
        begin = place * self._row_bytes
        (data,) = read_ranges(self.directory / _name(self, block), [(begin, begin + self._row_bytes)])
        return np.frombuffer(data, self._record)


def _name(stored: StoredLogits, block: int) -> str:
    return f"rows-{block * stored.recipe['block_rows']:010}.bin"


def begin(directory: AnyPath, recipe: dict[str, Any]) -> StoredLogits:
    """The directory of this recipe, begun now or before. Raises ValueError for one that holds others."""
    recipe = {"version": _VERSION, **recipe, "block_rows": BLOCK_ROWS}
    if (directory / FILE).exists():
        stored = open_logits(directory)
        if changed := differences(stored.recipe, recipe):
            raise ValueError(
                f"{directory} holds logits that were begun otherwise: {'; '.join(changed)}. Expected the same teacher, "
                "data and settings. Choose another --output, or remove what is there."
            )
        return stored
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FILE, recipe, indent=1)
    return StoredLogits(directory, recipe)


def differences(made: dict[str, Any], wanted: dict[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """Where two recipes differ, as words; names: all that are looked at, by default all."""
    names = sorted(made.keys() | wanted.keys()) if names is None else names
    return [
        f"{name} {brief(repr(made.get(name)))}, not {brief(repr(wanted.get(name)))}"
        for name in names
        if made.get(name) != wanted.get(name)
    ]


def open_logits(directory: AnyPath) -> StoredLogits:
    """The logits of a directory, whole or still being written. Raises ValueError where it holds none."""
    path, advice = directory / FILE, "Make them with python -m radlads_jax.store_logits --output DIR."
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a directory of a teacher's stored logits. {advice}")
    recipe = parse_json(storage.read_text(path), path, advice)
    sizes = {name: recipe.get(name) for name in _SIZES} if isinstance(recipe, dict) else {"logits.json": recipe}
    wrong = [name for name, size in sizes.items() if type(size) is not int or size < 1]
    if wrong or recipe["version"] != _VERSION or recipe.get("log_probs") not in _PRECISIONS:
        raise ValueError(
            f"{path} says {brief(repr(recipe))}; expected version {_VERSION}, sizes of at least 1 and log_probs one of "
            f"{', '.join(_PRECISIONS)}. {advice}"
        )
    return StoredLogits(directory, recipe)
