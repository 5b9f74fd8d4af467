"""Export: our parameter tree as a Hugging Face directory, which appears under its name only when it is whole."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import Params, flatten, shown
from radlads_jax.porting.families import text_config
from radlads_jax.porting.model_card import write_model_card
from radlads_jax.porting.safetensors_write import PlannedTensor, plan_files, write_file, write_index
from radlads_jax.porting.tokenizer_files import write_tokenizer
from radlads_jax.porting.writers import writer_for
from radlads_jax.system.json_files import write_json
from radlads_jax.system.storage import AnyPath, as_path, children, copy_file, empty, in_bucket, write_text

_GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"
# In a bucket: the mark of an export that is not yet whole.
_PARTIAL = ".partial"
EXPORT_DTYPES = ("float32", "bfloat16")


def save_params(
    params: Params,
    cfg: ModelConfig,
    directory: str | os.PathLike,
    *,
    base_config: dict[str, Any],
    dtype: str | None = None,
    max_shard_size: int = 5_000_000_000,
    tokenizer_from: str | os.PathLike | None = None,
    retie: bool = False,
    model_card: str | None = None,
    writer: str | None = None,
) -> AnyPath:
    """Writes safetensors, config.json, the tokenizer's files and generation_config.json; returns the directory.

    A student's export also gets torch modelling files, the auto_map that finds them, and a model card (README.md).

    base_config: the teacher's config.json, whose other keys are kept; its token ids are generation_config.json where
    tokenizer_from has none. dtype: "float32" or "bfloat16"; None keeps each parameter's own.
    max_shard_size: bytes of a file. retie: leave the head out and write tie_word_embeddings true.
    model_card: README.md's text; default for a student: what its configuration says.
    writer: a name of WRITERS, or of an engine that reads the model's own format; default: the mixer's own.
    Tensors leave the devices one at a time. Everything goes into a hidden sibling directory that is renamed at the end;
    an earlier export of that name is removed after the rename. In a bucket, where nothing can be renamed, an earlier
    export goes first, and until all is there .partial lies beside it. With several processes all must call this; the
    first one writes. Raises ValueError where parameters do not fit cfg or the target is something other than an export.
    """
    directory = as_path(directory)
    directory = directory if in_bucket(directory) else directory.resolve()
    tokenizer_from = None if tokenizer_from is None else as_path(tokenizer_from)
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise ValueError(f"the export's dtype is {dtype!r}; expected one of {', '.join(EXPORT_DTYPES)}. Choose one.")
    if max_shard_size <= 0:
        raise ValueError(
            f"max_shard_size is {max_shard_size}; expected a number of bytes above 0. Set it, or leave it out."
        )
    flat = flatten(params)
    _check_params(flat, cfg)
    cfg = dataclasses.replace(cfg, tie_embeddings=cfg.tie_embeddings or retie)
    form = writer_for(cfg, writer)
    form.require(cfg, tokenizer_from)
    tensors = form.tensors(flat, cfg, dtype)
    config = form.config(cfg, base_config)
    config["torch_dtype"] = dtype or str(flat["embed", "embedding"].dtype)
    if cfg.recurrent_mixer is not None:
        model_card = model_card or write_model_card(cfg, use=form.use(cfg))
    check_target(directory, tokenizer_from)
    files = plan_files(tensors, max_shard_size)
    if jax.process_index() == 0:
        with _appearing(directory) as partial:
            for name, planned in files.items():
                write_file(partial / name, planned)
            if len(files) > 1:
                write_index(partial, files)
            _copy_files(partial, tokenizer_from, config, form.files(cfg))
            if model_card:
                write_text(partial / MODEL_CARD, model_card)
            _write_generation_config(partial, tokenizer_from, base_config)
            # Last: by this file one knows a model.
            write_json(partial / "config.json", config, ascii_only=False)
    else:
        _take_part(files)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("export")
    return directory


def _check_params(flat: dict, cfg: ModelConfig) -> None:
    shapes = param_shapes(cfg)
    problems = {
        "missing": [shown(path) for path in shapes if path not in flat],
        "unexpected": [shown(path) for path in flat if path not in shapes],
        "misshapen": [
            f"{shown(path)} {list(flat[path].shape)} (expected {list(shape)})"
            for path, shape in shapes.items()
            if path in flat and flat[path].shape != shape
        ],
    }
    wrong = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if wrong:
        raise ValueError(
            f"the parameters are not those of the model to export, got {'; '.join(wrong)}; expected the {len(shapes)} "
            "of its configuration. Export with the configuration that the parameters were made with."
        )


def _take_part(files: dict[str, list[PlannedTensor]]) -> None:
    # Gathering a sharded tensor is a collective: every process takes part, in the same order.
    for planned in files.values():
        for tensor in planned:
            tensor.fetch()


def check_target(directory: AnyPath, tokenizer_from: AnyPath | None) -> None:
    """Raises ValueError where an export to `directory` would replace anything but an earlier one."""
    if tokenizer_from is not None and not tokenizer_from.is_dir():
        raise ValueError(
            f"{tokenizer_from} is no directory; expected the teacher's, to copy its tokenizer. Check the path."
        )
    if not directory.exists():
        return
    if tokenizer_from is not None and _is_same(directory, tokenizer_from):
        raise ValueError(
            f"the export would replace {directory}, the teacher's own directory; expected another. Choose a new name."
        )
    entries = children(directory) if directory.is_dir() else None
    is_export = entries is not None and (entries.keys() & {"config.json", _PARTIAL}) and all(entries.values())
    if entries != {} and not is_export:
        raise ValueError(
            f"{directory} exists and is no earlier export (files only, config.json among them); expected a free name, "
            "an empty directory or an export to replace. Choose another directory, or move this one away."
        )


def _is_same(directory: AnyPath, other: AnyPath) -> bool:
    if in_bucket(directory) or in_bucket(other):
        return str(directory) == str(other)
    return directory.samefile(other)


@contextlib.contextmanager
def _appearing(directory: AnyPath) -> Iterator[AnyPath]:
    """A hidden sibling that takes the directory's name when the body is through, and disappears when it fails."""
    if in_bucket(directory):
        empty(directory)
        write_text(directory / _PARTIAL, "")
        # After an error the mark stays: what is there is no export, and the next one replaces it.
        yield directory
        (directory / _PARTIAL).unlink()
        return
    partial = directory.parent / f".{directory.name}.partial"
    replaced = directory.parent / f".{directory.name}.replaced"
    directory.parent.mkdir(parents=True, exist_ok=True)
    if replaced.exists() and not directory.exists():
        # A process ended between the two renames below: the earlier export is still the one there is.
        replaced.rename(directory)
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
    finally:
        if replaced.exists() and not directory.exists():
            replaced.rename(directory)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _copy_files(
    target: AnyPath, tokenizer_from: AnyPath | None, config: dict[str, Any], files: Sequence[AnyPath]
) -> None:
    if tokenizer_from is not None:
        write_tokenizer(tokenizer_from, target, config)
    for file in files:
        copy_file(file, target / file.name)


def _write_generation_config(target: AnyPath, tokenizer_from: AnyPath | None, base_config: dict[str, Any]) -> None:
    source = tokenizer_from / _GENERATION_CONFIG if tokenizer_from is not None else None
    if source is not None and source.is_file():
        copy_file(source, target / _GENERATION_CONFIG)
        return
    ids, base = ("bos_token_id", "eos_token_id", "pad_token_id"), text_config(base_config)
    config = {key: base[key] for key in ids if base.get(key) is not None}
    # An empty one would hide config.json's.
    if config:
        write_json(target / _GENERATION_CONFIG, config, ascii_only=False)
