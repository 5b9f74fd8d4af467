"""Text to token file, once: what was prepared before is found again by what it was made from."""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from radlads_jax.data.binidx import TokenFile, TokenFileWriter, open_token_file
from radlads_jax.data.sources import Source, documents, fingerprint, resolve
from radlads_jax.system.storage import as_path

# Enough text to keep all of the tokenizer's threads busy, little enough to stop soon after max_tokens.
BATCH_CHARACTERS = 1 << 20


@runtime_checkable
class BatchTokenizer(Protocol):
    """What is needed of a tokenizer: for each document a result with `.ids`, as `tokenizers.Tokenizer` gives."""

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> Sequence[Any]: ...


def prepare(
    source: Source,
    tokenizer: BatchTokenizer,
    cache_dir: str | os.PathLike,
    *,
    vocab_size: int,
    eos_id: int | None,
    max_tokens: int | None = None,
    tokenizer_fingerprint: str | None = None,
    progress: bool | None = None,
) -> TokenFile:
    """Tokenise a source into a token file below `cache_dir`, or open the one made before.

    A token file as source is opened as it is.

    Args:
        vocab_size: the model's; every id is checked against it.
        eos_id: appended to every document; None appends nothing.
        max_tokens: stop reading when there are so many; the last document is cut to fit.
        tokenizer_fingerprint: tells tokenizers apart; by default the hash of tokenizer.to_str().
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        ValueError: bad text (see sources.documents), no text at all, an id outside the vocabulary.
    """
    source = resolve(source)
    if source.kind == "binidx":
        token_file = open_token_file(source.path)
        token_file.check_vocab(vocab_size)
        return token_file
    if max_tokens is None and source.kind == "synthetic" and source.num_documents is None:
        raise ValueError(
            "got a synthetic source without an end; expected max_tokens or the source's num_documents; set one."
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"got max_tokens={max_tokens}; expected at least 1, or None for all; change it.")
    key = {
        "source": fingerprint(source),
        "tokenizer": tokenizer_fingerprint or _tokenizer_hash(tokenizer),
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "max_tokens": max_tokens,
    }
    prefix = as_path(cache_dir) / _cache_name(source, key)
    if not prefix.with_name(prefix.name + ".idx").is_file():
        with TokenFileWriter(prefix, vocab_size) as writer, _progress_bar(progress) as bar:
            task = bar.add_task(f"tokenising {source.path}", total=max_tokens)
            for ids in _tokenised(documents(source), tokenizer, eos_id):
                writer.add(ids if max_tokens is None else ids[: max_tokens - writer.num_tokens])
                bar.update(task, completed=writer.num_tokens)
                if writer.num_tokens == max_tokens:
                    break
            if writer.num_documents == 0:
                raise ValueError(
                    f"{source.path} has no text in it; expected at least one document that is not empty; check the "
                    "path and text_field."
                )
    return open_token_file(prefix)


def _tokenised(texts: Iterable[str], tokenizer: BatchTokenizer, eos_id: int | None) -> Iterator[list[int]]:
    ending = [] if eos_id is None else [eos_id]
    for batch in _batches(texts):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield encoding.ids + ending


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenizer_hash(tokenizer: BatchTokenizer) -> str:
    to_str = getattr(tokenizer, "to_str", None)
    if to_str is None:
        raise ValueError(
            f"got a {type(tokenizer).__name__}, which has no to_str(); expected something to tell its results from "
            "another tokenizer's; pass tokenizer_fingerprint."
        )
    return hashlib.sha256(to_str().encode()).hexdigest()


def _cache_name(source: Source, key: dict[str, Any]) -> str:
    """A name to read, and a hash of everything the tokens depend on."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(source.path).name)
    return f"{stem}-{digest[:16]}"


def _progress_bar(show: bool | None) -> Progress:
    show = sys.stderr.isatty() if show is None else show
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, disable=not show)
