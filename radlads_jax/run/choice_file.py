"""The softmax layers that a run has chosen for its student, as its work directory keeps them: DIR/choice.json.

They are chosen once (run/softmax_layers.py). A continuation reads them; one without the file is refused.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from radlads_jax.config import RunConfig
from radlads_jax.system import hosts, storage
from radlads_jax.system.json_files import digest, write_json
from radlads_jax.system.storage import AnyPath
from radlads_jax.system.untrusted import brief, parse_json

FILE = "choice.json"


def with_layers(run: RunConfig, layers: tuple[int, ...]) -> RunConfig:
    """The run as if it had been told these softmax layers."""
    return dataclasses.replace(run, student=dataclasses.replace(run.student, attention_layers=layers))


def read(workdir: AnyPath, run: RunConfig, count: int, num_layers: int, depends: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that were chosen for this run; none where they are still to be chosen.

    Those of a run that could not begin, with another teacher, text, number or what else decides them, are none. Raises
    ValueError for a run that has begun and whose file is missing, or of another number of layers.
    """
    path = workdir / FILE
    # Written after the first step, before any checkpoint.
    begun = (workdir / "config.json").exists()
    if not path.exists():
        if begun:
            raise ValueError(
                f"{path} is missing, which holds the softmax layers that the run in {workdir} chose when it began; "
                "expected it, as its weights fit no others. Restore it, or choose another --workdir."
            )
        return ()
    choice = parse_json(storage.read_text(path), path, "Restore it, or choose another --workdir.")
    layers = choice.get("layers") if isinstance(choice, dict) else None
    sound = isinstance(layers, list) and all(type(i) is int and 0 <= i < num_layers for i in layers)
    if not sound or layers != sorted(set(layers or ())):
        raise ValueError(
            f"{path}: layers is {brief(repr(layers))}; expected different layer numbers from 0 to {num_layers - 1}, "
            "rising. Restore it, or choose another --workdir."
        )
    if len(layers) == count and (begun or choice.get("of run") == _identity(run, count, depends)):
        return tuple(layers)
    if begun:
        raise ValueError(
            f"{path} holds {len(layers)} softmax layers, and config.student.attention_layers is 'auto:{count}'; "
            "expected as many. Restore it, or choose another --workdir."
        )
    return ()


def write(workdir: AnyPath, run: RunConfig, choice: Mapping[str, Any], count: int, depends: Mapping[str, Any]) -> None:
    """Writes DIR/choice.json whole or not at all; the first host does."""
    if hosts.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / FILE, {**choice, "of run": _identity(run, count, depends)}, indent=1)
    hosts.barrier()


def _identity(run: RunConfig, count: int, depends: Mapping[str, Any]) -> str:
    """Of what the choice depends on, by contents."""
    data = (run.data.eval_rows, run.data.cross_document)
    rows = [(name, recipe.seq_len) for name, recipe in run.recipes.items()][:1]
    told = [count, run.seed, data, rows, run.train.eval_batch_size, run.student.mixer, run.student.options]
    contents = {name: depends.get(name) for name in ("teacher", "tokenizer", "data")}
    contents |= {"init_from": depends["init_from"]} if "init_from" in depends else {}
    return digest([repr(told), contents])
