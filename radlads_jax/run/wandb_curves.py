"""A run's metrics on Weights & Biases, beside its own files, where config.train.wandb_project names a project.

wandb's own settings hold: WANDB_MODE=offline keeps everything in DIR/wandb for a later `wandb sync`.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radlads_jax.run.settings import FREE_OF_RECIPES
from radlads_jax.system.storage import AnyPath, as_path, in_bucket, read_text, write_text

# The run's id, and on a line below it what tells the directory from a copy of it, and what the run must have: of every
# stage the last step, the name of its curves, and the recipe that they are of.
_FILE_NAME = "wandb_id"


class WandbCurves:
    """One wandb run for a work directory, gone on with when the run goes on; each stage's metrics over its own steps.

    settings: the config as nested dicts, shown beside the curves. Raises ValueError where wandb is not installed or
    refuses to begin.
    """

    def __init__(self, workdir: str | os.PathLike, project: str, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"config.train.wandb_project is {project!r}, but wandb can not be imported ({error}); expected the "
                "extra `wandb`. Install it with pip install -e '.[wandb]', or leave the setting out."
            ) from error
        self._directory = directory = as_path(workdir)
        before, known = _known_run(directory)
        self._logged, self._names, self._recipes = (known.get(part, {}) for part in ("logged", "names", "recipes"))
        self._settings = settings
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=before,
                resume="allow",
                # wandb writes to disks alone; in place of a bucket it takes its own directory.
                dir=None if in_bucket(directory) else os.fspath(directory),
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb did not begin a run in the project {project!r} ({error}); expected one. Log in with wandb "
                "login, set WANDB_MODE=offline, or leave config.train.wandb_project out."
            ) from error
        self._goes_on = before is not None
        self._stages: set[str] = set()
        # Written anew each time: a directory that was moved is then known by its new name.
        self._remember()

    def begin(self, stage: str, start: int, logged: int) -> None:
        """A stage goes on after step `start`, of which this directory has logged the steps up to `logged` before.

        One that begins anew by another recipe has curves of another name: those of the first can not be taken away.
        """
        settings = dict(self._settings.get(stage) or {})
        recipe = {name: value for name, value in settings.items() if name not in FREE_OF_RECIPES}
        told = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
        if start == 0 and logged and self._recipes.get(stage, told) != told:
            self._logged.pop(stage, None)
            name, _, count = self._names.get(stage, stage).partition(".")
            self._names[stage] = f"{name}.{int(count or 1) + 1}"
        elif self._goes_on and logged > self._logged.get(stage, 0):
            self._logged[stage] = logged
        self._recipes[stage] = told
        self._remember()

    def _remember(self) -> None:
        known = {"directory": _identity(self._directory), "logged": self._logged}
        known |= {"names": self._names, "recipes": self._recipes}
        write_text(self._directory / _FILE_NAME, f"{self._run.id}\n{json.dumps(known)}\n")

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Scalars of one step, unless the run has them; lists and what is not finite are left out."""
        if step <= self._logged.get(stage, 0):
            return
        stage = self._names.get(stage, stage)
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in finite.items()})

    def close(self) -> None:
        self._run.finish()


def _known_run(directory: AnyPath) -> tuple[str | None, dict[str, Any]]:
    """The run that this directory logs to, and what is known of it.

    (None, {}) where there is none, or it is that of the directory of which this one is a copy: both would log steps of
    the same numbers to one run.
    """
    file = directory / _FILE_NAME
    if not file.exists():
        return None, {}
    identity, _, rest = read_text(file).partition("\n")
    # An earlier version wrote the id alone.
    known: dict[str, Any] = json.loads(rest) if rest.strip() else {"directory": _identity(directory), "logged": {}}
    if not identity.strip() or not set(known["directory"]) & set(_identity(directory)):
        return None, {}
    return identity.strip(), known


def _identity(directory: AnyPath) -> list[str]:
    """Its name, and on a disk its number there: one of them stays where it is moved, none where it is copied."""
    if in_bucket(directory):
        return [str(directory)]
    return [str(Path(directory).resolve()), f"inode {os.stat(directory).st_ino}"]
