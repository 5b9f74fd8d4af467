"""Whether a checkpoint that could not be read is damaged: a file of it is missing, cut, or not what was written.

The type of an error says little: Orbax meets a broken file of its own with a KeyError, and a call that another version
of it does not know with a TypeError. So its files are listed when they are whole, and compared when reading has failed.
"""

import contextlib
import json
import re
import zlib

from radlads_jax.system import storage
from radlads_jax.system.outage import chain
from radlads_jax.system.storage import AnyPath

# Beside Orbax's own files in a checkpoint's directory: {name: [bytes, CRC-32 or null]}.
_LIST = "files.json"
# The storage has checksums of its own in files of arrays, and those may be of any size.
_LARGEST_SUMMED = 1 << 20
_MAX_REASON = 300
# How tensorstore says that a file is not what it was: by these codes, or by none where it cannot be decoded.
_STORAGE_ERROR = re.compile(r"(?:(?P<code>[A-Z]{2}[A-Z_]+): )?(?:Error (?:reading|opening|decoding)|Encountered error)")
_DAMAGE_CODES = (None, "NOT_FOUND", "DATA_LOSS", "OUT_OF_RANGE", "FAILED_PRECONDITION")
# In an error of writing every code says that: RESOURCE_EXHAUSTED is a full disk.
_STORAGE_CODE = re.compile(r"(?:[A-Z]{2}[A-Z_]+: )|Error (?:writing|opening|reading)|Encountered error")


def list_files(directory: AnyPath) -> None:
    """Writes the list of a whole checkpoint's files. Without one, as on a disk with no room, less damage is known."""
    with contextlib.suppress(*storage.access_errors()):
        files = {name: [size, _sum(directory / name, size)] for name, size in storage.sizes_below(directory).items()}
        storage.write_text(directory / _LIST, json.dumps(files))


def damage(error: BaseException, directory: AnyPath) -> str | None:
    """What is wrong with the checkpoint's files where reading it has raised `error`; None where that is not the cause.

    Trouble on the way to the files, such as no permission or no connection, is no damage.
    """
    errors = list(chain(error))
    if any(isinstance(each, OSError) and not isinstance(each, FileNotFoundError) for each in errors):
        return None
    if not isinstance(error, Exception) or isinstance(error, MemoryError):
        return None
    listed = _read_list(directory)
    if listed is not None and (wrong := _changed(directory, listed)):
        return wrong
    if any(_is_of_the_storage(each) for each in errors):
        return reason(error)
    if listed is not None:
        return None
    # A process that is killed may leave a checkpoint without a list.
    if not (directory / "state" / "_METADATA").exists():
        return "state/_METADATA is missing"
    broken = any(isinstance(each, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError) for each in errors)
    return reason(error) if broken else None


def reason(error: BaseException) -> str:
    """What reading or writing has met, on one line of bounded length."""
    if type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(f"{type(error).__name__}: {error}".split())
    # The storage's messages begin with what was tried and end with what the system said.
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON // 3]} ... {text[-2 * _MAX_REASON // 3 :]}"


def is_of_the_system(error: BaseException) -> bool:
    """Whether the disk, the bucket or the storage on it has raised an error, rather than a mistake in a program."""
    return any(isinstance(each, OSError) or _STORAGE_CODE.match(str(each)) is not None for each in chain(error))


def _is_of_the_storage(error: BaseException) -> bool:
    """Whether tensorstore says that what it read is not what it wrote: with ValueError, or Orbax's bare Exception."""
    if not isinstance(error, ValueError):
        return False
    said = _STORAGE_ERROR.match(str(error))
    return said is not None and said["code"] in _DAMAGE_CODES


def _read_list(directory: AnyPath) -> dict[str, list[int | None]] | None:
    try:
        return json.loads(storage.read_text(directory / _LIST))
    except (FileNotFoundError, ValueError):
        return None


def _changed(directory: AnyPath, listed: dict[str, list[int | None]]) -> str | None:
    sizes = storage.sizes_below(directory)
    for name, (size, checksum) in listed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes, not {size:,}"
        if checksum is not None and _sum(directory / name, sizes[name]) != checksum:
            return f"the checksum of {name} is not that of what was saved"
    return None


def _sum(path: AnyPath, size: int) -> int | None:
    """CRC-32 of a small file; None for a large one, and in a bucket, which has checksums of its own."""
    if size > _LARGEST_SUMMED or storage.in_bucket(path):
        return None
    return zlib.crc32(path.read_bytes())
