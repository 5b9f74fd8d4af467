"""What of a run's stages can not be: checked by settings and dimensions alone, before anything is read or planned."""

import difflib
import re

from radlads_jax.config import RunConfig, Teacher
from radlads_jax.distill.program import trains
from radlads_jax.distill.stages import STAGES, is_aligned_mixer
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.tree import path_leaves

# Of those that a message names.
_NAMED_PATHS = 3


def check_stages(run: RunConfig, student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ValueError for stages that train nothing, undo each other, or are asked what they can not do."""
    _check_order(run)
    _check_taught(run)
    check_trainable(run, student)
    _check_softening(run, teacher)
    _check_sweeps(run)
    _check_evaluations(run)


def _check_order(run: RunConfig) -> None:
    """Raises ValueError for a stage that fits mixers to the teacher's layers behind one that has moved the others."""
    whole = ""
    for name in run.stages:
        if STAGES[name].whole_student:
            whole = name
        elif whole:
            raise ValueError(
                f"config.stages is {', '.join(run.stages)}: {name} fits {STAGES[name].trains} to the teacher's own "
                f"layers, which {whole} before it has changed in the student; expected {name} first. Exchange them."
            )


def _check_taught(run: RunConfig) -> None:
    """Raises ValueError for stages that learn from a teacher of fresh weights."""
    taught = [name for name in run.stages if STAGES[name].needs_teacher]
    if run.teacher.scratch and taught:
        raise ValueError(
            f"config.teacher.scratch makes fresh weights, from which {', '.join(taught)} would have nothing to learn; "
            "expected config.teacher.path. To convert what a run has trained, name its export there, in a run of its "
            "own."
        )


def check_trainable(run: RunConfig, student: ModelConfig) -> None:
    """Raises ValueError for a `freeze` pattern that no parameter's path matches, or a stage that trains nothing."""
    paths = list(path_leaves(abstract_params(student)))
    for name, recipe in run.recipes.items():
        frozen = recipe.freeze
        for pattern in frozen:
            if not any(re.search(pattern, path) for path in paths):
                raise ValueError(
                    f"config.{name}.freeze holds {pattern!r}, which matches none of the student's {len(paths)} "
                    f"parameters; expected a regular expression found in a path. The nearest are "
                    f"{', '.join(_nearest(pattern, paths))}."
                )
        unfrozen = [path for path in paths if STAGES[name].trainable(path, student)]
        trained = [path for path in unfrozen if trains(run, student, name, path)]
        if not trained:
            raise ValueError(
                f"{name} has nothing to train: of its {len(unfrozen)} parameters config.{name}.freeze {frozen} leaves "
                f"none; expected some. They are {', '.join(unfrozen[:_NAMED_PATHS]) or 'none without it either'}: "
                "freeze fewer, or leave the stage out of config.stages."
            )
        rates = sorted({"mixer_lr" if is_aligned_mixer(path, student) else "lr" for path in trained})
        if not any(getattr(recipe, rate) for rate in rates):
            asked = " and ".join(f"config.{name}.{rate} 0" for rate in rates)
            raise ValueError(
                f"with {asked} nothing that {name} trains would move; expected a rate above 0. Raise it, or leave the "
                "stage out of config.stages."
            )


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    """The paths of which some part is most like the pattern."""

    def likeness(path: str) -> float:
        words = path.split("/")
        parts = ["/".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
        return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in parts)

    return sorted(paths, key=likeness, reverse=True)[:_NAMED_PATHS]


def _check_softening(run: RunConfig, teacher: ModelConfig) -> None:
    """Raises ValueError where config.teacher.temperature or .top_k can not do what they say."""
    asked = run.teacher
    if asked.stored_top_k > teacher.vocab_size and (asked.top_k or asked.logits):
        raise ValueError(
            f"config.teacher.top_k is {asked.stored_top_k:,} and the teacher's vocabulary {teacher.vocab_size:,}; "
            "expected no more than that. Lower it."
        )
    if asked.logits and asked.temperature != 1:
        raise ValueError(
            f"config.teacher.temperature is {asked.temperature:g} and config.teacher.logits {asked.logits}; expected "
            "temperature 1, for of tokens that are not stored nothing is known at another. Leave one of them out."
        )
    changed = [name for name in ("temperature", "top_k") if getattr(asked, name) != getattr(Teacher(), name)]
    softened = [name for name, stage in STAGES.items() if stage.softens]
    if changed and not asked.logits and not set(softened) & set(run.stages):
        raise ValueError(
            f"config.teacher.{changed[0]} is {getattr(asked, changed[0]):g} and config.stages {run.stages}; expected a "
            f"stage whose loss it changes, one of {', '.join(softened)}. Leave it out."
        )


def _check_sweeps(run: RunConfig) -> None:
    """Raises ValueError where a stage is to be swept whose student the held-out KL can not judge."""
    able = [name for name, stage in STAGES.items() if stage.needs_teacher and stage.whole_student]
    for name, recipe in run.recipes.items():
        if recipe.sweep and name not in able:
            raise ValueError(
                f"config.{name}.sweep is true, and {name}'s loss is {STAGES[name].loss}; expected a stage that the "
                f"held-out KL judges, one of {', '.join(able)}. Leave it out."
            )


def _check_evaluations(run: RunConfig) -> None:
    """Raises ValueError where the student is to be scored while it trains, and no stage trains it whole."""
    whole = [name for name, stage in STAGES.items() if stage.whole_student]
    if run.train.eval_every and not set(whole) & set(run.stages):
        raise ValueError(
            f"config.train.eval_every is {run.train.eval_every:,} and config.stages {run.stages}; expected a stage "
            f"that trains the whole student, one of {', '.join(whole)}. Leave it out: the end has scores in any case."
        )
