"""Every format that a model is exported in, by its name. A new one is its file and its line here."""

from radlads_jax.porting.writers import huggingface, llama_cpp
from radlads_jax.porting.writers.writer import Writer

WRITERS: dict[str, Writer] = {writer.name: writer for writer in (huggingface.WRITER, llama_cpp.WRITER)}
HUGGINGFACE = huggingface.WRITER.name


def writer_named(name: str) -> Writer:
    """Raises ValueError for a name that none has."""
    if name not in WRITERS:
        raise ValueError(f"the export's format is {name!r}; expected one of {', '.join(WRITERS)}.")
    return WRITERS[name]
