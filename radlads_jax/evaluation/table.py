"""An evaluation as a page of Markdown."""

from typing import Any

# A task's score is the first of these that it has.
METRICS = ("acc", "exact_match", "pass@1", "f1", "acc_norm")


def as_markdown(result: dict[str, Any]) -> str:
    """The evaluation as a page with a table, scores in percent."""
    lines = ["# Evaluation", "", f"Student: {result['model']}"]
    if result.get("teacher"):
        lines += ["", f"Teacher: {result['teacher']}"]
    if result.get("limit"):
        lines += ["", f"The first {result['limit']:g} documents of every task."]
    if result.get("tasks"):
        lines += ["", *_task_table(result)]
    if result.get("probes"):
        lines += ["", "## Long-context probes", "", *_probe_table(result["probes"])]
    return "\n".join(lines) + "\n"


def _task_table(result: dict[str, Any]) -> list[str]:
    published = result.get("published_model")
    head = ["task", "metric", "documents", "chance", "teacher", "student", "relative"]
    head += [f"{published}'s teacher", published, "relative"] if published else []
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for task, line in result["tasks"].items():
        row = [task, str(line["metric"]), str(line["student"]["documents"]), shown(line["chance"])]
        row += [_with_error(line.get("teacher")), _with_error(line["student"]), shown(line.get("relative"))]
        if published:
            row += [shown(line.get("published", {}).get(key)) for key in ("teacher", "student", "relative")]
        rows.append(row)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if result.get("mean_relative") is not None:
        lines += ["", f"Mean relative score: {shown(result['mean_relative'])}"]
    note = "Relative is (student - chance) / (teacher - chance). Scores in percent, with standard errors."
    return [*lines, "", note]


def _probe_table(probes: dict[str, Any]) -> list[str]:
    lines = []
    for name, curve in next(iter(probes.values())).items():
        places, values = curve
        rows = [[f"{name}: {values}", *(f"{place:,.0f}" for place in curve[places])]]
        rows.append(["---", *["---:"] * len(curve[places])])
        as_text = shown if values == "accuracy" else "{:.3f}".format
        rows += [[model, *map(as_text, results[name][values])] for model, results in probes.items()]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return lines[:-1]


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
