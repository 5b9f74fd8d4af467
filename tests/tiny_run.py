"""A small conversion that many test files run, with one recipe: what one compiles is there for the others.

Whoever imports this gives this process's runs their steps back: one that goes on, or begins with the recipe of one
before it, traces none anew, which is most of what a tiny run takes.
"""

import pathlib
from typing import Any

from radlads_jax import config
from radlads_jax.distill.program import StagePlan
from radlads_jax.run import train
from radlads_jax.run.job import make_job

STEPS = {"stage1": 5, "stage2": 4, "stage3": 11}
ROWS, TOKENS = 4, 32

_MOST_STEPS = 6
_make_step = train.make_step
_steps: dict[str, Any] = {}


def _kept_step(plan: StagePlan) -> Any:
    # All that a step is made from. A recipe may hold dicts, and so be no key itself.
    recipe = (plan.stage, plan.recipe, plan.softening, plan.run.optim, plan.run.train.slice_tokens)
    devices = None if plan.mesh is None else (plan.mesh.shape_tuple, plan.mesh.device_ids.tolist())
    key = repr((recipe, plan.student, plan.teacher, devices))
    if key not in _steps:
        if len(_steps) == _MOST_STEPS:
            _steps.pop(next(iter(_steps)))
        _steps[key] = _make_step(plan)
    return _steps[key]


train.make_step = _kept_step


def settings(teacher: pathlib.Path | str, mixer: str = "rad_rwkv7", steps: dict[str, int] = STEPS) -> dict[str, Any]:
    """Every setting that is not the default one, by its name. steps: of each stage to run."""
    chosen: dict[str, Any] = {
        "dtype": "float32",
        "teacher.dtype": "float32",
        "export.dtype": "float32",
        "teacher.path": str(teacher),
        "student.mixer": mixer,
        "data.source": "synthetic",
        "data.documents": 60,
        "data.eval_rows": 32,
        "stages": tuple(steps),
        "train.log_every": 1,
        "train.checkpoint_every": 2,
        "train.sample_prompts": ("This is a tale of", "What is"),
        "train.sample_tokens": 3,
    }
    for name, count in steps.items():
        recipe: dict[str, Any] = {"seq_len": TOKENS, "batch_size": ROWS, "tokens": ROWS * TOKENS * count}
        recipe |= dict.fromkeys(("lr", "lr_final", "mixer_lr", "mixer_lr_final"), 3e-3) | {"warmup_steps": 2}
        chosen |= {f"{name}.{field}": value for field, value in recipe.items()}
    return chosen


def convert(workdir: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs it in this process; returns the summary."""
    chosen = config.defaults()
    chosen.update_from_flattened_dict(settings)
    return train.convert(make_job(config.validate(chosen), workdir))
