"""The tokenizer of an export: its teacher's files, said so that every reader gets the ids that training had."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers

from radlads_jax.porting.hub import SMALL_FILES, load_tokenizer
from radlads_jax.system.json_files import read_json, write_json
from radlads_jax.system.storage import AnyPath, as_path, copy_file, local_directory, write_text
from radlads_jax.system.untrusted import brief

# Copied from the teacher's directory where they are there; nothing else is, in particular no code.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
# By this name AutoTokenizer takes tokenizer.json as it is; by a family's it puts the family's splitting rules in.
_CLASS_OF_THE_FILE = "PreTrainedTokenizerFast"
# Of some model types AutoTokenizer puts the family's class in the place of the one that is named (transformers 5), but
# for one that the directory brings itself; without leave to run its code it then takes the one that is named.
_OWN_CLASS = Path(__file__).parent.parent / "hf" / "tokenization_file.py"
_OWN_CLASS_NAME = "tokenization_file.FileTokenizer"
# What splitting rules and normalisers differ on: digits, spaces, marks, letters beyond ASCII, apostrophes, controls.
SAMPLES = (
    "Hello world, it's 1234567890 o'clock; they'LL pay $3.50 (or 12%)!",
    " two  spaces\tand\n\nlines \n  of code: x_1 = [0]*32 # end ",
    "Ünïcödé e\u0301 ﬁ Ａ ½ 数字 12 русский العربية हिन्दी 👩‍🚀 \u00a0\u200b\u3000",
    "CamelCase123abc 2024-01-02T03:04:05 https://a.b/c?d=e&f=%20",
)


def write_tokenizer(source: AnyPath, target: AnyPath, config: Mapping[str, Any]) -> None:
    """Copies a model's tokenizer files, adds tokenizer.json where there is none, and names the class that reads it.

    config: the config.json that will stand beside them. Files of which no tokenizer can be read are copied as they are.
    Raises ValueError where AutoTokenizer, on what was written, gives other ids than `load_tokenizer` gives on the
    source.
    """
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            copy_file(source / name, target / name)
    try:
        tokenizer = load_tokenizer(source)
    except ValueError:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    settings = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").is_file() else {}
    if not (source / "tokenizer.json").is_file():
        write_text(target / "tokenizer.json", backend.to_str())
        # What the family's class has without being told.
        named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        settings = named | {key: value for key, value in settings.items() if value is not None or key not in named}
    # The code that auto_map names is not copied.
    settings = {key: value for key, value in settings.items() if key != "auto_map"}
    settings["tokenizer_class"] = _CLASS_OF_THE_FILE
    write_json(target / "tokenizer_config.json", settings, ascii_only=False)
    written = _as_read(target, config)
    if any(wanted != got for _, wanted, got in _ids(tokenizer, written)):
        copy_file(_OWN_CLASS, target / _OWN_CLASS.name)
        settings |= {"auto_map": {"AutoTokenizer": [None, _OWN_CLASS_NAME]}}
        write_json(target / "tokenizer_config.json", settings, ascii_only=False)
        written = _as_read(target, config)
    _check_ids(tokenizer, written, source)


def check_exportable(source: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Raises ValueError, as `write_tokenizer` would after the training, where an export would have other ids."""
    with tempfile.TemporaryDirectory(prefix="radlads_jax-") as directory:
        write_tokenizer(as_path(source), Path(directory), config)


def _as_read(target: AnyPath, config: Mapping[str, Any]) -> Any:
    """The tokenizer that AutoTokenizer finds in the directory when config.json is there too."""
    with tempfile.TemporaryDirectory(prefix="radlads_jax-") as directory:
        whole = Path(directory)
        shutil.copytree(local_directory(target, SMALL_FILES), whole, dirs_exist_ok=True, ignore=_all_but_the_tokenizer)
        # Of a type with code of its own transformers knows no tokenizer, and would say what it thinks of that.
        if "auto_map" not in config:
            write_json(whole / "config.json", config, ascii_only=False)
        return transformers.AutoTokenizer.from_pretrained(whole, trust_remote_code=False)


def _all_but_the_tokenizer(directory: str, names: list[str]) -> list[str]:
    del directory
    return [name for name in names if name not in (*_TOKENIZER_FILES, _OWN_CLASS.name)]


def _ids(tokenizer: Any, written: Any) -> Iterator[tuple[str, list[int], list[int]]]:
    """Texts, and what both make of each."""
    for text in (*SAMPLES, f"a {' b '.join(tokenizer.all_special_tokens)} c"):
        for begun in (False, True):
            wanted, got = (each(text, add_special_tokens=begun)["input_ids"] for each in (tokenizer, written))
            yield text, wanted, got


def _check_ids(tokenizer: Any, written: Any, source: AnyPath) -> None:
    for text, wanted, got in _ids(tokenizer, written):
        if wanted != got:
            raise ValueError(
                f"the tokenizer of {source}, written for transformers' AutoTokenizer, gives {brief(got)} for "
                f"{brief(repr(text))}; expected {brief(wanted)}, as in training. Put a tokenizer.json there that "
                "says all of it (AutoTokenizer.from_pretrained(dir).save_pretrained(dir) writes one), or set "
                "config.data.tokenizer to a directory with one."
            )
    if written.eos_token_id != tokenizer.eos_token_id:
        raise ValueError(
            f"the tokenizer of {source}, written for transformers' AutoTokenizer, ends texts with "
            f"{written.eos_token_id}; expected {tokenizer.eos_token_id}, as in training. Name eos_token in its "
            "tokenizer_config.json."
        )
