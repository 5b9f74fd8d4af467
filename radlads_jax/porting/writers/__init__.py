"""Every format that a model is exported in, by its name. A new one is its file and its line here."""

from radlads_jax.models.config import ModelConfig
from radlads_jax.models.mixers import MIXERS
from radlads_jax.porting.writers import huggingface, llama_cpp, qwen3_5
from radlads_jax.porting.writers.writer import Writer

WRITERS: dict[str, Writer] = {writer.name: writer for writer in (huggingface.WRITER, llama_cpp.WRITER, qwen3_5.WRITER)}
HUGGINGFACE = huggingface.WRITER.name


def default_format(cfg: ModelConfig) -> str:
    """The name of the format that a model of these dimensions is exported in where none is asked for."""
    return HUGGINGFACE if cfg.recurrent_mixer is None else MIXERS[cfg.recurrent_mixer].export_format


def writer_named(name: str) -> Writer:
    """Raises ValueError for a name that none has."""
    if name not in WRITERS:
        raise ValueError(f"the export's format is {name!r}; expected one of {', '.join(WRITERS)}.")
    return WRITERS[name]
