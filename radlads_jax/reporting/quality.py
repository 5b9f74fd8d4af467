"""The report's part on quality: student beside teacher on held-out text, in tasks and probes, and in samples."""

from collections.abc import Sequence
from html import escape
from typing import Any

from radlads_jax.reporting.charts import Curve, line_chart, short
from radlads_jax.reporting.page import amount, charts, digits, none, percent, table
from radlads_jax.reporting.run_log import RunLog, number

_SCORES = {"loss": "loss", "top1": "top-1", "kl": "KL", "agreement": "agreement"}
_ROLES = ("teacher", "control", "student")
_COLORS = {"teacher": 2, "student": 1}


def quality(run: RunLog) -> str:
    """Held-out scores of student and teacher."""
    if not run.summary:
        return none("Measured when the run has finished.")
    rows = []
    for name in _ROLES:
        values = run.summary.get(name) or {}
        if values:
            loss_like = {"loss", "kl"}
            rows.append([name, *((digits if key in loss_like else percent)(values.get(key)) or "-" for key in _SCORES)])
    tokens = amount(number(run.summary.get("tokens"))) or "?"
    said = f"Means over {tokens} held-out tokens; KL and agreement (the same top-1) are with the teacher."
    return table(["", *_SCORES.values()], rows) + f'<p class="soft">{said}</p>'


def samples(texts: Sequence[dict[str, Any]]) -> str:
    """Every prompt with what both models make of it; marked from where the student differs."""
    if not texts:
        return none("Given by train.sample_prompts, and written when the run has finished.")
    return "".join(_sample(sample) for sample in texts)


def _sample(sample: dict[str, Any]) -> str:
    texts = {name: str(sample[name]).strip() for name in ("teacher", "student") if name in sample}
    columns = []
    for name, text in texts.items():
        same = _same_words(text, texts.get("teacher", text))
        shown = escape(text[:same]) + (f"<mark>{escape(text[same:])}</mark>" if same < len(text) else "")
        columns.append(f'<div class="{name}"><b>{name}</b><div class="text">{shown}</div></div>')
    prompt = escape(str(sample.get("prompt", "")))
    return f'<div class="sample"><p class="text">{prompt}</p><div class="pair">{"".join(columns)}</div></div>'


def _same_words(text: str, other: str) -> int:
    """The length of what both begin with, cut where a word begins unless both go to their end."""
    pairs = zip(text, other, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    return same if same == len(text) else text.rfind(" ", 0, same) + 1


def evaluation(scores: dict[str, Any]) -> str:
    """What radlads_jax.evaluate has measured: tasks, and probes over long contexts."""
    parts = []
    if tasks := _dict(scores.get("tasks")):
        parts.append(_tasks(scores, tasks))
    if probes := _dict(scores.get("probes")):
        parts.append(charts([_probe(name, probes) for name in _dict(next(iter(probes.values())))]))
    if _dict(scores.get("kl")):
        parts.append("<p>The KL on completions is in evaluation.md.</p>")
    return "".join(parts) or none("None yet: python -m radlads_jax.evaluate writes it into the run's directory.")


def _tasks(scores: dict[str, Any], tasks: dict[str, Any]) -> str:
    published = scores.get("published_model")
    roles = [role for role in _ROLES if role != "control" or scores.get("control")]
    columns = ["task", *roles, "relative"]
    columns += ["paper's teacher", "paper's student", "paper's relative"] if published else []
    rows = []
    for task, line in tasks.items():
        line = _dict(line)
        student, paper = _dict(line.get("student")), _dict(line.get("published"))
        relative = "teacher at the floor" if line.get("at_floor") is True else percent(line.get("relative"))
        cells = [task, *(_score(line, role) for role in roles), relative]
        cells += [percent(paper.get(key)) for key in ("teacher", "student", "relative")] if published else []
        cells += [percent(line.get("chance")), _metric(line), amount(number(student.get("documents")))]
        rows.append([escape(cell) or "-" for cell in cells])
    said = "Relative is (student - chance) / (teacher - chance)."
    if mean := percent(scores.get("mean_relative")):
        of = amount(number(scores.get("relative_tasks")))
        said += f" Its mean is {mean}" + (f", of {of} tasks." if of else ".")
    if limit := number(scores.get("limit")):
        said += f" The first {f'{100 * limit:g}% of the' if limit < 1 else amount(limit)} documents of every task."
    if published:
        said += f" The paper's are those of {published}, made of {scores.get('published_teacher')}."
    return table([*columns, "chance", "metric", "docs"], rows) + f'<p class="soft">{escape(said)}</p>'


def _metric(line: dict[str, Any]) -> str:
    """Its name, and of several ways to read an answer the one that was taken."""
    kept = line.get("filter")
    return str(line.get("metric")) + (f", {kept}" if kept else "")


def _score(line: dict[str, Any], role: str) -> str:
    """A share in percent with its standard error; a perplexity and the like as it is."""
    result = _dict(line.get(role))
    score, error = number(result.get("score")), number(result.get("stderr"))
    if score is None:
        return ""
    if line.get("chance") is None:
        return short(score)
    return percent(score) + (f" ± {100 * error:.1f}" if error is not None else "")


def _probe(name: str, probes: dict[str, Any]) -> str:
    """A probe of every model over the context's length or the token's position, at equal distances."""
    curves, ticks, what, place = [], [], "", ""
    for role, results in probes.items():
        result = _dict(_dict(results).get(name))
        place, what = ("positions", "loss") if "positions" in result else ("lengths", "accuracy")
        # What earlier versions wrote is teacher-forced alone.
        values = [number(value) for value in result.get("generated") or result.get(what) or ()]
        curves.append(Curve(role, list(enumerate(values)), _COLORS.get(role, 3)))
        ticks = [(i, f"{number(x) or 0:,.0f}") for i, x in enumerate(result.get(place) or ())]
    return line_chart(
        name.replace("_", " "),
        curves,
        what="nats a token" if what == "loss" else what,
        x_name="position" if place == "positions" else "context length",
        x_ticks=ticks[:: -(-len(ticks) // 6) or 1],
        format_y=(lambda share: f"{share:.0%}") if what == "accuracy" else None,
        from_zero=what == "accuracy",
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
