"""What a calibrated start gives: a student at the start, in a short stage 1 and a short stage 2, beside the published.

JAX_PLATFORMS=cpu python tests/measure/calibrated_start.py [--mixer gdn] [--steps 8 --steps2 8] [--seeds 2]
    [--teacher DIR --text FILE --dtype float32] [--every 0] [--variant NAME=SETTINGS ...] [--picture FILE.svg]

The demo's teacher, data and rates with batches of 4 x 256 tokens, or a teacher of yours with configs/convert.py's and
batches of 4 x 512; every variant on the same ones. SETTINGS are of config.student, as "calibrate=decay+gate" or
"conv_qk=0.1"; beside them repeat=N lets stage 1 see its first N batches alone, over and over. Printed are (stage 1's
loss, KL) on held-out rows at the start, after every so many steps, and after each stage.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import pyplot

# No installed package has it.
sys.path.insert(0, str(Path(__file__).parents[2]))

from configs import convert, demo
from radlads_jax.config import validate
from radlads_jax.distill.align import align_loss
from radlads_jax.distill.losses import kl_loss
from radlads_jax.distill.program import StagePlan, create_state, make_step
from radlads_jax.distill.stages import is_aligned_mixer
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.tree import merge_params, split_params
from radlads_jax.porting.student import whole_student
from radlads_jax.run import heldout
from radlads_jax.run.job import Job, make_job
from radlads_jax.run.train import _calibrated, init_mixers

ROWS = 4


class Point(NamedTuple):
    """A student on held-out rows. tokens: that it has been trained on; loss: stage 1's, on the first batch of them."""

    stage: str
    tokens: int
    loss: float
    kl: float


def job_of(arguments: argparse.Namespace, seed: int, settings: dict[str, Any], workdir: str) -> Job:
    config = convert.get_config() if arguments.teacher else demo.get_config()
    if arguments.teacher:
        config.data.eval_rows, config.train.eval_batch_size = 8, ROWS
        config.teacher.path, config.data.path, config.data.max_tokens = arguments.teacher, arguments.text, 1_000_000
        config.dtype = config.teacher.dtype = arguments.dtype
    else:
        config.data.documents = 1500
    length = 512 if arguments.teacher else 256
    config.student.mixer, config.seed = arguments.mixer, seed
    config.stages = ("stage1", "stage2")
    for name, steps in (("stage1", arguments.steps), ("stage2", arguments.steps2)):
        stage = config[name]
        stage.seq_len, stage.batch_size, stage.warmup_steps = length, ROWS, 2
        stage.tokens = ROWS * length * max(steps, 1)
    config.update_from_flattened_dict({f"student.{name}": value for name, value in settings.items()})
    return make_job(validate(config), workdir)


@functools.cache
def losses_of(student, teacher):
    """(stage 1's loss, KL) of a whole student on one batch, each a program of its own."""

    def aligned(params, weights, batch):
        mixers, _ = split_params(params, lambda path: is_aligned_mixer(path, student))
        sums = align_loss(student, teacher, mixers, weights, batch, remat="none")
        return sums.loss / sums.weight

    def kl(params, weights, batch):
        sums = kl_loss(student, teacher, params, weights, batch, remat="none")
        return sums.loss / sums.weight

    return jax.jit(aligned), jax.jit(kl)


def held_out(arguments: argparse.Namespace, job: Job, workdir: str) -> list[Any]:
    """The text's end; of the demo's rows, which are more than any variant sees, 16 in another order."""
    if arguments.teacher:
        return list(heldout.batches(job))
    return [next(job_of(arguments, 99, {}, workdir).batches("stage2", 16))]


def points(arguments: argparse.Namespace, job: Job, teacher, rows, steps: dict, repeat: int) -> Iterator[Point]:
    """At the start, after every so many steps, at each stage's end. steps: every stage's program, made here once."""
    run = job.run
    # What begins otherwise is trained by the same programs.
    plain = dataclasses.replace(job.student, mixer=MIXERS[run.student.mixer].choose(job.student.hidden_size))
    programs = dataclasses.replace(run, student=dataclasses.replace(run.student, init="published", calibrate=()))
    aligned, kl = losses_of(plain, job.teacher)

    def point(name: str, tokens: int, student) -> Point:
        mean = statistics.fmean(float(kl(student, teacher, batch)) for batch in rows)
        return Point(name, tokens, float(aligned(student, teacher, rows[0])), mean)

    mixers = init_mixers(job.student, teacher, run.seed)
    if run.student.init == "calibrated":
        mixers = _calibrated(job, mixers, teacher)
    student, tokens = whole_student(job.student, teacher, mixers), 0
    yield point("", 0, student)
    for name, count in (("stage1", arguments.steps), ("stage2", arguments.steps2)):
        plan = StagePlan(programs, name, plain, job.teacher)
        trained, frozen = split_params(student, plan.trains)
        state = create_state(plan, jax.tree.map(jnp.array, trained))
        if name not in steps:
            steps[name] = make_step(plan)
        batches = job.batches(name)
        if repeat and name == "stage1":
            batches = itertools.cycle([next(batches) for _ in range(repeat)])
        for step in range(1, count + 1):
            state, _ = steps[name](state, {} if name == "stage1" else frozen, teacher, next(batches))
            tokens += ROWS * run.stage(name).seq_len
            if step == count or (arguments.every and step % arguments.every == 0):
                # A copy: the next step takes the state's own.
                student = merge_params(jax.tree.map(jnp.copy, state.params), frozen)
                yield point(name, tokens, student)


def default_variants(arguments: argparse.Namespace) -> list[str]:
    """The published start, each part (with the first of those it can not be without), the mixer's choice, and that with
    each of the parts that it leaves out."""
    with tempfile.TemporaryDirectory() as workdir:
        student = job_of(arguments, 0, {}, workdir).student
    spec, known = MIXERS[arguments.mixer], MIXERS[arguments.mixer].calibrations(student)
    chosen = [name for name in spec.calibrated if name in known]
    groups = [[name, *part.needs[:1]] for name, part in known.items()] + [chosen]
    groups += [[*chosen, name] for name in known if name not in chosen]
    return ["published=", *("{0}=calibrate={0}".format("+".join(group)) for group in groups)]


def settings_of(text: str) -> dict[str, Any]:
    settings = dict(part.split("=") for part in filter(None, text.split(",")))
    options = {name: value if name == "kv_heads" else _number(value) for name, value in settings.items()}
    if "calibrate" in options:
        options |= {"init": "calibrated", "calibrate": tuple(settings["calibrate"].split("+"))}
    return options


def _number(text: str):
    try:
        return float(text)
    except ValueError:
        return text


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """KL over tokens, a line for each; dots where stage 1 ends."""
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for name, curve in curves.items():
        (line,) = axes.plot([p.tokens for p in curve], [p.kl for p in curve], label=name, linewidth=2)
        last = max((p for p in curve if p.stage == "stage1"), key=lambda p: p.tokens)
        axes.plot([last.tokens], [last.kl], "o", color=line.get_color())
    axes.set(xlabel="tokens (dot: the end of stage 1)", ylabel="KL to the teacher, held-out", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixer", default="gdn")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--text", default="")
    parser.add_argument("--dtype", default="float32", help="of a teacher of yours and its student")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--steps2", type=int, default=8)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    variants = dict(text.split("=", 1) for text in arguments.variant or default_variants(arguments))
    print(f"stage 1's loss and KL, by tokens; {arguments.steps} steps of stage 1, {arguments.steps2} of 2", flush=True)
    steps: dict[str, Any] = {}
    curves: dict[str, list[Point]] = {}
    with tempfile.TemporaryDirectory() as workdir:
        for (name, text), seed in itertools.product(variants.items(), range(arguments.seeds)):
            settings = settings_of(text)
            repeat = int(settings.pop("repeat", 0))
            job = job_of(arguments, seed, settings, workdir)
            teacher = job.load_teacher("float32")
            label = f"{name} {seed}" if arguments.seeds > 1 else name
            rows = held_out(arguments, job, workdir)
            print(label, end="", flush=True)
            curves[label] = []
            for point in points(arguments, job, teacher, rows, steps, repeat):
                curves[label].append(point)
                print(f"   {point.stage} {point.tokens}: {point.loss:.4f} {point.kl:.4f}", end="", flush=True)
            print(flush=True)
    if arguments.picture:
        draw(curves, arguments.picture)


if __name__ == "__main__":
    main()
