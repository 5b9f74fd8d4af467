"""Writes what a run has exported, or any student, once more: another dtype, head or format."""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
from absl import logging

from radlads_jax.decoding.loaded import model_directory
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.tree import Params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_card import scored_with_own_head, with_use, write_model_card
from radlads_jax.porting.save import EXPORT_DTYPES, MODEL_CARD, save_params
from radlads_jax.porting.writers import writer_for
from radlads_jax.porting.writers.writer import Writer
from radlads_jax.system import backend, storage
from radlads_jax.system.json_files import read_json

# Of a head's size; training moved that of a tied teacher's student by less, and unrelated ones differ by more than 1.
_FAR = 0.5
# The tokens whose rows tell it: of all, both matrices would be in memory once more, in float32.
_COMPARED = 4096


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

    writer: a name of WRITERS or of an engine (default: the mixer's own). Raises ValueError for what is no model, for
    retie with untie, and for what the format has no place for, before any weight is read.
    """
    backend.require()
    source, config, cfg, written = _checked(model, retie, untie, writer)
    form, stored = writer_for(written, writer), stored_dtype(config)
    if dtype == "float32" and stored != "float32":
        logging.warning(
            "the weights in %s are %s: float32 writes the same values in twice the room. Those that were trained are "
            "in the run's checkpoints, and exported by a run with config.export.dtype=float32.",
            source,
            stored,
        )
    dtype = dtype or stored
    params = load_params(source, cfg, dtype=dtype, shardings=backend.host())
    if retie and not cfg.tie_embeddings:
        params = _for_one_matrix(params, cfg, source)
    if cfg.tie_embeddings and untie:
        params["head"] = {"kernel": params["embed"]["embedding"].T}
    kept = written if untie else cfg
    card = _model_card(storage.as_path(model), source, written, form)
    if card is not None and written.tie_embeddings and not cfg.tie_embeddings:
        card = scored_with_own_head(card)
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


def check_format(model: str | os.PathLike, *, retie: bool, untie: bool, writer: str) -> None:
    """Raises ValueError as `export_again` does for what can not be written, of which only config.json is read."""
    _checked(model, retie, untie, writer)


def _checked(
    model: str | os.PathLike, retie: bool, untie: bool, writer: str | None
) -> tuple[storage.AnyPath, dict[str, Any], ModelConfig, ModelConfig]:
    """The student's directory, its config.json, its dimensions, and those that are written, for which there is room."""
    if retie and untie:
        raise ValueError("got --retie and --untie; expected one of them at most. Leave one out.")
    source = model_directory(model)
    config = read_config(source)
    cfg = model_config_from_hf(config)
    written = dataclasses.replace(cfg, tie_embeddings=(cfg.tie_embeddings or retie) and not untie)
    writer_for(written, writer).require(written, source)
    return source, config, cfg, written


def _for_one_matrix(params: Params, cfg: ModelConfig, source: storage.AnyPath) -> Params:
    """The model with the embedding for its head, which still stands beside it.

    A format of 1 + w norms moved powers of two, one a channel, from the last norm into the head: they go back. Raises
    ValueError where the head is another matrix than the embedding, and not one that began as it.
    """
    head = params["head"]["kernel"][:, :_COMPARED].T.astype(jnp.float32)
    embedding = params["embed"]["embedding"][:_COMPARED].astype(jnp.float32)
    if cfg.zero_centred_norms:
        ratio = jnp.sum(head * embedding, 0) / jnp.sum(embedding**2, 0)
        known = jnp.isfinite(ratio) & (ratio != 0)
        exponents = jnp.round(jnp.log2(jnp.abs(jnp.where(known, ratio, 1))))
        powers = jnp.where(known, jnp.sign(ratio), 1) * jnp.exp2(exponents)
        scale, head = params["norm"]["scale"], head / powers
        own = ((1 + scale.astype(jnp.float32)) * powers - 1).astype(scale.dtype)
        params = params | {"norm": {"scale": own}}
    apart = float(jnp.linalg.norm(head - embedding) / jnp.linalg.norm(head))
    if apart > _FAR:
        raise ValueError(
            f"got --retie for {source}, whose head differs from its embedding by {apart:.0%} of its size: with one for "
            "both it would be another model. Expected a student of a teacher that ties them. Leave --retie out."
        )
    return params


def stored_dtype(config: dict[str, Any]) -> str:
    """The weights' dtype as config.json has it; float32 where it is none that an export may have."""
    dtype = config.get("torch_dtype", config.get("dtype"))
    return dtype if dtype in EXPORT_DTYPES else "float32"


def _model_card(model: storage.AnyPath, source: storage.AnyPath, cfg: ModelConfig, form: Writer) -> str | None:
    """Of a run: from its settings and its summary; else the student's own, where there is one."""
    summary = model / "summary.json"
    if cfg.recurrent_mixer is not None and summary.is_file() and source != model:
        known = {"run": read_json(model / "config.json"), "summary": read_json(summary)}
        return write_model_card(cfg, **known, use=form.use(cfg))
    own = source / MODEL_CARD
    return with_use(storage.read_text(own), form.use(cfg)) if own.is_file() else None
