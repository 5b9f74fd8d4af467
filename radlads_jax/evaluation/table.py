"""An evaluation as a page of Markdown."""

from typing import Any

from radlads_jax.evaluation import completions, rotation
from radlads_jax.evaluation.paper import METRICS, relative_score

# In the place of a relative score.
_AT_FLOOR = "teacher at the floor"


def as_markdown(result: dict[str, Any]) -> str:
    """The evaluation as a page with a table, scores in percent."""
    lines = ["# Evaluation", "", f"Student: {result['model']}"]
    if result.get("teacher"):
        lines += ["", f"Teacher: {result['teacher']}"]
    if control := result.get("control"):
        seen = f"the first {control['sinks']} and the latest {control['window']} keys"
        lines += ["", f"Control: the teacher, untrained, with {seen} where the student's layers are converted."]
    if result.get("limit"):
        lines += ["", f"{_limited(result['limit'])} of every task."]
    if result.get("chat_template"):
        lines += ["", "The tasks' prompts are in each model's own chat template."]
    if result.get("tasks"):
        lines += ["", *_task_table(result)]
    if kl := result.get("kl"):
        lines += ["", "## KL to the teacher", "", *completions.table(kl["models"], completions.Sizes(**kl["sizes"]))]
    if result.get("probes"):
        lines += ["", "## Long-context probes", "", *_probe_table(result["probes"])]
    return "\n".join(lines) + "\n"


def _limited(limit: float) -> str:
    """lm-eval's limit in words: documents, or below 1 their share."""
    return f"The first {100 * limit:g}% of the documents" if limit < 1 else f"The first {limit:g} documents"


def _task_table(result: dict[str, Any]) -> list[str]:
    published = result.get("published_model")
    roles = ["teacher", *(["control"] if result.get("control") else []), "student"]
    head = ["task", "metric", "documents", "shots", "chance", "always one option", *roles, "relative"]
    head += [f"{published}'s teacher", published, "relative"] if published else []
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for task, line in result["tasks"].items():
        row = [
            task,
            ", ".join(filter(None, (line["metric"], line["filter"]))),
            str(line["student"]["documents"]),
            ", ".join(map(str, line["num_fewshot"])),
            shown(line["chance"]),
            shown(line["always"]),
        ]
        relative = _AT_FLOOR if line.get("at_floor") else shown(line.get("relative"))
        row += [*(_with_error(line.get(role)) for role in roles), relative]
        if published:
            row += [shown(line.get("published", {}).get(key)) for key in ("teacher", "student", "relative")]
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if result.get("mean_relative") is not None:
        counted = f"{result['relative_tasks']} of {len(result['tasks'])} tasks"
        lines += ["", f"Mean relative score: {shown(result['mean_relative'])}, of {counted}"]
    note = (
        "Relative is (student - chance) / (teacher - chance). Scores in percent, with standard errors; always one "
        "option is what the best constant answer scores. A teacher at the floor is within its 95% interval of chance."
    )
    if published:
        note += f" {published} is the paper's student of this shape; its teacher is {result['published_teacher']}."
    stuck = [line for warning in rotation.warnings(result["tasks"], roles) for line in ("", f"**{warning}**")]
    return [*lines, *stuck, "", note]


def _probe_table(probes: dict[str, Any]) -> list[str]:
    lines = []
    for name in next(iter(probes.values())):
        of_roles = {role: results[name] for role, results in probes.items()}
        place, rows = ("lengths", _answers(of_roles)) if "generated" in of_roles["student"] else ("positions", None)
        title = f"{name}: {'answers' if rows else 'loss'}"
        rows = rows or {role: [f"{loss:.3f}" for loss in results["loss"]] for role, results in of_roles.items()}
        table = {title: [f"{at:,.0f}" for at in of_roles["student"][place]]}
        table["---"] = ["---:"] * len(of_roles["student"][place])
        lines += [f"| {' | '.join([label, *cells])} |" for label, cells in (table | rows).items()] + [""]
    note = (
        "Answers: the share of generated ones that are right (of copies: of right tokens), in percent, with its 95% "
        "interval; teacher-forced: with the right tokens before each. Relative is (student - chance) / (teacher - "
        "chance), chance that of always giving the same answer."
    )
    return [*lines, note] if any("generated" in results for results in probes["student"].values()) else lines[:-1]


def _answers(of_roles: dict[str, Any]) -> dict[str, list[str]]:
    """A probe's rows, by their label."""
    rows = {}
    for role, results in of_roles.items():
        pairs = zip(results["generated"], results["interval"], strict=True)
        rows[role] = [f"{shown(share)} ({100 * low:.0f} to {100 * high:.0f})" for share, (low, high) in pairs]
    for role, results in of_roles.items():
        rows[f"{role}, teacher-forced"] = [shown(share) for share in results["accuracy"]]
    student, teacher = of_roles["student"], of_roles.get("teacher")
    if teacher is not None:
        rows["relative"] = [_relative(student, teacher, i) for i in range(len(student["generated"]))]
    return rows | {"chance": [shown(c) for c in student["chance"]], "samples": list(map(str, student["samples"]))}


def _relative(student: dict[str, Any], teacher: dict[str, Any], i: int) -> str:
    """The student's share of what the teacher can do; of a teacher that may do nothing better than chance, that."""
    chance = teacher["chance"][i]
    if teacher["interval"][i][0] <= chance:
        return _AT_FLOOR
    return shown(relative_score(student["generated"][i], teacher["generated"][i], chance))


def shown(value: float | None) -> str:
    """A share in percent; nothing for none."""
    return "" if value is None else f"{100 * value:.1f}"


def _with_error(result: dict[str, Any] | None) -> str:
    if result is None or result["score"] is None:
        return ""
    if result["metric"] not in METRICS:
        return f"{result['score']:.4g}"
    error = result["stderr"]
    return shown(result["score"]) + (f" ± {shown(error)}" if isinstance(error, float) else "")
