"""A run's metrics on Weights & Biases, beside its own files, where config.train.wandb_project names a project.

wandb's own settings hold: WANDB_MODE=offline keeps everything in DIR/wandb for a later `wandb sync`.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from etils import epath


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
                "extra `wandb`. Install it with pip install 'radlads-jax[wandb]', or leave the setting out."
            ) from error
        directory = epath.Path(workdir)
        known, is_bucket = directory / "wandb_id", "://" in os.fspath(directory)
        before = known.read_text(encoding="utf-8").strip() if known.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                name=directory.name,
                id=before,
                resume="allow",
                # wandb writes to disks alone; in place of a bucket it takes its own directory.
                dir=None if is_bucket else os.fspath(directory),
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb did not begin a run in the project {project!r} ({error}); expected one. Log in with wandb "
                "login, set WANDB_MODE=offline, or leave config.train.wandb_project out."
            ) from error
        if before is None:
            known.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Scalars of one step; lists and what is not finite are left out."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        finite = {k: v for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._run.log({f"{stage}/step": step} | {f"{stage}/{name}": value for name, value in finite.items()})

    def close(self) -> None:
        self._run.finish()
