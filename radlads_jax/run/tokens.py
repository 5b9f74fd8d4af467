"""A run's tokens: of the token file that is given, that the work directory has already, or that is made of the text."""

import dataclasses
import os
from typing import Any

import numpy as np
from absl import logging

from radlads_jax.config import RunConfig
from radlads_jax.data import binidx, chats, prepare, sources
from radlads_jax.data.tokenise import Framing, prompt_beginning
from radlads_jax.porting.hub import files_without_weights, load_tokenizer
from radlads_jax.run import fingerprint
from radlads_jax.run.settings import begun_setting, names_others
from radlads_jax.system.storage import AnyPath, as_path, children
from radlads_jax.system.untrusted import listed

# Kinds of text that lie in files.
_IN_FILES = ("text", "jsonl", "parquet")
# As older versions tokenised: no beginning, and a special token's name in the text was that token.
_FORMERLY: dict[str, Any] = {"beginning": [], "special_tokens": True}
# Documents of a foreign token file that are looked at for how they begin.
_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A token file and what is known of it: the recipe it was made by, {} of one that was made elsewhere.

    beginning: ids that every document begins with, and so a prompt that is to look like one.
    """

    file: binidx.TokenFile
    recipe: dict[str, Any]
    beginning: tuple[int, ...]


def find_tokens(run: RunConfig, workdir: AnyPath, tokenizer: Any, vocab_size: int) -> Tokens:
    """The run's tokens. Raises ValueError where they are not those that the run began with, or not the tokenizer's."""
    if run.data.source == "binidx":
        return _given(run, tokenizer, vocab_size)
    begun = fingerprint.read(workdir).get("data") or (dict(_FORMERLY) if fingerprint.has_begun(workdir) else {})
    is_finished = fingerprint.finished(workdir, run.stages) is not None and not names_others(workdir, run)
    if begun and not is_finished:
        if "eos_id" in begun:
            before, now = ({"tokenizer": {"eos_token's id": i}} for i in (begun["eos_id"], tokenizer.eos_token_id))
            fingerprint.require_same(before, now, workdir)
        begun = _same_source(run, workdir, begun)
    file = _kept(workdir, begun)
    if file is None:
        around = framing(run, tokenizer)
        if begun:
            around = Framing(tuple(begun["beginning"]), around.eos_id, begun["special_tokens"])
        file = _tokenise(run, workdir / "data", tokenizer, vocab_size, around)
        begun = prepare.made_from(file) | begun
    elif not is_finished:
        file.check_vocab(vocab_size)
    return Tokens(file, begun, tuple(begun["beginning"]))


def _same_source(run: RunConfig, workdir: AnyPath, begun: dict[str, Any]) -> dict[str, Any]:
    """What is known of the run's text, which has to be the same as long as it is there.

    Of a run that an older version began it is what is there now that is told from others.
    """
    if _is_gone(run, begun):
        logging.warning("%s is not there; the run goes on with its tokens in %s", run.data.path, workdir / "data")
        return begun
    source = sources.fingerprint(_source(run))
    if before := begun.get("source"):
        # Where one of them could not ask the hub, only the name is compared.
        if "hub" in before and "hub" in source and None in (before.get("commit"), source["commit"]):
            commit = before.get("commit") or source["commit"]
            before, source = ({**known, "commit": commit} for known in (before, source))
        fingerprint.require_same({"source": before}, {"source": source}, workdir)
    return begun | {"source": source}


def _tokenise(
    run: RunConfig,
    directory: AnyPath,
    tokenizer: Any,
    vocab_size: int,
    around: Framing | None = None,
    *,
    alone: bool = False,
) -> binidx.TokenFile:
    """Makes a run's token file in a directory, or finds it there.

    around: by default what the config says. alone: as of `prepare.prepare`.
    """
    data = run.data
    # What the longest stage reads, and what packing leaves over.
    needed = run.eval_tokens + max(recipe.steps * recipe.tokens_per_step for recipe in run.recipes.values())
    limit = data.max_tokens or (needed + needed // 50 + 10**6 if data.streaming else None)
    return prepare.prepare(
        _source(run),
        tokenizer.backend_tokenizer,
        directory,
        vocab_size=vocab_size,
        framing=around or framing(run, tokenizer),
        max_tokens=limit,
        alone=alone,
    )


def find_chats(run: RunConfig, workdir: AnyPath, tokenizer: Any, vocab_size: int) -> binidx.TokenFile | None:
    """The tokens of config.data.chats, None where it names none; those in data/ where the conversations are gone."""
    if not run.data.chats:
        return None
    begun, same_name = fingerprint.written(workdir).get("chats"), begun_setting(workdir, "config.data.chats")
    if begun and run.data.chats == same_name and not as_path(run.data.chats).exists():
        kept = workdir / "data" / begun["token_file"]
        logging.warning("%s is not there; the run goes on with its tokens in %s", run.data.chats, kept)
        return binidx.open_token_file(kept)
    field, directory = run.data.messages_field, workdir / "data"
    return chats.prepare_chats(run.data.chats, field, tokenizer, directory, vocab_size=vocab_size)


def described_chats(file: binidx.TokenFile) -> str:
    """How many conversations, and how much of them the assistant says."""
    share = chats.answered_tokens(file) / file.num_tokens
    return f"{file.num_documents:,} conversations of {file.num_tokens:,} tokens, {share:.0%} of them the assistant's"


def prepare_tokens(run: RunConfig, output: AnyPath) -> Tokens:
    """Makes the token file that a run with config.data.source=binidx and config.data.path=output takes for its text.

    No weights are read; of a teacher on the hub config and tokenizer alone are downloaded. Raises ValueError for a
    config whose data are tokens already, or that would give another text's tokens to a run.
    """
    if run.data.source == "binidx":
        raise ValueError(
            f"config.data.source is 'binidx' and config.data.path {run.data.path!r}: these are tokens already; "
            "expected text. Leave the preparation out, or name the text that is to be prepared."
        )
    if not run.data.tokenizer and not run.teacher.path:
        raise ValueError(
            "config.data.tokenizer is empty and there is no teacher to take one from; expected a directory or hub id. "
            "Set it."
        )
    revision = None if run.data.tokenizer else run.teacher.revision or None
    directory = files_without_weights(run.data.tokenizer or run.teacher.path, revision)
    tokenizer = load_tokenizer(directory)
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    file = _tokenise(run, output, tokenizer, vocab_size, alone=True)
    said = prepare.made_from(file)
    return Tokens(file, said, tuple(said["beginning"]))


def framing(run: RunConfig, tokenizer: Any) -> Framing:
    """What stands around documents: config.data.bos decides of their beginning, or else the tokenizer itself."""
    beginning = prompt_beginning(tokenizer)
    if run.data.bos is False:
        beginning = ()
    elif run.data.bos and not beginning:
        if tokenizer.bos_token_id is None:
            raise ValueError(
                "config.data.bos is true and the tokenizer has no token for a text's beginning; expected one. Leave "
                "config.data.bos out."
            )
        beginning = (tokenizer.bos_token_id,)
    return Framing(beginning, tokenizer.eos_token_id, run.data.special_tokens)


def _source(run: RunConfig) -> sources.Source:
    data = run.data
    return sources.Source(
        data.path or "synthetic",
        kind=data.source,
        text_field=data.text_field,
        separator=sources.unescaped(data.separator),
        config=data.name or None,
        split=data.split,
        revision=data.revision or None,
        streaming=data.streaming,
        seed=data.seed,
        num_documents=data.documents if data.source == "synthetic" else None,
    )


def _given(run: RunConfig, tokenizer: Any, vocab_size: int) -> Tokens:
    """The token file that the config names; one of our own has to be made by this tokenizer and these settings."""
    file = binidx.open_token_file(as_path(run.data.path))
    said, wanted = prepare.made_from(file), framing(run, tokenizer)
    expected: dict[str, Any] = {"tokenizer": prepare.tokenizer_hash(tokenizer.backend_tokenizer)}
    expected |= {"eos_id": wanted.eos_id, "beginning": list(wanted.beginning), "special_tokens": wanted.special_tokens}
    other = [f"{name} {said[name]!r}, not {now!r}" for name, now in expected.items() if said.get(name, now) != now]
    if other:
        raise ValueError(
            f"{file.prefix}.bin was made with other settings ({'; '.join(other)}); expected those of this run, so "
            "that the data look as the teacher's prompts do. Prepare it again with this config, or set "
            "config.data.tokenizer, config.data.bos and config.data.special_tokens as they were then."
        )
    file.check_vocab(vocab_size)
    begins = _begins_with(file, wanted.beginning)
    if not said and (run.data.special_tokens or (run.data.bos and not begins)):
        asked = "special_tokens" if run.data.special_tokens else "bos"
        raise ValueError(
            f"config.data.{asked} is true, and {file.prefix}.bin was made elsewhere, whose tokens are read as they are"
            f"{'' if asked == 'special_tokens' else ': its documents begin otherwise'}. Leave it out."
        )
    return Tokens(file, said, wanted.beginning if said or begins else ())


def _begins_with(file: binidx.TokenFile, beginning: tuple[int, ...]) -> bool:
    """Whether the first documents of a token file, those that are not empty, all begin so."""
    first = (file.document(i)[: len(beginning)] for i in range(min(file.num_documents, _LOOKED_AT)))
    return all(tuple(ids.tolist()) == beginning for ids in first if len(ids))


def _kept(workdir: AnyPath, begun: dict[str, Any]) -> binidx.TokenFile | None:
    """The token file in data/ that a run which has begun reads; None where it is to be made."""
    directory = workdir / "data"
    if name := begun.get("token_file"):
        return binidx.open_token_file(directory / name) if (directory / f"{name}.idx").is_file() else None
    if not begun or not directory.is_dir():
        return None
    names = sorted(name.removesuffix(".idx") for name in children(directory) if name.endswith(".idx"))
    old = [file for name in names if not prepare.made_from(file := binidx.open_token_file(directory / name))]
    if len(old) > 1:
        raise ValueError(
            f"{directory} holds {len(old)} token files of an older version ({listed(names)}); expected the one that "
            "the run was begun with. Move the others away (the run's is the oldest, unless its text was changed before "
            "the first step), or choose another --workdir."
        )
    return old[0] if old else None


def _is_gone(run: RunConfig, known: dict[str, Any]) -> bool:
    """Whether the text is not there any more, or on the hub, where it is not asked for again."""
    if run.data.source in _IN_FILES:
        return not as_path(run.data.path).exists()
    return run.data.source == "hf" and "hub" not in known.get("source", {}) and not os.path.exists(run.data.path)


def described(file: binidx.TokenFile, known: dict[str, Any]) -> str:
    """Files, documents and their middle length, and what of all this may not be meant."""
    source, lengths = known.get("source", {}), np.diff(file.document_starts)
    files = len(source.get("files", {}))
    told = f"{files:,} {'file' if files == 1 else 'files'} with " if files else ""
    many = "1 document" if len(lengths) == 1 else f"{len(lengths):,} documents"
    told += f"{many} of {int(np.median(lengths)) if len(lengths) else 0:,} tokens (median)"
    if source.get("kind") == "text" and len(lengths) <= files:
        told += (
            f", one a file: none of them holds the separator {source['separator']!r} (config.data.separator is what "
            "stands between documents)"
        )
    if beside := known.get("left_out"):
        told += f", without {listed(beside)} beside them (config.data.source says which kind is read)"
    return told
