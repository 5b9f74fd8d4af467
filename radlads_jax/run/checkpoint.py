"""Checkpoints on disk: a flat table of arrays beside small JSON documents and their checksums, written by Orbax.

A state pytree is stored as {path: array}, a path being the keys from the root joined by "/". Orbax then never sees
optimizer NamedTuples or dataclasses, so a checkpoint outlives their changes, and one sub-tree can be read alone.
"""

import json
import re
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from radlads_jax.models.tree import from_path_leaves, path_leaves
from radlads_jax.run.checkpoint_files import damage, is_of_the_system, list_files, reason
from radlads_jax.run.checkpoint_sums import DamagedCheckpoint, difference, shapes_sum, sums_document
from radlads_jax.system import hosts, literal_names, process_memory
from radlads_jax.system.json_files import digest
from radlads_jax.system.storage import as_path, children

_Tree = TypeVar("_Tree")
_Result = TypeVar("_Result")

_MAX_LISTED = 10


class Checkpoints:
    """The numbered checkpoints of one training stage in one directory.

    directory: local path or bucket URL; made when missing.
    keep: how many of the newest checkpoints stay. An older one is deleted only after its successor is whole.
    every: steps between checkpoints, for `due`. read_only: of another run, whose directory is left as it is.
    """

    def __init__(self, directory: str | epath.PathLike, *, keep: int = 2, every: int = 1, read_only: bool = False):
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ValueError(f"checkpoint {name} is {value}; expected at least 1. Set {name} to a positive number.")
        literal_names.install()
        process_memory.install()
        self.directory = epath.Path(as_path(directory))
        self.every = every
        self._unlisted: int | None = None
        for unfinished in () if read_only else ocp.utils.tmp_checkpoints(self.directory):
            logging.warning("removing the unfinished checkpoint %s: its save was interrupted", unfinished.get())
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(n=keep),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        registry = ocp.handlers.create_default_handler_registry(
            state=ocp.PyTreeCheckpointHandler(),
            data=ocp.JsonCheckpointHandler(),
            meta=ocp.JsonCheckpointHandler(),
            sums=ocp.JsonCheckpointHandler(),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, handler_registry=registry)

    def due(self, step: int) -> bool:
        """Whether `step` is one of those at which a checkpoint is wanted."""
        return step > 0 and step % self.every == 0

    def save(
        self, step: int, state: Any, *, data_state: Mapping[str, Any], meta: Mapping[str, Any], wait: bool = False
    ) -> bool:
        """Starts writing a checkpoint; False when `step` is there already.

        state: pytree of jax arrays. They may be donated or deleted as soon as this returns.
        data_state, meta: JSON documents (tuples come back as lists).
        wait: return only when the checkpoint is whole; otherwise writing goes on in a thread, and its errors are
            raised by the next save, wait or close.
        """
        flat = path_leaves(state)
        _check_savable(flat)
        for name, document in {"data_state": data_state, "meta": meta}.items():
            _check_json(name, document)
        latest = self.latest_step()
        if latest is not None and step <= latest:
            if step in self._manager.all_steps():
                return False
            raise ValueError(
                f"cannot save a checkpoint of step {step} in {self.directory}: it already holds step {latest}. "
                "Continue from the latest step, or use another directory."
            )
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flat),
            data=ocp.args.JsonSave(dict(data_state)),
            meta=ocp.args.JsonSave(dict(meta)),
            sums=ocp.args.JsonSave(sums_document(flat, {"data": data_state, "meta": meta})),
        )
        self._manager.save(step, args=items, force=True)
        self._unlisted = step
        if wait:
            self.wait()
        return True

    def latest_step(self) -> int | None:
        """The newest step whose checkpoint is whole, after waiting for the one being written."""
        self.wait()
        return self._manager.latest_step()

    def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Path, shape and dtype of every stored array. Raises DamagedCheckpoint where they are not what was saved."""
        self._check_step(step)
        tree = self._reading(step, lambda: self._manager.item_metadata(step)["state"].tree)
        stored = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.items()}
        if self._restored(step, {})["sums"].get("shapes") != shapes_sum(stored):
            raise DamagedCheckpoint(
                step, self.directory, "its arrays have other names, shapes or dtypes than it was saved with"
            )
        return stored

    def restore(self, step: int, abstract_state: _Tree) -> tuple[_Tree, dict[str, Any], dict[str, Any]]:
        """Reads (state, data_state, meta).

        abstract_state: pytree of jax.ShapeDtypeStruct (or arrays), whose structure, dtypes and shardings the result
            takes; a leaf without sharding goes to the first local device.
        Raises ValueError naming the paths that differ from the stored ones, DamagedCheckpoint where what was stored
        cannot be read or is not what was saved.
        """
        arrays, documents = self._read(step, path_leaves(abstract_state), self.shapes(step))
        return from_path_leaves(abstract_state, arrays), documents["data"], documents["meta"]

    def restore_params(self, step: int, abstract_params: _Tree) -> _Tree:
        """Reads only the parameters of a stored state; the optimizer's arrays are not touched. Raises as `restore`."""
        prefix = "params/"
        wanted = {prefix + path: leaf for path, leaf in path_leaves(abstract_params).items()}
        stored = {path: leaf for path, leaf in self.shapes(step).items() if path.startswith(prefix)}
        arrays, _ = self._read(step, wanted, stored)
        return from_path_leaves(abstract_params, {path.removeprefix(prefix): array for path, array in arrays.items()})

    def restore_meta(self, step: int) -> dict[str, Any]:
        """Reads only the JSON document saved as `meta`. Raises DamagedCheckpoint where it is not what was saved."""
        self._check_step(step)
        return self._restored(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def contents(self, step: int) -> str:
        """What tells a checkpoint from all others: a hash of its arrays' checksums. Raises as `restore_meta`."""
        self._check_step(step)
        return digest(self._restored(step, {})["sums"]["arrays"])

    def newest(self, read: Callable[[int], _Result]) -> tuple[int, _Result] | None:
        """The newest step whose checkpoint is whole, and what `read` got from it; None where there are none at all.

        Damaged ones on the way there are set aside. Raises ValueError where there are none but those.
        """
        while (step := self.latest_step()) is not None:
            try:
                return step, read(step)
            except DamagedCheckpoint as error:
                self.set_aside(error)
        damaged = self._set_aside_before()
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.directory} is whole, {', '.join(damaged)} in {self.directory.parent} are all "
                "there is; expected one to continue from. Bring one back from a copy, or remove these directories to "
                "start the stage anew."
            )
        return None

    def set_aside(self, error: DamagedCheckpoint) -> None:
        """Moves a damaged checkpoint out of the way of its successor, beside the directory, and says so in the log.

        Raises ValueError where that of the same step was set aside before: to repeat its steps has not helped.
        """
        place = _aside(self.directory, str(error.step))
        if hosts.agreed(int(hosts.is_first() and place.exists())):
            raise ValueError(
                f"the checkpoint of step {error.step} in {self.directory} is damaged ({error.reason}), and {place} was "
                "set aside for that before; expected its repeated steps to be saved whole. Look at this machine's disk "
                f"and memory; to repeat the steps once more, remove {place}."
            ) from error
        logging.warning(
            "skipping the checkpoint of step %d in %s, which is damaged (%s): it is now %s",
            error.step,
            self.directory,
            error.reason,
            place,
        )
        if hosts.is_first():
            (self.directory / str(error.step)).rename(place)
        hosts.barrier()
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until the checkpoint being written is whole. Raises OSError where it could not be written."""
        try:
            self._manager.wait_until_finished()
        except BaseException as error:
            # The manager has by now forgotten the steps that the failed one would have replaced.
            self._manager.reload()
            if not is_of_the_system(error):
                raise
            latest = self._manager.latest_step()
            raise OSError(
                f"a checkpoint in {self.directory} could not be written, {reason(error)}; "
                f"{'there is none yet' if latest is None else f'the newest whole one is of step {latest}'}. Make room "
                "or give permission, and run the same command again."
            ) from error
        step, self._unlisted = self._unlisted, None
        if step is not None and hosts.is_first() and step in self._manager.all_steps():
            list_files(as_path(self.directory / str(step)))

    def close(self) -> None:
        """Finishes the checkpoint being written and ends the writer's threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_step(self, step: int) -> None:
        self.wait()
        steps = sorted(self._manager.all_steps())
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.directory}; it has steps {steps}. Ask for one.")

    def _read(
        self, step: int, wanted: dict[str, Any], stored: dict[str, jax.ShapeDtypeStruct]
    ) -> tuple[dict[str, jax.Array], ocp.args.Composite]:
        differences = _differences(wanted, stored)
        if differences:
            more = len(differences) - _MAX_LISTED
            tail = f"; and {more} more" if more > 0 else ""
            raise ValueError(
                f"the checkpoint of step {step} in {self.directory} does not fit what is to be restored: "
                f"{'; '.join(differences[:_MAX_LISTED])}{tail}. Use the config it was saved with, or a new directory."
            )
        # In the stored dtype, which the checksums are of; cast when they have been compared.
        targets = {path: _target(leaf, stored[path].dtype) for path, leaf in wanted.items()}
        items = {
            "state": ocp.args.PyTreeRestore(
                targets,
                restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
                partial_restore=True,
            ),
            "data": ocp.args.JsonRestore(),
            "meta": ocp.args.JsonRestore(),
        }
        restored = self._restored(step, items)
        arrays = restored["state"]
        return {path: arrays.pop(path).astype(leaf.dtype) for path, leaf in wanted.items()}, restored

    def _restored(self, step: int, items: dict[str, Any]) -> ocp.args.Composite:
        """These items, as they were when they were saved."""
        asked = ocp.args.Composite(**items, sums=ocp.args.JsonRestore())
        restored = self._reading(step, lambda: self._manager.restore(step, args=asked))
        documents = {name: restored[name] for name in items if name != "state"}
        wrong = difference(restored["sums"], restored.get("state") or {}, documents)
        if wrong is not None:
            raise DamagedCheckpoint(step, self.directory, wrong)
        return restored

    def _reading(self, step: int, read: Callable[[], _Result]) -> _Result:
        """What `read` returns; DamagedCheckpoint in every process where one of them cannot read."""
        result: _Result | None = None
        caught: BaseException | None = None
        wrong: str | None = None
        try:
            result = read()
        except BaseException as error:
            wrong = damage(error, as_path(self.directory / str(step)))
            if wrong is None:
                raise
            caught = error
        if hosts.agreed(int(wrong is not None)):
            raise DamagedCheckpoint(
                step, self.directory, wrong or "another process could not read its part"
            ) from caught
        return cast(_Result, result)

    def _set_aside_before(self) -> list[str]:
        pattern = re.compile(re.escape(self.directory.name) + r"-\d+-damaged")
        names = children(as_path(self.directory.parent)) if self.directory.parent.exists() else {}
        return sorted(filter(pattern.fullmatch, names))


def _check_savable(flat: dict[str, Any]) -> None:
    bad = [f"{path} ({type(leaf).__name__})" for path, leaf in flat.items() if not isinstance(leaf, jax.Array)]
    bad += [f"{path} (size 0)" for path, leaf in flat.items() if isinstance(leaf, jax.Array) and leaf.size == 0]
    if bad or not flat:
        raise ValueError(
            f"a checkpoint holds non-empty jax arrays only; got {', '.join(bad[:_MAX_LISTED]) or 'an empty state'}. "
            "Convert scalars with jnp.asarray and leave empty arrays out of the state."
        )


def _check_json(name: str, document: Mapping[str, Any]) -> None:
    try:
        json.dumps(document)
    except TypeError as error:
        raise ValueError(
            f"checkpoint {name} is not JSON: {error}. Use dicts, lists, strings, numbers and None only."
        ) from error


def _differences(wanted: dict[str, Any], stored: dict[str, jax.ShapeDtypeStruct]) -> list[str]:
    lines = [f"{path} is not in the checkpoint" for path in wanted if path not in stored]
    lines += [f"{path} is in the checkpoint only" for path in stored if path not in wanted]
    for path in wanted:
        if path not in stored:
            continue
        got, expected = stored[path], wanted[path]
        if tuple(got.shape) != tuple(expected.shape):
            lines.append(f"{path} has shape {tuple(got.shape)} in the checkpoint, {tuple(expected.shape)} is expected")
        elif _is_float(got.dtype) != _is_float(expected.dtype):
            lines.append(f"{path} is {got.dtype} in the checkpoint, {expected.dtype} is expected")
    return lines


def _aside(directory: epath.Path, step: str) -> epath.Path:
    return directory.with_name(f"{directory.name}-{step}-damaged")


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _target(leaf: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
