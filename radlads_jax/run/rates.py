"""The learning rates that a run's stages reach, as preflight says them, and which settings of them do nothing."""

from collections.abc import Iterable

import jax
import numpy as np

from radlads_jax.config import StageConfig, fitting_warmup
from radlads_jax.distill.optim import learning_rates, param_groups
from radlads_jax.distill.program import StagePlan, abstract_student
from radlads_jax.recipes import FOLLOWING_RATES

_GROUPS = {"mixer": ("mixer_lr", "mixers"), "rest": ("lr", "the rest")}


def described(plans: Iterable[StagePlan]) -> str:
    """Every stage's rates, why they are what they are, and what is amiss with them."""
    return "; ".join(map(_stage, plans))


def _stage(plan: StagePlan) -> str:
    name, recipe = plan.name, plan.recipe
    trained, _ = abstract_student(plan.on_one_device())
    groups = set(jax.tree.leaves(param_groups(plan.student, trained)))
    rates = {what: _span(recipe, field) for group, (field, what) in _GROUPS.items() if group in groups}
    same = len(set(rates.values())) == 1
    said = [next(iter(rates.values())) if same else ", ".join(f"{what} {rate}" for what, rate in rates.items())]
    said += [
        part
        for part in (_sweep(recipe), _reason(name, recipe), _warmup(name, recipe), _unused(name, recipe, groups))
        if part
    ]
    return f"{name} {'; '.join(said)}" if len(said) == 1 else f"{name} {said[0]} ({', '.join(said[1:])})"


def _span(recipe: StageConfig, field: str) -> str:
    first, last = getattr(recipe, field), getattr(recipe, f"{field}_final")
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


def _reason(name: str, recipe: StageConfig) -> str:
    """What a stage's rate has to do with its tokens, where these are few."""
    following = FOLLOWING_RATES.get(name)
    if following is None or recipe.tokens >= following.from_tokens:
        return ""
    rate, fitting = getattr(recipe, following.field), following.of(recipe.tokens)
    if rate == fitting:
        papers = f"the paper's {following.paper:g} is for {following.papers_tokens}"
        return f"the default for {recipe.tokens:,} tokens; {papers}"
    if rate < fitting:
        return f"low for {recipe.tokens:,} tokens: the default of convert.py is {fitting:g}"
    return ""


def _sweep(recipe: StageConfig) -> str:
    if not recipe.sweep:
        return ""
    return f"or a third or three times as much, by the held-out KL after {recipe.trial_steps:,} steps of each"


def _warmup(name: str, recipe: StageConfig) -> str:
    """The largest rate that is reached, where the warm-up takes more than half of the steps."""
    if recipe.warmup_steps <= recipe.steps / 2:
        return ""
    asked = max(recipe.lr, recipe.mixer_lr)
    steps = np.arange(recipe.steps)
    reached = max(float(np.max(rate(steps))) for rate in learning_rates(recipe).values())
    return (
        f"reaches {reached:.3g} of {asked:g}, because config.{name}.warmup_steps is {recipe.warmup_steps} of "
        f"{recipe.steps} steps: {fitting_warmup(recipe.steps)} fit"
    )


def _unused(name: str, recipe: StageConfig, groups: set[str]) -> str:
    """The rate that was set apart for weights of which this stage trains none."""
    if recipe.lr == recipe.mixer_lr:
        return ""
    fields = [field for group, (field, _) in _GROUPS.items() if group not in groups]
    return "".join(f"config.{name}.{field} {getattr(recipe, field):g} trains nothing" for field in fields)
