"""Text to token file, once: what was prepared before is found again by what it was made from."""

import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from radlads_jax.data.binidx import TokenFile, TokenFileWriter, open_token_file
from radlads_jax.data.sources import Source, documents, files_left_out, fingerprint
from radlads_jax.data.tokenise import BatchTokenizer, Framing, tokenised
from radlads_jax.system.json_files import digest, write_json
from radlads_jax.system.storage import AnyPath, as_path, children, in_bucket, read_text
from radlads_jax.system.untrusted import listed, parse_json


def prepare(
    source: Source,
    tokenizer: BatchTokenizer,
    cache_dir: str | os.PathLike,
    *,
    vocab_size: int,
    framing: Framing,
    max_tokens: int | None = None,
    alone: bool = False,
) -> TokenFile:
    """Tokenise a source into a token file below `cache_dir`, or open the one made before.

    Beside a new one stands NAME.json: what it was made from. What an interrupted call has tokenised is not tokenised
    again.

    Args:
        vocab_size: the model's; every id is checked against it.
        framing: what stands around every document.
        max_tokens: stop reading when there are so many, 1 or more; the last document is cut to fit.
        alone: refuse a directory with another token file, before anything is written.

    Raises:
        ValueError: bad text (see sources.documents), no text at all, an id outside the vocabulary.
    """
    made_from = _recipe(source, tokenizer, vocab_size, framing, max_tokens)
    name = digest(made_from)
    prefix = made_before(as_path(cache_dir), name)
    if alone:
        _require_alone(as_path(cache_dir), prefix)
    if prefix is None:
        prefix = as_path(cache_dir) / f"{_readable(source)}-{name}"
        _write(prefix, source, tokenizer, vocab_size, framing, max_tokens)
    # Also beside a file whose maker ended between the two.
    if not _beside(prefix).is_file():
        publish_recipe(prefix, made_from | {"left_out": files_left_out(source)})
    return open_token_file(prefix)


def _require_alone(directory: AnyPath, prefix: AnyPath | None) -> None:
    """Raises ValueError where the directory holds other token files than that one."""
    own = None if prefix is None else f"{prefix.name}.idx"
    names = children(directory) if directory.is_dir() else {}
    others = [name for name in sorted(names) if name.endswith(".idx") and name != own]
    if others:
        raise ValueError(
            f"{directory} holds {listed(others)}, made of other text or by other settings; expected a directory of its "
            "own, so that a run can be given it by name. Remove what is old, or choose another --output."
        )


def _write(
    prefix: AnyPath,
    source: Source,
    tokenizer: BatchTokenizer,
    vocab_size: int,
    framing: Framing,
    max_tokens: int | None,
) -> None:
    with TokenFileWriter(prefix, vocab_size) as writer, tokens_bar() as bar:
        task = bar.add_task(f"tokenising {source.path}", total=max_tokens, completed=writer.num_tokens)
        # A writer that goes on behind another has its first documents already.
        texts = itertools.islice(documents(source), writer.num_documents, None)
        ids = tokenised(texts, tokenizer, framing)
        while writer.num_tokens != max_tokens and (document := next(ids, None)) is not None:
            writer.add(document if max_tokens is None else document[: max_tokens - writer.num_tokens])
            bar.update(task, completed=writer.num_tokens)
        if writer.num_documents == 0:
            raise ValueError(
                f"{source.path} has no text in it; expected at least one document that is not empty; check the "
                "path and text_field."
            )


def _recipe(
    source: Source, tokenizer: BatchTokenizer, vocab_size: int, framing: Framing, max_tokens: int | None
) -> dict[str, Any]:
    """All that the tokens of a source depend on, and nothing else: not where it lies, nor when it was written."""
    return {
        "source": fingerprint(source),
        "tokenizer": tokenizer_hash(tokenizer),
        "vocab_size": vocab_size,
        "beginning": list(framing.beginning),
        "eos_id": framing.eos_id,
        "special_tokens": framing.special_tokens,
        "max_tokens": max_tokens,
    }


def made_from(token_file: TokenFile) -> dict[str, Any]:
    """What a token file's NAME.json says, empty for one that has none: made elsewhere, or by an older version."""
    path = _beside(token_file.prefix)
    if not path.is_file():
        return {}
    said = parse_json(read_text(path), path, "Prepare the data again.")
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds a JSON {type(said).__name__}; expected an object. Prepare the data again.")
    return said


def publish_recipe(prefix: AnyPath, recipe: dict[str, Any]) -> None:
    """Writes what a token file was made from beside it, and removes what was begun of others there."""
    write_json(_beside(prefix), recipe, indent=1)
    _remove_unfinished(prefix)


def _beside(prefix: AnyPath) -> AnyPath:
    return prefix.with_name(f"{prefix.name}.json")


def made_before(directory: AnyPath, name: str) -> AnyPath | None:
    """The token file of that digest, which ends its name, whatever its source was called."""
    names = children(directory) if directory.is_dir() else {}
    return next((directory / n.removesuffix(".idx") for n in sorted(names) if n.endswith(f"-{name}.idx")), None)


def _remove_unfinished(prefix: AnyPath) -> None:
    """Removes what interrupted calls have left of other data: nobody comes back for it."""
    if in_bucket(prefix):
        return
    for path in Path(prefix).parent.glob("*.unfinished.*"):
        path.unlink(missing_ok=True)


def tokenizer_hash(tokenizer: BatchTokenizer) -> str:
    """What tells a tokenizer's results from another's."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _readable(source: Source) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in Path(source.path).name)


def tokens_bar() -> Progress:
    """The bar of a tokenisation, shown on a terminal."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
