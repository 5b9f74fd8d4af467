"""Writes a student again: in another dtype, with or without a head of its own, for another engine, as llama.cpp's file.

python -m radlads_jax.export --model RUN_OR_DIR --output DIR [--dtype=bfloat16] [--retie | --untie] [--for=mlx]
python -m radlads_jax.export --model RUN_OR_DIR --gguf FILE
HF_TOKEN=hf_... python -m radlads_jax.export --model RUN_OR_DIR --push=ORG/NAME [--public] [--replace]
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from rich.console import Console

from radlads_jax.decoding.loaded import model_directory
from radlads_jax.porting import gguf, repository
from radlads_jax.porting import push as hub_push
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.save import EXPORT_DTYPES
from radlads_jax.porting.writers import names
from radlads_jax.run.exporting import check_format, export_again, stored_dtype
from radlads_jax.system import command, storage

_console = Console(highlight=False)
_GGUF_READER = "llama.cpp"


def _define(values: flags.FlagValues) -> None:
    """The command line's flags."""
    flags.DEFINE_string("model", None, "A run's directory or a student's.", required=True, flag_values=values)
    flags.DEFINE_string("output", None, "Where the new export goes; not needed with others.", flag_values=values)
    flags.DEFINE_enum("dtype", None, EXPORT_DTYPES, "Of the weights; default: as they are.", flag_values=values)
    flags.DEFINE_bool("retie", False, "Leave the head out: the embedding is used for it.", flag_values=values)
    flags.DEFINE_bool("untie", False, "Write the head of a tied model as a tensor of its own.", flag_values=values)
    flags.DEFINE_enum("for", None, names(), "The engine that is to load it, or the format.", flag_values=values)
    flags.DEFINE_string("gguf", None, "llama.cpp's file, by its own converter (the extra gguf).", flag_values=values)
    flags.DEFINE_string("push", None, "ORG/NAME on the Hugging Face hub, by the token in HF_TOKEN.", flag_values=values)
    flags.DEFINE_bool("public", False, "With --push: for everybody to see; else private.", flag_values=values)
    flags.DEFINE_bool("replace", False, "With --push: whatever the repository holds may go.", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command."""
    if values.output is None and values.gguf is None and values.push is None:
        raise ValueError(
            "got none of --output, --gguf and --push; expected one of them at least. Name where the export goes."
        )
    file = _file(values.gguf)
    writer = _writer(values, file)
    if values.push is not None:
        _push(values, writer)
        return
    if values.public or values.replace:
        raise ValueError("got --public or --replace without --push; expected --push=ORG/NAME. Leave them out.")
    with _directory(values.output, file) as output:
        target = _export(values, output, writer)
        if file is not None:
            gguf.convert(Path(target), file, stored_dtype(read_config(target)))
    _console.print(f"exported to {file or target}", markup=False)


def _file(name: str | None) -> Path | None:
    """What --gguf names."""
    if name is not None and storage.in_bucket(name):
        raise ValueError(
            f"--gguf is {name}, in a bucket; expected the name of a new file on this machine's disk, where the "
            "converter writes it. Name one, and copy it there."
        )
    return None if name is None else Path(storage.as_path(name))


def _writer(values: flags.FlagValues, file: Path | None) -> str | None:
    """The form that is asked for."""
    writer = values["for"].value
    if file is None:
        return writer
    if writer not in (None, _GGUF_READER):
        raise ValueError(f"got --gguf and --for={writer}; expected {_GGUF_READER}, which reads it. Leave --for out.")
    if values.push is not None:
        raise ValueError(
            "got --gguf and --push; expected one of them. Push the directory, and upload the file by hand."
        )
    if values.output is not None and storage.in_bucket(values.output):
        raise ValueError(
            f"got --gguf and --output={values.output}, in a bucket; expected a directory of this disk, which the "
            "converter reads. Leave --output out."
        )
    # What is installed for it would not help a model that the format has no place for.
    check_format(values.model, retie=values.retie, untie=values.untie, writer=_GGUF_READER)
    gguf.require_converter(file)
    return _GGUF_READER


def _export(values: flags.FlagValues, output: str, writer: str | None) -> storage.AnyPath:
    return export_again(values.model, output, dtype=values.dtype, retie=values.retie, untie=values.untie, writer=writer)


def _push(values: flags.FlagValues, writer: str | None) -> None:
    """Exports as told, if anything is to change, and sends it to the hub: what would be refused there comes first."""
    repository.require_name_and_token(values.push)
    if values.output is not None and storage.in_bucket(values.output):
        raise ValueError(
            f"got --push and --output={values.output}, in a bucket; expected a directory of this disk, from which the "
            "hub's client reads. Leave --output out."
        )
    source = model_directory(values.model)
    hub_push.require_student(source)
    target = repository.open_repository(values.push, hub_push.EXPORT, public=values.public, replace=values.replace)
    changes = (values.output, values.dtype, values.retie, values.untie, writer)
    with contextlib.ExitStack() as stack:
        if storage.in_bucket(source) or any(changes):
            place = values.output or stack.enter_context(tempfile.TemporaryDirectory(prefix="radlads_jax")) + "/export"
            source = _export(values, place, writer)
        url = hub_push.push(Path(source), target)
    _console.print(f"{'public' if values.public else 'private'} on the hub: {url}", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _directory(output: str | None, file: Path | None) -> Iterator[str]:
    """Where the export is written: as told, or for as long as it takes to convert it to the file."""
    if output is not None:
        yield output
        return
    assert file is not None  # one of both is asked for
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export") as place:
        yield str(Path(place) / "export")


if __name__ == "__main__":
    command.run(_define, main)
