"""Every format that a model is exported in, by its name. A new one is its file and its line here."""

from radlads_jax.models.config import SOFTMAX, ModelConfig
from radlads_jax.models.mixers import MIXERS
from radlads_jax.porting.writers import huggingface, llama_cpp, qwen3_5
from radlads_jax.porting.writers.writer import Writer

WRITERS: dict[str, Writer] = {writer.name: writer for writer in (huggingface.WRITER, llama_cpp.WRITER, qwen3_5.WRITER)}
_HUGGINGFACE = huggingface.WRITER.name


def default_format(cfg: ModelConfig) -> str:
    """The name of the format that a model of these dimensions is exported in where none is asked for."""
    return _HUGGINGFACE if cfg.recurrent_mixer is None else MIXERS[cfg.recurrent_mixer].export_format


def writer_for(cfg: ModelConfig, wanted: str | None = None) -> Writer:
    """The writer of a format, or of the model's own format as an engine reads it, by either's name.

    wanted: None or "" for the model's own format as most engines read it. Raises ValueError for a name of neither.
    """
    own = WRITERS[default_format(cfg)]
    if not wanted:
        return own
    if wanted not in own.forms and wanted not in WRITERS:
        others = [name for name, writer in WRITERS.items() if not writer.obstacles(cfg, None)]
        by = [writer.name for writer in WRITERS.values() if wanted in writer.forms]
        reads = f", which reads a model in the format {by[0]} alone" if by else ""
        raise ValueError(
            f"the export is asked for {wanted!r}{reads}; expected one of "
            f"{', '.join(dict.fromkeys((*own.forms, *others)))}, by who reads a model of "
            f"{cfg.recurrent_mixer or SOFTMAX} layers."
        )
    return own.forms.get(wanted) or WRITERS[wanted]


def names() -> list[str]:
    """Everything that `writer_for` may be asked for, of whatever model."""
    return list(dict.fromkeys([*WRITERS, *(name for writer in WRITERS.values() for name in writer.forms)]))
