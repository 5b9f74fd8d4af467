"""Writes a student again: in another dtype, with or without a head of its own, checked for another runtime.

python -m radlads_jax.export --model RUN_OR_DIR --output DIR [--dtype=bfloat16] [--retie | --untie] [--for=llama.cpp]
"""

import dataclasses
import os
from typing import Any

from absl import flags
from rich.console import Console

from radlads_jax.decoding.loaded import model_directory
from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_card import write_model_card
from radlads_jax.porting.save import EXPORT_DTYPES, MODEL_CARD, save_params
from radlads_jax.porting.writers import WRITERS, default_format, writer_named
from radlads_jax.system import backend, command, storage
from radlads_jax.system.json_files import read_json

console = Console(highlight=False)


def define(values: flags.FlagValues) -> None:
    """The command line's flags."""
    flags.DEFINE_string("model", None, "A run's directory or a student's.", required=True, flag_values=values)
    flags.DEFINE_string("output", None, "Where the new export goes.", required=True, flag_values=values)
    flags.DEFINE_enum("dtype", None, EXPORT_DTYPES, "Of the weights; default: as they are.", flag_values=values)
    flags.DEFINE_bool("retie", False, "Leave the head out: the embedding is used for it.", flag_values=values)
    flags.DEFINE_bool("untie", False, "Write the head of a tied model as a tensor of its own.", flag_values=values)
    flags.DEFINE_enum("for", None, list(WRITERS), "The format, by who reads it.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command."""
    target = export_again(
        values.model,
        values.output,
        dtype=values.dtype,
        retie=values.retie,
        untie=values.untie,
        writer=values["for"].value,
    )
    console.print(f"exported to {target}", markup=False)


def export_again(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: str | None = None,
    retie: bool = False,
    untie: bool = False,
    writer: str | None = None,
) -> storage.AnyPath:
    """Reads a student (of a run: its export/) and writes it to `output` with its tokenizer and a model card.

    writer: a name of WRITERS (default: the mixer's own). Raises ValueError for what is no model, for retie with untie,
    and for what the format has no place for, before any weight is read.
    """
    if retie and untie:
        raise ValueError("got --retie and --untie; expected one of them at most. Leave one out.")
    backend.require()
    source = model_directory(model)
    config = read_config(source)
    cfg = model_config_from_hf(config)
    written = dataclasses.replace(cfg, tie_embeddings=(cfg.tie_embeddings or retie) and not untie)
    writer_named(writer or default_format(written)).require(written, source)
    dtype = dtype or stored_dtype(config)
    params = load_params(source, cfg, dtype=dtype)
    if cfg.tie_embeddings and untie:
        params["head"] = {"kernel": params["embed"]["embedding"].T}
    kept = written if untie else cfg
    card = model_card(storage.as_path(model), source, written)
    return save_params(
        params,
        kept,
        output,
        base_config=config,
        dtype=dtype,
        tokenizer_from=source,
        retie=retie,
        model_card=card,
        writer=writer,
    )


def stored_dtype(config: dict[str, Any]) -> str:
    """The weights' dtype as config.json has it; float32 where it is none that an export may have."""
    found = config.get("torch_dtype", config.get("dtype"))
    return found if found in EXPORT_DTYPES else "float32"


def model_card(model: storage.AnyPath, source: storage.AnyPath, cfg: ModelConfig) -> str | None:
    """Of a run: from its settings and its summary; else the student's own, where there is one."""
    summary = model / "summary.json"
    if cfg.recurrent_mixer is not None and summary.is_file() and source != model:
        return write_model_card(cfg, run=read_json(model / "config.json"), summary=read_json(summary))
    own = source / MODEL_CARD
    return storage.read_text(own) if own.is_file() else None


if __name__ == "__main__":
    command.run(define, main)
