"""Files on a disk or in a bucket (gs://): this module alone knows how the two differ.

On a disk a path is a pathlib.Path, in a bucket an epath.Path, which asks gcsfs. An object of a bucket appears when its
upload has ended, whole; a directory there is no more than the beginning of names, so that none can be renamed; nothing
can be appended to or mapped into memory. What is to be mapped is copied to this host's disk (`local_copy`), what grows
is written there and sent (`Mirror`).
"""

import contextlib
import fnmatch
import functools
import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from etils import epath

from radlads_jax.system.untrusted import brief

AnyPath: TypeAlias = Path | epath.Path

# A request's overhead is small beside either, and so is what a host has in memory twice.
_DOWNLOAD_BYTES, _UPLOAD_BYTES = 1 << 24, 1 << 26
_REQUESTS_AT_ONCE = 32
_ROLES = "roles/storage.objectAdmin and roles/storage.legacyBucketReader"


def as_path(where: str | os.PathLike) -> AnyPath:
    """The path that a user names: of this disk, absolute, or a gs:// URL, whose bucket is then asked for once.

    "~" is the user's home; what is relative is so to the directory in which the command was started. Whatever a flag
    or a setting names comes through here. Raises ValueError for another kind of URL, and where the bucket does not
    exist or cannot be read.
    """
    if isinstance(where, epath.Path) and in_bucket(where):
        return where
    text = os.fspath(where)
    if isinstance(where, Path | epath.Path) or not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|gs:/", text):
        return Path(_absolute(text))
    bucket = re.match(r"gs://([^/]+)", text)
    if bucket is None:
        raise ValueError(f"{text} is no path; expected one of this disk, or gs://BUCKET/NAME. Correct the URL.")
    _require_bucket(bucket[1])
    return epath.Path(text)


def whole_name(path: str) -> str:
    """The name of the same place that means it from any working directory; a URL's own, and "" for none."""
    return path if not path or re.match(r"\w+:/", path) else str(Path(_absolute(path)))


def whole_name_or_id(name: str) -> str:
    """The same for what may also be an id on the Hugging Face hub, which it stays where nothing has that name."""
    is_path = name.startswith(("~", ".", "/")) or (bool(name) and os.path.exists(name))
    return whole_name(name) if is_path else name


def _absolute(text: str) -> str:
    expanded = os.path.expanduser(text)
    if re.match(r"~[^/]+/", expanded):
        user = expanded[1:].split("/")[0]
        raise ValueError(f"{text}: {user} is no user of this machine; expected one, or ./{text} for such a directory.")
    # Not normalised: what ".." means behind a link, the disk knows.
    return expanded if os.path.isabs(expanded) else os.path.join(os.getcwd(), expanded)


def in_bucket(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith("gs://")


def access_errors() -> tuple[type[Exception], ...]:
    """What reading or writing may raise: OSError and ValueError, and with a bucket's client also its own."""
    if "gcsfs" not in sys.modules:
        return (OSError, ValueError)
    import aiohttp
    import gcsfs.retry
    import google.auth.exceptions

    return (OSError, ValueError, gcsfs.retry.HttpError, google.auth.exceptions.GoogleAuthError, aiohttp.ClientError)


def require_writable(directory: AnyPath) -> None:
    """Raises ValueError unless objects can be made, read and removed below a bucket's directory; a disk passes."""
    if not in_bucket(directory):
        return
    probe = f"{directory}/.may-be-written-{uuid.uuid4().hex}"
    bucket = str(directory).removeprefix("gs://").split("/")[0]
    try:
        # The checkpoints' writer asks it for the bucket's kind.
        _filesystem().call("GET", "b/{}", bucket)
        _filesystem().pipe_file(probe, b"radlads_jax")
        _filesystem().cat_file(probe)
        _filesystem().rm_file(probe)
    except access_errors() as error:
        raise ValueError(
            f"{directory} cannot be written ({_said(error)}); expected a bucket in which this account may make, "
            f"read, list and remove objects, and which it may look up. Give it {_ROLES} on the bucket, or choose "
            "another directory."
        ) from error


@functools.cache
def _require_bucket(bucket: str) -> None:
    """Checks that the client is there and the bucket answers."""
    try:
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"gs://{bucket} needs the package gcsfs, which is not there ({error}); expected the extra gcs. Install it: "
            "pip install -e '.[gcs]'."
        ) from error
    import fsspec

    # Other hosts write too: what a directory held before says nothing. Read when the first client is made.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    # epath would prefer TensorFlow where that is installed, with other credentials and errors.
    os.environ["EPATH_USE_TF"] = "false"
    try:
        _filesystem().call("GET", "b/{}/o", bucket, maxResults=1)
    except FileNotFoundError as error:
        raise ValueError(
            f"the bucket gs://{bucket} does not exist; expected one that does. Check its name, or make it: gcloud "
            f"storage buckets create gs://{bucket}."
        ) from error
    except access_errors() as error:
        raise ValueError(
            f"the bucket gs://{bucket} cannot be read ({_said(error)}); expected this "
            f"account to have {_ROLES} on it (to read alone: roles/storage.objectViewer). Grant them, or log in: "
            "gcloud auth application-default login."
        ) from error


def _said(error: Exception) -> str:
    return brief(" ".join(str(error).split()), 300) or type(error).__name__


def _filesystem() -> Any:
    import fsspec

    return fsspec.filesystem("gcs")


def size(path: AnyPath) -> int:
    """A file's bytes."""
    return _filesystem().info(str(path))["size"] if in_bucket(path) else os.path.getsize(path)


def _version(path: AnyPath) -> tuple[str, int, int]:
    """A file's name, bytes and what changes whenever it is written: its time in ns, in a bucket its generation."""
    if in_bucket(path):
        info = _filesystem().info(str(path))
        return str(path), info["size"], int(info["generation"])
    assert isinstance(path, Path)
    return str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns


def files_below(directory: AnyPath) -> list[AnyPath]:
    """Every file in a directory and in those below it, sorted."""
    if in_bucket(directory):
        names = _filesystem().find(str(directory))
        # A name that ends in a slash only marks a directory.
        return sorted(epath.Path(f"gs://{name}") for name in names if not name.endswith("/"))
    assert isinstance(directory, Path)
    return sorted(each for each in directory.rglob("*") if each.is_file())


def sizes_below(directory: AnyPath) -> dict[str, int]:
    """The bytes of every file in a directory and in those below it, by the file's name from there."""
    if in_bucket(directory):
        place = str(directory).removeprefix("gs://").rstrip("/")
        entries = _filesystem().find(str(directory), detail=True)
        return {n.removeprefix(f"{place}/"): info["size"] for n, info in entries.items() if not n.endswith("/")}
    return {file.relative_to(directory).as_posix(): size(file) for file in files_below(directory)}


def children(directory: AnyPath) -> dict[str, bool]:
    """What a directory holds, by name: whether it is a file."""
    if in_bucket(directory):
        files = {entry["name"]: entry["type"] == "file" for entry in _filesystem().ls(str(directory), detail=True)}
        return {name.rstrip("/").split("/")[-1]: is_file for name, is_file in files.items() if not name.endswith("/")}
    return {each.name: each.is_file() for each in directory.iterdir()}


def read_text(path: AnyPath) -> str:
    """A file's text, which is UTF-8."""
    return path.read_bytes().decode("utf-8") if in_bucket(path) else path.read_text(encoding="utf-8")


def open_text(path: AnyPath, *, unpack: bool = False) -> io.TextIOWrapper:
    """A file's text, read block by block, without the byte order mark it may begin with. unpack: it is a gzip file."""
    if unpack:
        return gzip.open(path.open("rb") if in_bucket(path) else path, "rt", encoding="utf-8-sig")
    # epath has no encoding of its own for a bucket's text.
    return io.TextIOWrapper(path.open("rb"), "utf-8-sig") if in_bucket(path) else path.open(encoding="utf-8-sig")


def write_text(path: AnyPath, text: str) -> None:
    """Writes a whole file in UTF-8, as `_write_bytes` does."""
    _write_bytes(path, text.encode("utf-8"))


def _write_bytes(path: AnyPath, data: bytes) -> None:
    """Writes a whole file; a reader sees the old one or the new one, nothing between."""
    if in_bucket(path):
        _filesystem().pipe_file(str(path), data)
        return
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[IO[bytes]]:
    """A file to be written from its beginning to its end, and then safe; in a bucket there is none after an error."""
    if not in_bucket(path):
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        return
    upload = _filesystem().open(str(path), "wb", block_size=_UPLOAD_BYTES)
    try:
        yield upload
    except BaseException:
        # Closing it would end the upload, and half an object would appear.
        upload.discard()
        upload.closed = True
        raise
    upload.close()


def copy_file(source: AnyPath, target: AnyPath) -> None:
    """Copies a small file, from and to wherever."""
    if in_bucket(source) or in_bucket(target):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copyfile(source, target)


def empty(directory: AnyPath) -> None:
    """Removes the files that a bucket's directory holds, if any."""
    for file in files_below(directory):
        _filesystem().rm_file(str(file))


def read_ranges(path: AnyPath, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
    """The bytes from start to stop of every range of a file; hardly any beside them are read or fetched."""
    if not in_bucket(path):
        return _read_local_ranges(path, ranges)
    requests = [
        (number, begin, min(begin + _DOWNLOAD_BYTES, stop))
        for number, (start, stop) in enumerate(ranges)
        for begin in range(start, stop, _DOWNLOAD_BYTES)
    ]
    _, begins, ends = zip(*requests, strict=True) if requests else ((), (), ())
    fetched = _filesystem().cat_ranges(
        [str(path)] * len(requests), list(begins), list(ends), batch_size=_REQUESTS_AT_ONCE, on_error="raise"
    )
    parts: list[list[bytes]] = [[] for _ in ranges]
    for (number, begin, end), data in zip(requests, fetched, strict=True):
        if len(data) != end - begin:
            raise OSError(f"{path} gave {len(data)} of {end - begin} bytes from byte {begin} on; try again.")
        parts[number].append(data)
    return [part[0] if len(part) == 1 else b"".join(part) for part in parts]


def _read_local_ranges(path: AnyPath, ranges: Sequence[tuple[int, int]]) -> list[bytes | memoryview]:
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return [_read_range(file, start, stop) for start, stop in ranges]


def _read_range(file: IO[bytes], start: int, stop: int) -> memoryview:
    # Not read(): a system call brings 2 GiB at most.
    data = np.fromfile(file, np.uint8, stop - start, offset=start - file.tell())
    if data.size != stop - start:
        raise OSError(f"{file.name} gave {data.size} of {stop - start} bytes from byte {start} on; it is cut short.")
    return data.data


def _cache_directory() -> Path:
    """Where this host keeps its copies of what lies in buckets; it may be removed at any time between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "radlads_jax"


def local_copy(path: AnyPath) -> Path:
    """A file on this host's disk: itself, or the kept copy of a bucket's, fetched where this version is not there."""
    if not in_bucket(path):
        return Path(path)
    copy = _place_of_copy(path)
    _fetch(path, copy)
    return copy


def local_directory(directory: AnyPath, patterns: Sequence[str]) -> Path:
    """A directory on this host's disk: itself, or copies of those files of a bucket's that have such names."""
    if not in_bucket(directory):
        return Path(directory)
    there = [name for name, is_file in children(directory).items() if is_file]
    wanted = sorted(name for name in there if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
    versions = [_version(directory / name) for name in wanted]
    target = _cache_directory() / hashlib.sha256(repr((str(directory), versions)).encode()).hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    for name in wanted:
        _fetch(directory / name, target / name)
    return target


def unpublished(path: AnyPath, *, kept: bool = False) -> Path:
    """Where to write, on this disk, what `publish` then gives its name.

    kept: under a name that does not depend on the process, so that a later one finds what this one had to leave.
    """
    if not in_bucket(path):
        place = Path(path).parent
    else:
        # Of runs in different buckets' directories only the one that wrote it is to find it again.
        place = _cache_directory() / hashlib.sha256(str(path.parent).encode()).hexdigest()[:16]
        place.mkdir(parents=True, exist_ok=True)
    mark = "unfinished" if kept else f"tmp-{os.getpid()}"
    return place / f"{path.stem}.{mark}{path.suffix}"


def publish(written: Path, path: AnyPath, *, keep: bool = True) -> None:
    """Gives an unpublished file its name; one that goes to a bucket also stays here, if kept, as the copy of it."""
    if not in_bucket(path):
        written.replace(path)
        return
    _filesystem().put_file(str(written), str(path))
    if keep:
        copy = _place_of_copy(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        written.replace(copy)
    written.unlink(missing_ok=True)


def _fetch(path: AnyPath, copy: Path) -> None:
    if copy.is_file():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{copy.name}.{os.getpid()}")
    try:
        _filesystem().get_file(str(path), str(temporary))
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)


def _place_of_copy(path: AnyPath) -> Path:
    digest = hashlib.sha256(repr(_version(path)).encode()).hexdigest()[:16]
    return _cache_directory() / digest / path.name


class Mirror:
    """A directory whose files grow: on a disk the target itself; for a bucket one of this disk that is sent there.

    path: where to write.
    """

    def __init__(self, target: AnyPath):
        self._target = target
        self._temporary = tempfile.TemporaryDirectory(prefix="radlads_jax-") if in_bucket(target) else None
        self.path = Path(self._temporary.name) if self._temporary else Path(target)
        self._sent: dict[str, tuple[int, int]] = {}
        self._time = time.monotonic()

    def fetch(self, name: str) -> None:
        """Brings a file of the target here, if it is there and was not written here before."""
        if self._temporary and not (self.path / name).exists() and (self._target / name).exists():
            (self.path / name).write_bytes((self._target / name).read_bytes())

    def send(self, *, every: float = 0.0) -> bool:
        """Puts what has changed into the bucket, unless that was tried in the last `every` seconds; returns whether."""
        if not self._temporary or time.monotonic() - self._time < every:
            return False
        self._time = time.monotonic()
        for file in files_below(self.path):
            name, state = file.relative_to(self.path).as_posix(), (file.stat().st_size, file.stat().st_mtime_ns)
            if self._sent.get(name) != state:
                _filesystem().put_file(str(file), f"{self._target}/{name}")
                self._sent[name] = state
        return True

    def close(self) -> None:
        """Ends the use of this disk; what was not sent is lost."""
        if self._temporary:
            self._temporary.cleanup()
