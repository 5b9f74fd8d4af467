"""What a calibrated start gives: KL at the start, after a short stage 1 and a short stage 2, beside the published one.

JAX_PLATFORMS=cpu python tests/measure/calibrated_start.py [--mixer gdn] [--steps 8] [--seeds 2]
    [--variant NAME=SETTINGS ...]

The demo's teacher and data, batches of 4 x 256 tokens, every variant on the same ones. SETTINGS are of config.student,
as "calibrate=decay+gate" or "conv_qk=0.1".
"""

import argparse
import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp

from configs import demo
from radlads_jax.config import validate
from radlads_jax.distill.losses import kl_loss
from radlads_jax.distill.program import StagePlan, create_state, make_step
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.tree import merge_params, split_params
from radlads_jax.porting.student import whole_student
from radlads_jax.run.job import make_job
from radlads_jax.run.train import _calibrated, init_mixers

ROWS, TOKENS, HELD_OUT = 4, 256, 16


def job_of(mixer: str, steps: int, seed: int, settings: dict, workdir: str):
    config = demo.get_config()
    config.student.mixer, config.seed = mixer, seed
    config.data.documents = 1500
    config.stages = ("stage1", "stage2")
    for name in config.stages:
        stage = config[name]
        stage.seq_len, stage.batch_size, stage.tokens, stage.warmup_steps = TOKENS, ROWS, ROWS * TOKENS * steps, 2
    config.update_from_flattened_dict({f"student.{name}": value for name, value in settings.items()})
    return make_job(validate(config), workdir)


@functools.cache
def kl_of(student, teacher):
    def mean(params, weights, batch):
        sums = kl_loss(student, teacher, params, weights, batch, remat="none")
        return sums.loss / sums.weight

    return jax.jit(mean)


def measured(job, teacher, held_out, steps: dict) -> list[float]:
    """KL at the start, after stage 1, after stage 2. steps: every stage's program, made here for the first variant."""
    run = job.run
    # What begins otherwise is trained by the same programs.
    plain = dataclasses.replace(job.student, mixer=MIXERS[run.student.mixer].choose(job.student.hidden_size))
    programs = dataclasses.replace(run, student=dataclasses.replace(run.student, init="published", calibrate=()))
    kl = kl_of(plain, job.teacher)
    mixers = init_mixers(job.student, teacher, run.seed)
    if run.student.init == "calibrated":
        mixers = _calibrated(job, mixers, teacher)
    student = whole_student(job.student, teacher, mixers)
    losses = [float(kl(student, teacher, held_out))]
    for name in run.stages:
        plan = StagePlan(programs, name, plain, job.teacher)
        trained, frozen = split_params(student, plan.trains)
        state = create_state(plan, jax.tree.map(jnp.array, trained))
        if name not in steps:
            steps[name] = make_step(plan)
        batches = job.batches(name)
        for _ in range(run.stage(name).steps):
            state, _ = steps[name](state, {} if name == "stage1" else frozen, teacher, next(batches))
        student = merge_params(state.params, frozen)
        losses.append(float(kl(student, teacher, held_out)))
    return losses


def default_variants(mixer: str) -> list[str]:
    """The published start, each part (with the first of those it can not be without), the mixer's choice, and that with
    each of the parts that it leaves out."""
    with tempfile.TemporaryDirectory() as workdir:
        student = job_of(mixer, 1, 0, {}, workdir).student
    spec, known = MIXERS[mixer], MIXERS[mixer].calibrations(student)
    chosen = [name for name in spec.calibrated if name in known]
    groups = [[name, *part.needs[:1]] for name, part in known.items()] + [chosen]
    groups += [[*chosen, name] for name in known if name not in chosen]
    return ["published=", *("{0}=calibrate={0}".format("+".join(group)) for group in groups)]


def settings_of(text: str) -> dict:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixer", default="gdn")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variant", action="append", default=[])
    arguments = parser.parse_args()
    variants = dict(text.split("=", 1) for text in arguments.variant or default_variants(arguments.mixer))
    print(
        f"KL at the start, after {arguments.steps} steps of stage 1, after as many of stage 2, for each seed",
        flush=True,
    )
    steps: dict = {}
    with tempfile.TemporaryDirectory() as workdir:
        for name, text in variants.items():
            line = []
            for seed in range(arguments.seeds):
                job = job_of(arguments.mixer, arguments.steps, seed, settings_of(text), workdir)
                teacher = job.load_teacher("float32")
                held_out = next(job_of(arguments.mixer, 8, 99, {}, workdir).batches("stage2", HELD_OUT))
                line.append("  ".join(f"{kl:.4f}" for kl in measured(job, teacher, held_out, steps)))
            print(f"{name:44s} {'   |   '.join(line)}", flush=True)


if __name__ == "__main__":
    main()
