"""What a teacher's stored logits cost and give beside the teacher itself, in stage 2 of the demo's conversion.

JAX_PLATFORMS=cpu python tests/measure/stored_logits.py [--steps 40] [--documents 1500] [--top_k 64 8]

The demo's teacher and data, batches of 4 x 256 tokens, seed 0, float32. Prints, for the live teacher and for every k:
seconds to store and bytes a token, tokens/s of stage 2 without compilation, the bytes of the teacher that lie in memory
beside it, and the KL to the live teacher on held-out rows afterwards.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time

import jax

# No installed package has it.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from configs import demo
from radlads_jax.config import validate
from radlads_jax.distill.program import create_state, make_step
from radlads_jax.models.tree import merge_params, split_params
from radlads_jax.run import heldout, storing
from radlads_jax.run.job import Job, make_job
from radlads_jax.run.train import student_after

ROWS, TOKENS, HELD_OUT = 4, 256, 16


def job_of(place: pathlib.Path, steps: int, documents: int, **teacher) -> Job:
    config = demo.get_config()
    config.stages, config.data.documents, config.data.eval_rows = ("stage2",), documents, HELD_OUT
    recipe = config.stage2
    recipe.seq_len, recipe.batch_size, recipe.tokens = TOKENS, ROWS, ROWS * TOKENS * steps
    config.update_from_flattened_dict({f"teacher.{name}": value for name, value in teacher.items()})
    return make_job(validate(config), place)


def trained(job: Job) -> tuple[float, int, float]:
    """(tokens/s, bytes of the teacher in memory while stage 2 trains, KL on held-out rows after it)."""
    plan, teacher = job.stage_plan("stage2"), job.load_teacher(job.run.teacher.dtype)
    params, frozen = split_params(student_after(job, (), teacher, whole=True), plan.trains)
    weights = teacher if plan.needs_weights else None
    state, step, batches = create_state(plan, params), make_step(plan), job.batches("stage2")
    begun = 0.0
    for number in range(plan.recipe.steps):
        state, metrics = step(state, frozen, weights, next(batches))
        if number == 0:
            jax.block_until_ready(metrics)
            begun = time.monotonic()
    jax.block_until_ready(state)
    pace = (plan.recipe.steps - 1) * ROWS * TOKENS / (time.monotonic() - begun)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    scores = heldout.evaluate_job(job, job.student, merge_params(state.params, frozen), teacher)
    return pace, held, scores["student"]["kl"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--top_k", type=int, nargs="+", default=[64, 8])
    options = parser.parse_args()
    print("| teacher | s to store | bytes a token | tokens/s | its bytes in memory | held-out KL |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        sizes = (place / "run", options.steps, options.documents)
        pace, held, kl = trained(job_of(*sizes))
        print(f"| live | | | {pace:,.0f} | {held:,} | {kl:.4f} |", flush=True)
        for k in options.top_k:
            job, begun = job_of(*sizes, top_k=k), time.monotonic()
            stored = storing.store(job, place / f"top{k}", "float16")
            seconds = time.monotonic() - begun
            size = stored.num_bytes / (stored.num_rows * TOKENS)
            chosen = {"logits": str(place / f"top{k}"), "top_k": k}
            pace, held, kl = trained(dataclasses.replace(job_of(*sizes, **chosen), workdir=place / f"run{k}"))
            print(f"| top {k} | {seconds:.0f} | {size:.0f} | {pace:,.0f} | {held:,} | {kl:.4f} |", flush=True)


if __name__ == "__main__":
    main()
