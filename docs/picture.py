"""Draws README's picture: top-1 relative to the teacher's, and facts recalled, over the tokens of finished conversions.

python -m radlads_jax.launch --config configs/demo.py --config.train.eval_every=25 --workdir runs/demo
python -m radlads_jax.launch --config configs/demo.py:hybrid=true --config.train.eval_every=25 --workdir runs/chosen
python docs/picture.py "recurrent (RAD-RWKV7)=runs/demo" \\
    "hybrid, one chosen layer of four softmax=runs/chosen" --output docs/quality.svg

A line joins the student's scores while it trained; the dot is the finished one. Dashed: the teacher, and, where it has
one, the first run's control, the teacher itself with a window of keys in the converted layers. matplotlib comes with
the extra `test`.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from radlads_jax.reporting.charts import short
from radlads_jax.reporting.run_log import RunLog, read_run

# Each has a contrast of 3 at least with white and with a dark page; the text's is 4.
COLORS = ("#2f81f7", "#d9730d", "#2da44e")
TEXT = "#767b83"
TITLES = ("next-token accuracy, of the teacher's", "facts recalled in made-up tales")


def begins(run: RunLog) -> dict[str, float]:
    """Where each stage begins on the axis of all tokens, and under "" where the last one ends."""
    places, so_far = {}, 0.0
    for stage in run.stages:
        places[stage.name] = so_far
        so_far += stage.x_end
    return places | {"": so_far}


def facts_of(run: RunLog) -> dict[str, float]:
    """The share of facts that each model recalled at the end; ValueError where the run did not ask for them."""
    scores = run.summary.get("answers", {}).get("scores", [])
    facts = next((score for score in scores if score["what"] == "facts recalled"), None)
    if facts is None or not any(stage.curve("heldout_facts_recalled") for stage in run.stages):
        raise ValueError(
            f"{run.workdir} holds no finished run with scores while it trained; expected one with "
            "--config.train.eval_every=N and .answer_tales. Run its command again."
        )
    return facts


def curve(run: RunLog, key: str, scale: float, finished: float) -> list[tuple[float, float]]:
    """(tokens, score) of the student while it trained, and of the finished one at the end."""
    places = begins(run)
    points = [
        (places[stage.name] + x, value / scale)
        for stage in run.stages
        for x, value in stage.curve(key)
        if value is not None
    ]
    # A score at the end is of the same student, before its weights were rounded for the export.
    return [*(point for point in points if point[0] < places[""]), (places[""], finished)]


def draw_levels(axes: Axes, levels: dict[str, float]) -> None:
    """Dashed lines across with their names at the left, above the highest and below the others."""
    highest = max(levels.values())
    for name, level in levels.items():
        axes.axhline(level, color=TEXT, linewidth=1, linestyle="--")
        below = level < highest
        place = {"va": "top" if below else "bottom", "xytext": (3, -2 if below else 2)}
        corner: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", **place}
        axes.annotate(f"{name} {level:.1%}", (0, level), fontsize=8, color=TEXT, **corner)


def draw(runs: dict[str, RunLog], path: Path) -> None:
    """Both panels; a legend with what the finished students reach."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.9), layout="constrained")
    for (name, run), color in zip(runs.items(), COLORS, strict=False):
        facts, share = facts_of(run)["student"], run.summary["relative_top1"]
        label = f"{name}: {share:.1%} of the teacher's top-1, {facts:.1%} of facts"
        curves = (
            (left, curve(run, "heldout_top1", run.summary["teacher"]["top1"], share)),
            (right, curve(run, "heldout_facts_recalled", 1, facts)),
        )
        for axes, points in curves:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, linewidth=2)
            named = {"label": label} if axes is left else {}
            axes.plot(x[-1:], y[-1:], "o", color=color, markersize=7, clip_on=False, **named)
    first = next(iter(runs.values()))
    recalled = facts_of(first)
    levels = {"teacher": (1.0, recalled["teacher"])}
    if "control" in first.summary and "control" in recalled:
        levels["untrained control"] = (first.summary["control"]["relative_top1"], recalled["control"])
    for i, axes in enumerate((left, right)):
        draw_levels(axes, {name: level[i] for name, level in levels.items()})
    for axes, title in zip((left, right), TITLES, strict=True):
        axes.set_xlim(0, begins(first)[""])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_xlabel("tokens")
        axes.set_title(title, loc="left", fontsize=10)
    figure.legend(frameon=False, labelcolor=TEXT, fontsize=9, loc="outside lower left")
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR", help=f"at most {len(COLORS)}")
    parser.add_argument("--output", type=Path, required=True, help="a .svg or .png")
    args = parser.parse_args()
    pairs = [text.rpartition("=")[::2] for text in args.runs]
    if len(pairs) > len(COLORS) or not all(name for name, _ in pairs):
        parser.error(f"got {args.runs}; expected up to {len(COLORS)} of the form NAME=WORKDIR")
    axes_color = {f"{part}.color": TEXT for part in ("xtick", "ytick")} | {"axes.edgecolor": TEXT}
    text_color = {"text.color": TEXT, "axes.labelcolor": TEXT}
    spines = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "radlads_jax"}
    with pyplot.rc_context({**axes_color, **text_color, **spines}):
        draw({name: read_run(workdir) for name, workdir in pairs}, args.output)


if __name__ == "__main__":
    main()
