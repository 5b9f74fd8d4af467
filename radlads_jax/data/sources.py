"""Documents of text from wherever they are: files, Hugging Face datasets, or the synthetic language."""

import dataclasses
import gzip
import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from io import TextIOBase
from typing import TYPE_CHECKING, Any, cast

import huggingface_hub
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError

from radlads_jax.data import synthetic
from radlads_jax.data.files import SUFFIXES, check_kind, data_files, each_once, identities, left_out
from radlads_jax.data.saved_dataset import is_saved, open_saved
from radlads_jax.system.storage import AnyPath, as_path, in_bucket, open_text
from radlads_jax.system.untrusted import brief, listed, parse_json

if TYPE_CHECKING:
    import datasets

READ_CHARACTERS = 1 << 20
# Of a line of jsonl: a compressed file may hold one that has no end.
_LINE_CHARACTERS = 1 << 26
# Of a parquet file's, which may be of any length each.
_ROWS_AT_ONCE = 256
_HUB_SECONDS = 20.0
# A connection's errors are those of the HTTP client, which is another one from release to release of the hub's library.
_HUB_ERRORS = cast(tuple[type[Exception], ...], (OSError, ValueError, *HfHubHTTPError.__bases__))
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where text comes from.

    Attributes:
        path: a file; a directory of files; of kind hf a directory that datasets' save_to_disk wrote, or owner/name on
            the Hugging Face hub; of the synthetic language no more than a name.
        kind: text, jsonl, parquet, hf or synthetic.
        text_field: the column with the text, for jsonl, parquet and hf.
        separator: stands between documents in plain text; a file without it is one document.
        config: the hub dataset's configuration.
        split: the hub dataset's split.
        revision: the hub dataset's commit, branch or tag; None for its main branch.
        streaming: read a hub dataset while it downloads, instead of downloading it first.
        seed: which synthetic language.
        num_documents: stop after so many; None takes all there are (the synthetic language has no end).
    """

    path: str
    kind: str = "text"
    text_field: str = "text"
    separator: str = "\n\n\n"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    seed: int = synthetic.TRAIN_SEED
    num_documents: int | None = None


def documents(source: Source) -> Iterator[str]:
    """The documents of a source in their order, empty ones left out.

    Raises:
        ValueError: a missing path, a broken line (with its number), no such column (with those there are).
    """
    texts = (text for text in _READERS[source.kind](source) if text.strip())
    return itertools.islice(texts, source.num_documents)


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells whether a source has changed, wherever it lies: the settings that matter, its files' contents.

    files: every file's bytes and hash by its name in the directory. commit: of a dataset on the hub the commit that
    its revision is now, None where the hub does not say.
    """
    described: dict[str, Any] = {"kind": source.kind, "num_documents": source.num_documents}
    if source.kind == "synthetic":
        sample = "\0".join(synthetic.documents(source.seed, 20))
        return described | {"seed": source.seed, "sample": hashlib.sha256(sample.encode()).hexdigest()}
    if source.kind == "text":
        described["separator"] = source.separator
    else:
        described["text_field"] = source.text_field
    place = as_path(source.path)
    if source.kind == "hf":
        described |= {"config": source.config, "split": source.split}
        if not place.is_dir():
            return described | {"hub": source.path, "commit": _hub_commit(source)}
    files = data_files(place) if source.kind == "hf" else _files(source)
    return described | {"files": identities(files, place if place.is_dir() else None)}


def _hub_commit(source: Source) -> str | None:
    try:
        return huggingface_hub.HfApi().dataset_info(source.path, revision=source.revision, timeout=_HUB_SECONDS).sha
    # Offline, gated or unknown: whether it can be read at all is said where it is read.
    except _HUB_ERRORS:
        return None


def files_left_out(source: Source) -> list[str]:
    """The data files beside those that are read, in the directory of a source; none for what is no directory."""
    place = as_path(source.path)
    if source.kind not in SUFFIXES or not place.is_dir():
        return []
    return left_out(place, _files(source))


def unescaped(separator: str) -> str:
    """A separator as it is meant: "\\n", as a shell passes it on, is a new line, and a double backslash is one."""
    return re.sub(r"\\([ntrfv0\\])", lambda escape: _ESCAPES[escape[1]], separator)


def _files(source: Source) -> list[AnyPath]:
    """The file, or all files of the source's kind below the directory, by name; none is plainly of another kind."""
    path, suffixes = as_path(source.path), SUFFIXES[source.kind]
    if not path.is_file() and not path.is_dir():
        # Who has named no kind may have meant the hub.
        or_hub = ", or set config.data.source=hf for a dataset on the Hugging Face hub" if source.kind == "text" else ""
        raise ValueError(
            f"{path} does not exist; expected a {source.kind} file or a directory of them; check the path{or_hub}."
        )
    files = [path]
    if not path.is_file():
        files = each_once([each for each in data_files(path) if each.name.endswith(suffixes)])
    if not files:
        others = left_out(path, [])
        beside = f" (it has {listed(others)})" if others else ""
        raise ValueError(
            f"{path} has no file ending in {' or '.join(suffixes)}{beside}; expected at least one; check the path and "
            "config.data.source."
        )
    for each in files:
        check_kind(each, source.kind)
    return files


def _read_text(source: Source) -> Iterator[str]:
    if not source.separator:
        raise ValueError("got an empty separator; expected the text that stands between documents; give one.")
    for path in _files(source):
        try:
            with open_text(path) as file:
                yield from _split(file, source.separator)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error


def _split(file: TextIOBase, separator: str) -> Iterator[str]:
    """The texts between separators, reading a block at a time."""
    buffer = ""
    while block := file.read(READ_CHARACTERS):
        # What was searched before can only hold the beginning of a separator.
        searched = max(0, len(buffer) - len(separator) + 1)
        buffer += block
        if buffer.find(separator, searched) >= 0:
            *whole, buffer = buffer.split(separator)
            yield from (text.strip("\n") for text in whole)
    yield buffer.strip("\n")


def _read_jsonl(source: Source) -> Iterator[str]:
    return (_text_of(record, source, where) for record, where in json_records(source))


def json_records(source: Source) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, where it stands) for every line of a source's .jsonl files."""
    for path in _files(source):
        try:
            with open_text(path, unpack=path.name.endswith(".gz")) as file:
                for number, line in enumerate(iter(lambda: file.readline(_LINE_CHARACTERS), ""), 1):
                    if line.strip():
                        yield _parse(line, f"{path}, line {number}"), f"{path}, line {number}"
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from error
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path} is not a whole gzip file ({error}); expected one; copy it again.") from error


def _parse(line: str, where: str) -> dict[str, Any]:
    if len(line) == _LINE_CHARACTERS:
        raise ValueError(
            f"{where} has {_LINE_CHARACTERS} characters or more; expected a document a line; write it as several."
        )
    record = parse_json(line, where, "Mend or remove the line.")
    if not isinstance(record, dict):
        raise ValueError(f"{where} holds a {type(record).__name__}; expected a JSON object with the text; mend it.")
    return record


def _read_parquet(source: Source) -> Iterator[str]:
    for path in _files(source):
        try:
            with pyarrow.parquet.ParquetFile(path.open("rb") if in_bucket(path) else path) as file:
                _check_column(file.schema_arrow.names, source, str(path))
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[source.text_field]):
                    for value in batch.column(0).to_pylist():
                        yield _text_of({source.text_field: value}, source, str(path))
        # pyarrow raises OSError for what it cannot decompress, and decodes the text only here.
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
            raise ValueError(
                f"{path} is not a whole parquet file ({brief(error)}); expected one with rows of text; copy it again."
            ) from error


def _read_hf(source: Source) -> Iterator[str]:
    data = _load_hf(source)
    if data.column_names is not None:
        _check_column(list(data.column_names), source, source.path)
        data = data.select_columns([source.text_field])
    for number, record in enumerate(_rows(data, source)):
        yield _text_of(record, source, f"{source.path}, row {number}")


def _rows(data: "datasets.Dataset | datasets.IterableDataset", source: Source) -> Iterator[dict[str, Any]]:
    """The records; a dataset that streams meets only here what its files hold."""
    try:
        yield from data
    except _dataset_errors() as error:
        raise _unreadable(source, error) from error


def _dataset_errors() -> tuple[type[Exception], ...]:
    """What datasets raises for files that are not there, broken, or unlike each other, and for a lost connection."""
    import datasets

    return (*_HUB_ERRORS, datasets.exceptions.DatasetsError, pyarrow.ArrowException)


def _unreadable(source: Source, error: Exception) -> ValueError:
    said, cause = str(error), str(error.__cause__ or "")
    # Of files that do not go together datasets says no more than that; its error's cause tells which and how.
    said = " ".join((said if cause in said else f"{said}: {cause}").split())
    return ValueError(
        f"the Hugging Face dataset {source.path} (config {source.config}, split {source.split}) cannot be read: "
        f"{brief(said.rstrip('.'), 600)}; expected a directory that save_to_disk wrote or a dataset on the hub, with "
        "files that are alike; check the name and the files, and set HF_TOKEN for a gated one."
    )


def _load_hf(source: Source) -> "datasets.Dataset | datasets.IterableDataset":
    # Here, for it takes every start a second of CPU time, and most runs read something else.
    import datasets

    path = as_path(source.path)
    try:
        if is_saved(path):
            data = open_saved(path)
        else:
            data = datasets.load_dataset(
                source.path,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
            )
    except _dataset_errors() as error:
        raise _unreadable(source, error) from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            raise ValueError(
                f"{source.path} has no split {source.split!r}; expected one of {', '.join(data)}; change it."
            )
        return data[source.split]
    return data


def _read_synthetic(source: Source) -> Iterator[str]:
    return (synthetic.document(source.seed, index) for index in itertools.count())


def _check_column(columns: list[str], source: Source, where: str) -> None:
    if source.text_field not in columns:
        raise ValueError(
            f"{where} has no column {source.text_field!r}; expected one of those it has: {listed(columns)}; set "
            "text_field."
        )


def _text_of(record: dict[str, Any], source: Source, where: str) -> str:
    """The text of a record; none at all counts as empty."""
    _check_column(list(record), source, where)
    text = record[source.text_field]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"{where} has a {type(text).__name__} in {source.text_field!r}; expected text; set text_field to a column "
            "of strings."
        )
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a character ({error.reason}); expected text; mend it.") from error
    return text or ""


def _not_utf8(path: AnyPath, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path} is no UTF-8 text ({error.reason}); expected UTF-8; convert it.")


_READERS: dict[str, Callable[[Source], Iterator[str]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "hf": _read_hf,
    "synthetic": _read_synthetic,
}
