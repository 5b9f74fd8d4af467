"""A model ready to be used: parameters, tokenizer, the tokens that end a text, and what its state costs."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from radlads_jax.data.chat_template import Message, chat_text, check_text
from radlads_jax.data.tokenise import before_all
from radlads_jax.decoding.loop import unrolled
from radlads_jax.models import ModelConfig, init_state
from radlads_jax.models.config import SOFTMAX
from radlads_jax.models.tree import Params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.families import text_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hub import check_ids, check_tokenizer, load_tokenizer, resolve_model_dir
from radlads_jax.porting.load import load_params
from radlads_jax.system import backend
from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath, as_path

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Model:
    """A teacher or a student; stop_ids: the tokens that end a text or a turn of a chat."""

    directory: AnyPath
    cfg: ModelConfig
    params: Params
    tokenizer: Any
    stop_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """The text's tokens, with the tokenizer's own beginning; an empty text is its beginning-of-text token.

        A text that begins with that token's name gets no second one.
        """
        begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        ids = self._tokens(text, add_special_tokens=not begun)
        ids = ids or before_all(self.tokenizer)
        if not ids:
            raise ValueError(
                "the prompt is empty and the tokenizer has no token for a text's beginning; expected at least one "
                "token to continue. Give a prompt."
            )
        return ids

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """The tokens of a conversation ({"role", "content"} each) up to where the assistant answers."""
        return self._tokens(chat_text(self.tokenizer, messages, tools, self.directory), add_special_tokens=False)

    def _tokens(self, text: str, **options: Any) -> list[int]:
        ids = self.tokenizer(check_text(text, "the prompt"), **options)["input_ids"]
        check_ids(ids, self.tokenizer, self.cfg.vocab_size)
        return ids


def load_model(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    for_decoding: bool = False,
    beside: ModelConfig | None = None,
) -> Model:
    """The model of a Hugging Face directory, of a hub id, or of a run's directory (its export/).

    dtype: of parameters and arithmetic, default bfloat16 on accelerators and float32 on a CPU. for_decoding: layers
    unrolled where that makes single tokens faster. beside: a student, at whose boundaries this softmax model is
    cut into stacks. Raises ValueError for what is no model.
    """
    backend.require()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}. Change --dtype.")
    directory = model_directory(path)
    cfg = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype=dtype, param_dtype=dtype)
    cfg = cfg if beside is None else cfg.as_teacher_of(beside)
    # On a TPU the products read their layer's weights inside the stack.
    if for_decoding and jax.default_backend() != "tpu":
        cfg = unrolled(cfg)
    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, cfg)
    with backend.room_for(f"the weights of {directory} do", "All lie on one device: JAX_PLATFORMS=cpu takes the host."):
        params = load_params(directory, cfg)
    return Model(directory, cfg, params, tokenizer, _stop_ids(directory, tokenizer))


def read_model_config(path: str | os.PathLike) -> ModelConfig:
    """The dimensions of what `load_model` loads."""
    return model_config_from_hf(read_config(model_directory(path)))


def model_directory(path: str | os.PathLike) -> AnyPath:
    """The directory with the model's files: for a run's, its export."""
    place = as_path(path)
    if (place / "export" / "config.json").is_file():
        return place / "export"
    # A run's config.json holds its settings, a model's its model_type.
    begun = (place / "data").is_dir() and not (place / "config.json").exists()
    if (begun or (place / "checkpoints").is_dir()) and not list(place.glob("*.safetensors")):
        raise ValueError(
            f"{path} holds a run without export/, so it has not finished; expected a model. Run its launch command "
            "again until it is done."
        )
    return resolve_model_dir(path)


def _stop_ids(directory: AnyPath, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of generation_config.json, of config.json and of the tokenizer."""
    ends = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        named = text_config(read_json(directory / name)).get("eos_token_id") if (directory / name).is_file() else None
        ends |= set(named) if isinstance(named, list) else {named}
    return tuple(sorted(i for i in ends if type(i) is int))


def state_bytes(cfg: ModelConfig, context: int) -> int:
    """The size of one sequence's decoding state after `context` tokens: constant, but for layers of softmax."""
    state = jax.eval_shape(lambda: init_state(cfg, 1, context))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state["stacks"]))


def cache_bytes(cfg: ModelConfig, context: int) -> int:
    """The size of the keys and values of `context` tokens, were every layer softmax attention."""
    return state_bytes(dataclasses.replace(cfg, stacks=((SOFTMAX, cfg.num_layers),)), context)
