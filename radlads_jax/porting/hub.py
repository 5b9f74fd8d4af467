"""Finding a model: a local directory, or a hub id of which only weights, configs and tokenizer files are downloaded."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import tokenizers
import transformers
from absl import logging

from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.safetensors_read import INDEX_FILE, SINGLE_FILE, find_files, indexed_files
from radlads_jax.system.json_files import POINTER_BYTES, read_json, refuse_pointer
from radlads_jax.system.storage import AnyPath, as_path, in_bucket, local_directory
from radlads_jax.system.untrusted import brief, listed

# No *.bin, *.pt or *.py: pickles and code are never fetched. All of the top folder alone: those below hold other
# formats of the same weights (original/, onnx/) and earlier states of them (checkpoint-500/).
SMALL_FILES = ("*.json", "tokenizer.model", "merges.txt", "vocab.*", "*.jinja")
_BELOW = "*/*"
# Mistral's own format, beside the one that is read.
_OTHER_WEIGHTS = "consolidated*.safetensors"

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
_SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model_dir(path_or_id: str | os.PathLike, revision: str | None = None) -> AnyPath:
    """The directory of a model: path_or_id itself where it exists, else the downloaded snapshot of that hub id.

    revision: branch, tag or commit on the hub. Of the weights only files that are read are downloaded. Raises
    ValueError where there is neither, where the hub cannot be reached and the model is not in the local cache, for a
    model without safetensors and for an adapter.
    """
    directory = as_path(path_or_id)
    if not in_bucket(directory) and not directory.exists():
        directory = _downloaded(str(path_or_id), revision)
    elif revision:
        raise ValueError(
            f"got the revision {revision} for {path_or_id}, a directory, which has none; expected one for a hub id "
            "alone. Leave it out."
        )
    find_files(directory)
    return directory


def files_without_weights(path_or_id: str | os.PathLike, revision: str | None = None) -> AnyPath:
    """As `resolve_model_dir`, but that config and tokenizer are enough, and all that is downloaded."""
    directory = as_path(path_or_id)
    if in_bucket(directory) or directory.exists():
        return directory
    return _downloaded(str(path_or_id), revision, weights=False)


def load_tokenizer(directory: str | os.PathLike) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of a model directory, exactly as its tokenizer.json describes it where there is one."""
    directory = as_path(directory)
    files = local_directory(directory, SMALL_FILES)
    for name in _SETTINGS:
        if (files / name).is_file():
            read_json(files / name)
    for name in _VOCABULARIES:
        if (files / name).is_file():
            with (files / name).open("rb") as file:
                refuse_pointer(files / name, file.read(POINTER_BYTES))
    try:
        tokenizer = _read_tokenizer(files)
    except BaseException as error:
        if not _is_of_the_files(error):
            raise
        raise ValueError(
            f"{directory} has no tokenizer that can be read ({brief(error, 400)}); expected tokenizer.json or the "
            "files of a tokenizer that transformers knows. Copy the model's tokenizer files into the directory."
        ) from error
    _check_added_tokens(files, tokenizer)
    if type(tokenizer.model_max_length) not in (int, float):
        raise ValueError(
            f"{directory}: the tokenizer's model_max_length is {brief(repr(tokenizer.model_max_length))}; expected a "
            "number. Correct tokenizer_config.json."
        )
    if isinstance(backend := getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        # A file may ask to cut or fill every text, and by as much as it likes; documents are tokenised whole.
        backend.no_truncation()
        backend.no_padding()
    return tokenizer


def _check_added_tokens(directory: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the library numbered a token of tokenizer.json anew, because its id left a gap."""
    file, vocab = directory / "tokenizer.json", tokenizer.get_vocab()
    added = read_json(file).get("added_tokens") or [] if file.is_file() else []
    moved = [token for token in added if vocab.get(token["content"]) != token["id"]]
    if moved:
        raise ValueError(
            f"{file} gives {brief(moved[0]['content'])} the id {moved[0]['id']}; expected the id "
            f"{vocab.get(moved[0]['content'])} that follows the vocabulary. Download the file again."
        )


def _read_tokenizer(directory: Path) -> transformers.PreTrainedTokenizerBase:
    if (directory / "tokenizer.json").is_file():
        # AutoTokenizer would replace the file's splitting rule with the one it knows for the model_type.
        return transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    # AutoTokenizer makes an empty tokenizer where a family's files are missing.
    names = [name for name in _VOCABULARIES if name != "merges.txt"]
    if not any((directory / name).is_file() for name in names):
        raise FileNotFoundError(f"it has none of {', '.join(names)}")
    return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


def _is_of_the_files(error: BaseException) -> bool:
    """Whether an error comes of what the files say.

    The tokenizers library raises Exception itself for what it cannot parse, and a panic of its Rust code is a
    BaseException; transformers takes values as they come, whatever their type.
    """
    kinds = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, RecursionError, OverflowError)
    return isinstance(error, kinds) or type(error) is Exception or type(error).__name__ == "PanicException"


def check_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, cfg: ModelConfig) -> None:
    """Raises ValueError for a tokenizer of another model: one with ids that the model's embedding does not have.

    Added tokens beyond it, which some models' tokenizers have and no text holds, only give a warning: whoever makes
    ids of text looks at each. The token that ends documents is one that data has.
    """
    outside = {token: number for token, number in tokenizer.get_vocab().items() if number >= cfg.vocab_size}
    if outside.keys() <= tokenizer.get_added_vocab().keys() and tokenizer.eos_token_id not in outside.values():
        if outside:
            logging.warning(
                "the tokenizer has %s with ids that the model's embedding of %d does not have; text with them is "
                "refused, other text is not affected",
                listed([f"{brief(token)} ({number})" for token, number in outside.items()]),
                cfg.vocab_size,
            )
        return
    raise ValueError(
        f"the tokenizer has ids up to {max(outside.values())} but the model's vocab_size is {cfg.vocab_size}; expected "
        f"every id below it that text may become: {listed(sorted(outside, key=lambda token: outside[token]))} are not. "
        "Use the tokenizer that belongs to the model."
    )


def check_ids(ids: Sequence[int], tokenizer: transformers.PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises ValueError where a text has tokens that the model's embedding does not have."""
    outside = sorted({i for i in ids if i >= vocab_size})
    if outside:
        raise ValueError(
            f"the text holds {listed([repr(tokenizer.convert_ids_to_tokens(i)) for i in outside])}, whose ids "
            f"{listed(outside)} the model's embedding of {vocab_size} does not have; expected text without. Leave the "
            "token out."
        )


def _downloaded(model_id: str, revision: str | None, *, weights: bool = True) -> Path:
    if not HUB_ID.fullmatch(model_id):
        raise ValueError(
            f"{model_id!r} is no existing directory and no hub id; expected a model directory or an id like "
            "'organisation/name'. Check the path."
        )
    try:
        snapshot = _fetched(model_id, revision, (*SMALL_FILES, SINGLE_FILE) if weights else SMALL_FILES)
        if not weights or (snapshot / SINGLE_FILE).is_file():
            return snapshot
        # The same commit, even where a branch has moved meanwhile: the snapshot has its name.
        revision = snapshot.name if _COMMIT.fullmatch(snapshot.name) else revision
        has_index = (snapshot / INDEX_FILE).is_file()
        return _fetched(model_id, revision, indexed_files(snapshot / INDEX_FILE) if has_index else ["*.safetensors"])
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if _is_refused(error):
            raise ValueError(
                f"the hub refused {model_id!r} ({reason}); expected a model that this account may read. Accept a gated "
                "model's terms on its page, and give an access token of the same account (huggingface.co, Settings, "
                "Access Tokens): HF_TOKEN=hf_... in the environment of every host, or `hf auth login` on this one. "
                f"Now {_token_said()}. Without an account, check the name: the hub says the same of one that it lacks."
            ) from error
        raise ValueError(
            f"{model_id!r} is no existing directory and could not be downloaded from the hub ({reason}); expected a "
            "model that exists there and can be reached. Check the name and the network, set HF_TOKEN for a gated "
            "model, or download it elsewhere and give the directory."
        ) from error


def _is_refused(error: BaseException) -> bool:
    """Whether the hub answered, and did not let this account have the model."""
    response = getattr(error, "response", None)
    return isinstance(error, huggingface_hub.errors.RepositoryNotFoundError) or (
        getattr(response, "status_code", None) in (401, 403)
    )


def _token_said() -> str:
    return "there is a token, which may not read it" if huggingface_hub.get_token() else "there is no token"


def _fetched(model_id: str, revision: str | None, patterns: Sequence[str]) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            model_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=[_BELOW, _OTHER_WEIGHTS]
        )
    )
