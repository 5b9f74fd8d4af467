"""What other softmax layers and norms of q and k give a hybrid: KL to the teacher at the trained length and beyond it.

JAX_PLATFORMS=cpu python tests/measure/softmax_layers.py [--steps 60 --steps2 120] [--seeds 1] [--every 4]
    [--train_rows 8 --train_length 256] [--teacher DIR --text FILE] [--variant NAME=SETTINGS ...]

The demo's teacher, data and rates, or a teacher of yours with configs/convert.py's; every variant on the same batches.
SETTINGS are of config.student, as "attention_rope=false" or "options.window=2048"; beside them align=false leaves the
softmax layers as they begin until stage 2. Printed are the alignment's loss at its start and its end (the mean of ten
steps), and KL at the end by place in rows of --length tokens without boundaries, for every scale a of the logits that
--scales names (0: none). A stage of 0 steps is left out. Last the teacher's own loss by place: where that is high, it
is no measure.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# No installed package has it.
sys.path.insert(0, str(Path(__file__).parents[2]))

from configs import convert, demo
from radlads_jax.config import validate
from radlads_jax.data import packing
from radlads_jax.distill.program import create_state, make_step
from radlads_jax.models import ModelConfig, bind
from radlads_jax.models.config import SOFTMAX, KeptAttention
from radlads_jax.models.tree import merge_params, overlay_params, split_params
from radlads_jax.porting.student import aligned_alone, init_mixers, whole_student
from radlads_jax.run.job import Job, make_job


def parsed(text: str) -> Any:
    words = {"true": True, "false": False}
    if text in words:
        return words[text]
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def job_of(arguments: argparse.Namespace, seed: int, settings: dict[str, Any], workdir: str) -> Job:
    config = convert.get_config() if arguments.teacher else demo.get_config()
    if arguments.teacher:
        config.teacher.path, config.data.path, config.data.max_tokens = arguments.teacher, arguments.text, 1_000_000
        config.dtype = config.teacher.dtype = "float32"
    else:
        config.data.documents = 3000
    rows, length = arguments.train_rows, arguments.train_length
    config.student.mixer, config.student.attention_every, config.seed = arguments.mixer, arguments.every, seed
    config.data.cross_document = True
    config.stages, config.data.eval_rows = ("stage1", "stage2"), arguments.rows * arguments.length // length
    for name, steps in (("stage1", arguments.steps), ("stage2", arguments.steps2)):
        stage = config[name]
        stage.seq_len, stage.batch_size, stage.warmup_steps = length, rows, 2
        stage.tokens = rows * length * max(steps, 1)
    for name, value in settings.items():
        group, name = (config.student.options, name[8:]) if name.startswith("options.") else (config.student, name)
        with group.unlocked():
            group[name] = float(value) if name == "attention_log_scale" else value
    return make_job(validate(config), workdir)


def trained(job: Job, teacher: Any, stages: list[str], *, align: bool) -> tuple[list[float], dict[str, Any]]:
    """Stage 1's losses, and the student after these stages."""
    mixers = init_mixers(job.student, teacher, job.run.seed)
    losses: list[float] = []
    for name in stages:
        plan = job.stage_plan(name)
        params = aligned_alone(job.student, mixers) if name == "stage1" else whole_student(job.student, teacher, mixers)
        params = jax.tree.map(jnp.array, params)
        kept = [f"stacks/{i}/" for i, (mixer, _) in enumerate(job.student.stacks) if mixer == SOFTMAX]
        held = tuple(kept) if name == "stage1" and not align else ()
        own, frozen = split_params(params, lambda path, held=held: not path.startswith(held))
        state, step, batches = create_state(plan, own), make_step(plan), job.batches(name)
        for _ in range(plan.recipe.steps):
            state, metrics = step(state, frozen, teacher, next(batches))
            losses += [float(metrics["loss"])] if name == "stage1" else []
        params = merge_params(state.params, frozen)
        mixers = overlay_params(mixers, params) if name == "stage1" else params
    return losses or [0.0], mixers if "stage2" in stages else whole_student(job.student, teacher, mixers)


def by_place(job: Job, scale: float, params: Any, teacher: Any, tokens: np.ndarray, ends: list[int]) -> np.ndarray:
    """Means of (KL, teacher's loss, student's loss) over the places up to each end, [3, ends]; logits scaled with a."""
    kept = dataclasses.replace(job.student.kept_attention or KeptAttention(), log_scale=scale)
    cfg = dataclasses.replace(job.student, kept_attention=None if kept == KeptAttention() else kept)
    means = np.mean([_of_row(cfg, job.teacher, params, teacher, jnp.asarray(row[None])) for row in tokens], axis=0)
    cuts = list(zip([0, *ends[:-1]], ends, strict=True))
    return np.stack([means[:, begin : end - (end == tokens.shape[1])].mean(1) for begin, end in cuts], axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_row(cfg: ModelConfig, teacher_cfg: ModelConfig, params: Any, teacher: Any, row: jax.Array) -> jax.Array:
    def log_probs(cfg: ModelConfig, params: Any) -> jax.Array:
        decoder = bind(cfg, params)
        return jax.nn.log_softmax(decoder.logits(decoder.hidden(row)[0])[0])

    q, p = log_probs(cfg, params), log_probs(teacher_cfg, teacher)
    losses = [-jnp.take_along_axis(x, jnp.roll(row[0], -1)[:, None], 1)[:, 0] for x in (p, q)]
    return jnp.stack([jnp.sum(jnp.exp(p) * (p - q), -1), *losses])


def long_rows(job: Job, count: int, length: int) -> np.ndarray:
    """Held-out rows of this length, whose documents see each other."""
    held = packing.eval_rows(job.token_file, length, eval_tokens=job.run.eval_tokens, cross_document=True)
    return np.stack([held[i]["tokens"] for i in range(count)])


VARIANTS = [
    "as the teacher=",
    "gate=attention_output_gate=true",
    "no RoPE=attention_rope=false",
    "no RoPE from stage 2 on=attention_rope=false,align=false",
    "norms=qk_norm=true",
    "all=qk_norm=true,attention_rope=false,attention_output_gate=true",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("steps", int, 60), ("steps2", int, 120), ("seeds", int, 1), ("every", int, 4)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--train_rows", type=int, default=8)
    parser.add_argument("--train_length", type=int, default=256)
    parser.add_argument("--mixer", default="rad_rwkv7")
    parser.add_argument("--teacher")
    parser.add_argument("--text")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--scales", default="0,256,1024")
    parser.add_argument("--variant", action="append")
    arguments = parser.parse_args()
    ends = [arguments.length >> shift for shift in (2, 1, 0)]
    print("| softmax layers | a | stage 1 | " + " | ".join(f"KL to {end}" for end in ends) + " |")
    for variant in arguments.variant or VARIANTS:
        name, _, text = variant.partition("=")
        settings = {key: parsed(value) for key, _, value in (part.partition("=") for part in text.split(",") if part)}
        align = settings.pop("align", True)
        runs: dict[float, list[np.ndarray]] = {float(scale): [] for scale in arguments.scales.split(",")}
        stage1: list[tuple[float, float]] = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as workdir:
                job = job_of(arguments, seed, settings, workdir)
                teacher = job.load_teacher("float32")
                stages = ["stage1"] * (arguments.steps > 0) + ["stage2"] * (arguments.steps2 > 0)
                losses, params = trained(job, teacher, stages, align=align)
                stage1.append((losses[0], statistics.fmean(losses[-10:])))
                rows = long_rows(job, arguments.rows, arguments.length)
                for scale, found in runs.items():
                    found.append(by_place(job, scale, params, teacher, rows, ends))
        first, last = (statistics.fmean(values) for values in zip(*stage1, strict=True))
        for scale, found in runs.items():
            kl = " | ".join(f"{value:.3f}" for value in np.mean(found, axis=0)[0])
            print(f"| {name} | {scale:g} | {first:.3f} to {last:.3f} | {kl} |", flush=True)
    print(f"teacher's own loss: {np.mean(found, axis=0)[1].round(3).tolist()}")


if __name__ == "__main__":
    main()
