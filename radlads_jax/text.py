"""What a run is told of its text (config.data): where it is, and how documents become tokens."""

import dataclasses

from radlads_jax.fields import bounded, require

_SOURCES = ("synthetic", "text", "jsonl", "parquet", "hf", "binidx")
# Settings of data that only these sources read.
_OF_SOURCES = {
    "name": ("hf",),
    "split": ("hf",),
    "revision": ("hf",),
    "text_field": ("jsonl", "parquet", "hf"),
    "separator": ("text",),
    "documents": ("synthetic",),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """source: one of _SOURCES; path: file, directory or hub id. tokenizer: a directory, "" = the teacher's.

    name, split, revision: of a dataset on the hub; revision is a commit, branch or tag, "" its main branch.
    cross_document: the published behaviour, rows without boundaries. eval_rows: held-out rows at the data's end.
    max_tokens: stop tokenising there (0 = all of it, or what the recipe needs for a streamed source).
    documents, seed: how many the synthetic source makes, and which. separator: "\\n" is read as a new line.
    bos: whether documents begin with the tokenizer's BOS; None = as the tokenizer begins a prompt.
    special_tokens: a special token's name in the text is that token; else it is text.
    chats, messages_field, replay: of stage2c. A .jsonl file or directory of conversations, the field with a line's
    messages (its "tools" are what the model may call), and which share of a batch's rows is of the text instead.
    """

    source: str = bounded("text", one_of=_SOURCES)
    path: str = ""
    name: str = ""
    split: str = "train"
    revision: str = ""
    text_field: str = "text"
    streaming: bool = False
    tokenizer: str = ""
    separator: str = "\n\n\n"
    bos: bool | None = None
    special_tokens: bool = False
    cross_document: bool = False
    max_tokens: int = bounded(0, least=0)
    eval_rows: int = bounded(64, least=1)
    documents: int = bounded(20000, least=1)
    seed: int = bounded(0, least=0)
    chats: str = ""
    messages_field: str = "messages"
    replay: float = bounded(0.0, least=0, below=1)


def of_text_alone(data: Data) -> list[str]:
    """The settings, by their full names, that were told of a text and that a token file made of it is read without."""
    names = [name for name in (*_OF_SOURCES, "max_tokens") if getattr(data, name) != getattr(Data(), name)]
    return [f"config.data.{name}" for name in names]


def check_data(data: Data) -> None:
    """Raises ValueError for a source without its path, or settings that it does not read."""
    source = data.source
    if source == "synthetic":
        said = "nothing, for this source makes its own text; name another one too, as --config.data.source=text"
        require(not data.path, "config.data.path", data.path, said)
    else:
        require(bool(data.path), "config.data.path", "", f"the path of the {source} data, e.g. --config.data.path=PATH")
    for name, readers in _OF_SOURCES.items():
        value, default = getattr(data, name), getattr(Data(), name)
        said = f"{default!r}, for it belongs to {' and '.join(readers)}, and config.data.source is {source}"
        require(value == default or source in readers, f"config.data.{name}", value, said)
    if source == "binidx":
        require(not data.max_tokens, "config.data.max_tokens", data.max_tokens, "0: a token file is read whole")
