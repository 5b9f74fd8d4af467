"""Dense Qwen3.5, which transformers, vLLM, llama.cpp and MLX load without remote code.

A teacher's softmax layers are carried exactly: q with a gate of zeros, whose sigmoid 1/2 a doubled o makes good; norms
as w - 1, behind powers of two that the next matrices take where w - 1 would be rounded (writers/zero_centred.py); and,
for a teacher without norms of q and k, heads of twice the size, whose second half is a constant that makes the norms
constant too (writers/padded_heads.py). A student's softmax layers may have a gate, which is the format's own, and in
padded heads no RoPE: what is turned there is the constant. Gated DeltaNet layers get their k and v cloned for every
query head.

The engines do not read quite the same directory (writers/engines.py): one form is written for most of them, and another
for any of them by its name.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from radlads_jax.models.config import SOFTMAX, KeptAttention, ModelConfig
from radlads_jax.models.gdn import GdnOptions
from radlads_jax.models.tree import ParamPath
from radlads_jax.porting.families import FAMILIES, llama, qwen3_5, text_config
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.names import disk_tensors
from radlads_jax.porting.safetensors_write import PlannedTensor
from radlads_jax.porting.writers import engines, padded_heads, zero_centred
from radlads_jax.porting.writers.fetching import planned_tensors
from radlads_jax.porting.writers.writer import Writer
from radlads_jax.system.storage import AnyPath

_Fetch = Callable[[str], np.ndarray]
_SIZES = ("key_heads", "value_heads", "key_size", "value_size")
# What a teacher's own attention may be told and was not trained with: vLLM would heed it in this format too.
_OF_OTHER_ATTENTION = ("dual_chunk_attention_config", "sliding_window", "use_sliding_window", "max_window_layers")


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a directory is written. nested, o_bias: as of engines.Engine; o_bias None: a bias of o where q has one."""

    nested: bool
    o_bias: bool | None = None


# What all but MLX load of a model without biases; of one with them transformers and vLLM. Nested it would be MLX in the
# place of SGLang, and transformers would put Qwen3.5's own rules of splitting text in the place of the tokenizer's.
_USUAL = _Form(nested=False)


def _form_for(engine: engines.Engine) -> _Form:
    return _Form(_USUAL.nested if engine.nested is None else engine.nested, engine.o_bias)


def _native(cfg: ModelConfig, form: _Form = _USUAL) -> ModelConfig:
    """The Qwen3.5 model that computes what cfg does."""
    if cfg.family == qwen3_5.NAME:
        # Which layers a student converted, and how they began, is not in the format.
        mixer = cfg.mixer and GdnOptions(**{name: getattr(cfg.mixer, name) for name in _SIZES})
        cfg = dataclasses.replace(cfg, mixer=mixer, copied=())
        return cfg if form.o_bias is None else dataclasses.replace(cfg, o_bias=cfg.qkv_bias and form.o_bias)
    heads, size = cfg.num_heads, cfg.head_dim
    padded = not cfg.qk_norm and SOFTMAX in cfg.layer_mixers
    return dataclasses.replace(
        cfg,
        family=qwen3_5.NAME,
        head_dim=padded_heads.SIZES * size if padded else size,
        rotary_size=size if padded else None,
        qkv_bias=padded,
        o_bias=padded and form.o_bias is not False,
        qk_norm=True,
        zero_centred_norms=True,
        output_gate=True,
        kept_attention=None,
        mixer=GdnOptions(heads, heads, size, size) if cfg.recurrent_mixer else None,
    )


def _obstacles(cfg: ModelConfig, directory: AnyPath | None, engine: engines.Engine | None = None) -> list[str]:
    """What the format has no place for; of an engine, also what it does not load."""
    del directory
    obstacles = _without_place(cfg)
    return obstacles if obstacles or engine is None else engine.obstacles(_native(cfg, _form_for(engine)))


def _without_place(cfg: ModelConfig) -> list[str]:
    kept = cfg.kept_attention or KeptAttention()
    scaled = ["logits of softmax layers scaled by position (student.attention_log_scale=0)"] * bool(kept.log_scale)
    turned = ["softmax layers without RoPE beside norms of q and k (student.attention_rope)"] * (
        not kept.rope and cfg.qk_norm
    )
    if cfg.family == qwen3_5.NAME:
        fused = cfg.mixer is None or cfg.mixer.fused
        return scaled + turned + ["a gdn student of a Qwen3.5 teacher"] * (not fused)
    obstacles = {
        f"the mixer {cfg.recurrent_mixer} (only {qwen3_5.MIXER} has one)": cfg.recurrent_mixer
        not in (None, qwen3_5.MIXER),
        "norms that multiply by 1 + w (a teacher's own)": cfg.zero_centred_norms,
        "an output gate of the teacher's own": cfg.output_gate,
        "RoPE of a part of a head (a teacher's own)": cfg.rotary_size is not None,
        "biases of q, k or v beside norms of q and k": cfg.qk_norm and cfg.qkv_bias,
        "a bias of o in softmax layers (vllm would leave it out)": cfg.o_bias and SOFTMAX in cfg.layer_mixers,
    }
    return scaled + turned + [name for name, present in obstacles.items() if present]


def _tensors(flat: dict[ParamPath, Any], cfg: ModelConfig, dtype: str | None, form: _Form) -> list[PlannedTensor]:
    if cfg.family == qwen3_5.NAME:
        return _with_biases(planned_tensors(flat, cfg, dtype), _native(cfg, form))
    # By Hugging Face's usual names. Worked on in float32, which holds every bfloat16; a tensor that is not changed
    # comes out as it went in.
    usual = dataclasses.replace(cfg, family=llama.FAMILY.name)
    stored = {tensor.name: tensor for tensor in planned_tensors(flat, usual, "float32")}
    disk_dtype = np.dtype(jnp.dtype(dtype or flat["embed", "embedding"].dtype))

    def fetch(name: str) -> np.ndarray:
        return stored[name].fetch()

    def planned(name: str, shape: tuple[int, ...]) -> PlannedTensor:
        return PlannedTensor(name, shape, disk_dtype, lambda: _converted(name, shape, cfg, fetch).astype(disk_dtype))

    return [planned(name, location.disk_shape) for name, location in disk_tensors(_native(cfg, form)).items()]


def _with_biases(tensors: list[PlannedTensor], written: ModelConfig) -> list[PlannedTensor]:
    """Those of the model that is written: biases of o that are 0 more or less. Raises ValueError for others."""
    stored, wanted = {tensor.name: tensor for tensor in tensors}, disk_tensors(written)
    left_out = [name for name in stored if name not in wanted and np.asarray(stored[name].fetch()).any()]
    if left_out:
        raise ValueError(
            f"the model has {left_out[0]} with values other than 0; expected 0, for this form has none. Choose another."
        )
    dtype = tensors[0].dtype

    def zeros(name: str, shape: tuple[int, ...]) -> PlannedTensor:
        return PlannedTensor(name, shape, dtype, lambda: np.zeros(shape, dtype))

    return [stored.get(name) or zeros(name, location.disk_shape) for name, location in wanted.items()]


def _converted(name: str, shape: tuple[int, ...], cfg: ModelConfig, fetch: _Fetch) -> np.ndarray:
    """The tensor of that name in Qwen3.5's format, float32, of the student's by their names."""
    prefix, _, part = name.partition("linear_attn.")
    if part:
        array = _recurrent(prefix + "linear_attn.", part, cfg, fetch)
    elif "self_attn." in name:
        array = _softmax(name, shape, cfg, fetch)
    elif name.endswith("norm.weight"):
        tied = name == "model.norm.weight" and cfg.tie_embeddings
        # The embedding can not take the powers of the norm before the head, where it is the head.
        return zero_centred.stored(fetch(name), split=not tied)
    else:
        array = fetch(name)
    norm = zero_centred.norm_before(name)
    return array if norm is None else array * zero_centred.powers(fetch(norm))


def _recurrent(prefix: str, part: str, cfg: ModelConfig, fetch: _Fetch) -> np.ndarray:
    sources = {"in_proj_qkv.weight": "{}_proj.weight", "conv1d.weight": "conv_{}.weight"}
    if part not in sources:
        return fetch(prefix + part)
    q, k, v = (fetch(prefix + sources[part].format(letter)) for letter in "qkv")
    return np.concatenate([q, *(x if len(x) == len(q) else _cloned(x, cfg) for x in (k, v))])


def _cloned(rows: np.ndarray, cfg: ModelConfig) -> np.ndarray:
    """Rows of the kv heads, a copy for every query head."""
    heads = rows.reshape(cfg.num_kv_heads, cfg.head_dim, *rows.shape[1:])
    return np.repeat(heads, cfg.num_heads // cfg.num_kv_heads, axis=0).reshape(-1, *rows.shape[1:])


def _softmax(name: str, shape: tuple[int, ...], cfg: ModelConfig, fetch: _Fetch) -> np.ndarray:
    which, kind = name.split(".")[-2:]
    kept = cfg.kept_attention or KeptAttention()
    if which in ("q_norm", "k_norm"):
        if cfg.qk_norm:
            return zero_centred.stored(fetch(name), split=False)
        return padded_heads.norm(cfg.head_dim, turned=kept.rope)
    present = kind == "weight" or (cfg.o_bias if which == "o_proj" else cfg.qkv_bias)
    if which == "o_proj" and kind == "bias":
        return fetch(name) if present else np.zeros(shape, np.float32)
    heads = cfg.num_heads if which in ("q_proj", "o_proj") else cfg.num_kv_heads
    gated = which == "q_proj" and kept.output_gate
    array = fetch(name) if present else np.zeros(heads * cfg.head_dim * (2 if gated else 1), np.float32)
    if which == "o_proj" and not kept.output_gate:
        array = 2 * array
    if which != "q_proj":
        return _padded(array, heads, which, kind, cfg)
    query, gate = np.split(_by_head(array, heads), 2, axis=1) if gated else (_by_head(array, heads), None)
    query = _padded(query.reshape(-1, *array.shape[1:]), heads, which, kind, cfg)
    gate = np.zeros_like(query) if gate is None else _padded(gate.reshape(-1, *array.shape[1:]), heads, "gate", "", cfg)
    both = np.concatenate([_by_head(query, heads), _by_head(gate, heads)], axis=1)
    return both.reshape(-1, *array.shape[1:])


def _by_head(rows: np.ndarray, heads: int) -> np.ndarray:
    return rows.reshape(heads, -1, *rows.shape[1:])


def _padded(array: np.ndarray, heads: int, which: str, kind: str, cfg: ModelConfig) -> np.ndarray:
    """A projection's heads with a constant's channels, where the teacher has no norms of q and k.

    Behind them, or, in q and k of layers without RoPE, before them, where the format turns it.
    """
    if cfg.qk_norm:
        return array
    of_score = which in ("q_proj", "k_proj")
    constant = padded_heads.CONSTANT if of_score and kind == "bias" else 0.0
    before = of_score and cfg.kept_attention is not None and not cfg.kept_attention.rope
    axis = 1 if which == "o_proj" else 0
    return padded_heads.padded(array, heads, axis=axis, value=constant, before=before)


def _config(cfg: ModelConfig, base: dict[str, Any], form: _Form) -> dict[str, Any]:
    # Of the layers that foretell further tokens no tensor is written (Family.left_out).
    base = text_config(base)
    left_out = (*_OF_OTHER_ATTENTION, *FAMILIES[cfg.family].keys(cfg))
    base = {key: value for key, value in base.items() if not key.startswith("mtp_") and key not in left_out}
    config = hf_config_from_model(_native(cfg, form), base)
    # vLLM's name of it; without it there is no bias, and no word of that.
    config |= {"qkv_bias": True} if config["attention_bias"] else {}
    return qwen3_5.nested(config) if form.nested else config


def _writer(name: str, form: _Form, engine: engines.Engine | None, forms: dict[str, Writer]) -> Writer:
    return Writer(
        name,
        functools.partial(_tensors, form=form),
        functools.partial(_config, form=form),
        obstacles=functools.partial(_obstacles, engine=engine),
        written=functools.partial(_native, form=form),
        expected=f"softmax layers as Qwen3's, Qwen2.5's or Llama's and mixers of the kind {qwen3_5.MIXER}",
        use=lambda cfg: engines.how_to_use(_native(cfg, form), nested=form.nested),
        readers=lambda cfg: engines.readers(_native(cfg, form), nested=form.nested),
        remarks=lambda cfg: engines.remarks(_native(cfg, form), nested=form.nested),
        forms=forms,
    )


def _writers() -> Writer:
    forms = {
        engine: _writer(f"qwen3_5 for {engine}", _form_for(facts), facts, {})
        for engine, facts in engines.ENGINES.items()
    }
    return _writer("qwen3_5", _USUAL, None, forms)


WRITER = _writers()
