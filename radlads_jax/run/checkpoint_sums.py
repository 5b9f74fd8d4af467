"""What tells a damaged checkpoint from a whole one: checksums of what it holds, taken before it is written.

Orbax and its storage notice a file that is missing or cut short, but not a bit that has changed in an array's data.
The sum of an array is taken where the array lies, from its bits and their places, and does not depend on how many
devices, processes or files hold it: a checkpoint of one mesh is checked on any other, before anything is trained.
"""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt32

# Odd, so that a place along an axis is never lost: 2^32 over the golden ratio.
_PLACE = 0x9E3779B1


class DamagedCheckpoint(ValueError):
    """A checkpoint does not hold what was saved. step: which one."""

    def __init__(self, step: int, where: Any, reason: str):
        super().__init__(
            f"the checkpoint of step {step} in {where} is damaged: {reason}. Expected what was saved; use another one."
        )
        self.step, self.reason = step, reason


@jax.jit
def array_sum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """sum_i mix(bits_i + place_i) mod 2^32. mix is a bijection, so that no change of a single element goes unseen."""
    bits = _words(x)
    axes = range(bits.ndim)
    places = (jax.lax.broadcasted_iota(jnp.uint32, bits.shape, a) * jnp.uint32(_PLACE ** (a + 1) % 2**32) for a in axes)
    return jnp.sum(_mix(bits + sum(places, jnp.uint32(0))), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The elements' bits as uint32; an element of eight bytes is two of them, on an axis of their own."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def array_sums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Every array's sum by its path. All processes have to ask."""
    # One after the other: of programs that run at once the CPU's devices may each begin another, and wait for ever.
    return {path: int(jax.device_get(array_sum(x))) for path, x in arrays.items()}


def document_sum(document: Any) -> int:
    """CRC-32 of a JSON document, the same before it is written and after it is read."""
    text = json.dumps(json.loads(json.dumps(document)), sort_keys=True)
    return zlib.crc32(text.encode())


def shapes_sum(arrays: Mapping[str, Any]) -> int:
    """CRC-32 of the arrays' paths, dtypes and shapes."""
    return document_sum({path: [str(x.dtype), *x.shape] for path, x in arrays.items()})


def sums_document(arrays: Mapping[str, jax.Array], documents: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored beside them to compare with, a JSON document of its own."""
    return {
        "arrays": array_sums(arrays),
        "shapes": shapes_sum(arrays),
        "documents": {name: document_sum(document) for name, document in documents.items()},
    }


def difference(sums: Mapping[str, Any], arrays: Mapping[str, jax.Array], documents: Mapping[str, Any]) -> str | None:
    """What of these arrays and documents is not as it was when `sums` were taken, in words; None where all is."""
    now = {"arrays": array_sums(arrays), "documents": {name: document_sum(d) for name, d in documents.items()}}
    for kind, values in now.items():
        wrong = [name for name, value in values.items() if sums.get(kind, {}).get(name) != value]
        if wrong:
            return f"the checksum of {wrong[0]} is not that of what was saved ({len(wrong)} of {len(values)} {kind})"
    return None
