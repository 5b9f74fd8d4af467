"""Draws README's picture: the KL to the teacher over the tokens of finished conversions, on one log axis.

make demo
python -m radlads_jax.launch --config configs/demo.py --workdir runs/demo_hybrid --config.student.attention_every=4
python -m radlads_jax.launch --config configs/demo.py:hybrid=true --workdir runs/demo_chosen
python docs/picture.py "recurrent (RAD-RWKV7)=runs/demo" \\
    "hybrid, the last of four layers softmax=runs/demo_hybrid" \\
    "hybrid, one chosen layer softmax=runs/demo_chosen" --output docs/quality.svg

A line is stage 2's own loss: of batches that its steps had not learnt from yet, a mean of --window steps. A dot is the
finished student on held-out text, after stage 3, whose loss is another. matplotlib comes with the extra `test`.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from radlads_jax.reporting.charts import Point, log_ticks, short
from radlads_jax.reporting.run_log import RunLog, read_run

# Each has a contrast of 3 at least with white and with a dark page; the text's is 4.
COLORS = ("#2f81f7", "#d9730d", "#2da44e")
TEXT = "#767b83"
KL_STAGES = ("stage2", "stage2a")
STAGE_TITLES = {"stage1": "stage 1: mixers\nlearn their layers", "stage2": "stage 2: logits", "stage3": "3: text"}


def smoothed(points: Sequence[Point], window: int) -> list[tuple[float, float]]:
    """Means of `window` neighbouring points, at the last one's place; what was not finite is left out."""
    finite = [(x, y) for x, y in points if y is not None]
    groups = [finite[i : i + window] for i in range(0, len(finite), window)]
    return [(group[-1][0], statistics.fmean(y for _, y in group)) for group in groups]


def begins(run: RunLog) -> dict[str, float]:
    """Where each stage begins on the axis of all tokens, and under "" where the last one ends."""
    places, so_far = {}, 0.0
    for stage in run.stages:
        places[stage.name] = so_far
        so_far += stage.x_end
    return places | {"": so_far}


def draw_run(axes: Axes, name: str, run: RunLog, color: str, window: int) -> None:
    """One conversion's line, and its dot with the student's share of the teacher's accuracy."""
    places = begins(run)
    if not run.summary or not set(KL_STAGES) & places.keys():
        raise ValueError(f"{run.workdir} holds no finished run with a stage 2; expected one. Run its command again.")
    stage = next(stage for stage in run.stages if stage.name in KL_STAGES)
    x, y = zip(*smoothed(stage.curve("loss"), window), strict=True)
    line = [places[stage.name] + tokens for tokens in x]
    kl, share = run.summary["student"]["kl"], run.summary["relative_top1"]
    axes.plot(line, y, color=color, linewidth=2)
    axes.plot([line[-1], places[""]], [y[-1], kl], color=color, linewidth=1, linestyle=":")
    label = f"{name}: {share:.2%} of the teacher's top-1, KL {kl:.4f}"
    axes.plot([places[""]], [kl], "o", color=color, markersize=7, clip_on=False, label=label)


def draw(runs: dict[str, RunLog], window: int, path: Path) -> None:
    """All of them, with the stages of the first one behind."""
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for (name, run), color in zip(runs.items(), COLORS, strict=False):
        draw_run(axes, name, run, color, window)
    first = next(iter(runs.values()))
    places = begins(first)
    axes.set_yscale("log")
    axes.set_xlim(0, places[""])
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    # Above the lines is room for the stages' names.
    axes.set_ylim(low, 1.6 * high)
    axes.set_yticks(log_ticks(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    for stage in first.stages:
        axes.axvline(places[stage.name], color=TEXT, linewidth=0.6, alpha=0.6)
        title, place = STAGE_TITLES.get(stage.name, stage.name), (places[stage.name], 1)
        corner: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        axes.annotate(title, place, (4, -2), fontsize=9, **corner)
    axes.set_xlabel("tokens")
    axes.set_title("KL to the teacher, nats a token (log scale; dots: held-out text)", loc="left", fontsize=10)
    figure.legend(frameon=False, labelcolor=TEXT, fontsize=9, loc="outside lower left")
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR", help=f"at most {len(COLORS)}")
    parser.add_argument("--output", type=Path, required=True, help="a .svg or .png")
    parser.add_argument("--window", type=int, default=8, help="steps of which a point of a line is the mean")
    args = parser.parse_args()
    pairs = [text.rpartition("=")[::2] for text in args.runs]
    if len(pairs) > len(COLORS) or not all(name for name, _ in pairs):
        parser.error(f"got {args.runs}; expected up to {len(COLORS)} of the form NAME=WORKDIR")
    axes_color = {f"{part}.color": TEXT for part in ("xtick", "ytick")} | {"axes.edgecolor": TEXT}
    text_color = {"text.color": TEXT, "axes.labelcolor": TEXT}
    spines = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "radlads_jax"}
    with pyplot.rc_context({**axes_color, **text_color, **spines}):
        draw({name: read_run(workdir) for name, workdir in pairs}, args.window, args.output)


if __name__ == "__main__":
    main()
