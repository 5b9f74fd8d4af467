"""The planner of a run: its teacher's dimensions, its student's, and the chips' prices."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from radlads_jax import config as config_lib
from radlads_jax.system import storage

if TYPE_CHECKING:
    from radlads_jax.models.config import ModelConfig
    from radlads_jax.planning.plans import Planner


def prepare_environment() -> None:
    """What the TPU compiler needs to run where there is no TPU; to be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_X64"] = "0"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def make_planner(
    run: config_lib.RunConfig, price_overrides: dict[str, float], results: Path | None = None
) -> "Planner":
    """The `plans.Planner` of a run. Raises ValueError for a teacher or a chip that is not known."""
    # Imported late: what is wrong with the command shows without waiting for the compiler's libraries.
    from radlads_jax.distill.stage_checks import check_stages
    from radlads_jax.distill.student_config import make_student_config
    from radlads_jax.planning import chips, plans

    original = teacher_config(run)
    student = make_student_config(original, run)
    check_stages(run, student, original)
    return plans.Planner(run, student, original.as_teacher_of(student), chips.prices(price_overrides), results)


def teacher_config(run: config_lib.RunConfig) -> "ModelConfig":
    """The teacher's dimensions: from its directory, the run's own `scratch`, or for the paper's models a table."""
    from radlads_jax.porting.config_keys import read_config
    from radlads_jax.porting.hf_config import model_config_from_hf
    from radlads_jax.porting.known_models import KNOWN_CONFIGS

    path = run.teacher.path
    if not path:
        values = dict(run.teacher.scratch)
    elif (directory := storage.as_path(path)).is_dir():
        values = read_config(directory)
    elif path in KNOWN_CONFIGS:
        values = KNOWN_CONFIGS[path]
    else:
        raise ValueError(
            f"the shapes of {path} are not known here; expected a directory with its config.json (weights are not "
            f"needed), or one of {', '.join(KNOWN_CONFIGS)}. Download its config.json and give the directory."
        )
    return dataclasses.replace(model_config_from_hf(values), dtype=run.teacher.dtype)
