"""Seconds to compile every stage's step for a shallow and a deep model of the same width, and their ratio.

    python tests/measure/compile_time.py [--shallow 4] [--deep 28] [--repeats 3]

Each program is compiled anew, without a cache, in turns; printed are the medians.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp

from radlads_jax.config import Optim, StageConfig
from radlads_jax.distill.optim import make_optimizer
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.step import make_train_step
from radlads_jax.distill.train_state import TrainState
from radlads_jax.models import MIXERS
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.tree import split_params
from radlads_jax.porting.hf_config import model_config_from_hf

WIDTH = {
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def compile_seconds(stage: str, mixer: str, depth: int) -> float:
    """Seconds from the lowered step to the executable."""
    teacher_cfg = dataclasses.replace(model_config_from_hf(WIDTH | {"num_hidden_layers": depth}), dtype="float32")
    student_cfg = teacher_cfg.as_student(mixer, MIXERS[mixer].choose(teacher_cfg.hidden_size))
    optimizer = make_optimizer(StageConfig(tokens=10**9), Optim(), student_cfg)

    def loss_fn(student, teacher, batch):
        return STAGES[stage].loss_fn(student_cfg, teacher_cfg, student, teacher, batch, remat="full")

    trainable, frozen = split_params(
        abstract_params(student_cfg), lambda path: STAGES[stage].trainable(path, student_cfg)
    )
    state = jax.eval_shape(lambda params: TrainState.create(params, optimizer), trainable)
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    mask = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    batch = {"tokens": ids, "segment_ids": ids, "positions": ids, "loss_mask": mask}
    teacher = abstract_params(teacher_cfg) if STAGES[stage].needs_teacher else None
    frozen = frozen if STAGES[stage].whole_student else {}
    lowered = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0).lower(state, frozen, teacher, batch)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shallow", type=int, default=4)
    parser.add_argument("--deep", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    print(f"{'stage':8} {'student':10} {args.shallow:>5} layers {args.deep:>5} layers   ratio")
    for stage in ("stage1", "stage2", "stage3"):
        for mixer in ("rad_rwkv6", "rad_rwkv7"):
            times: dict[int, list[float]] = {args.shallow: [], args.deep: []}
            for _ in range(args.repeats):
                for depth, seconds in times.items():
                    jax.clear_caches()
                    seconds.append(compile_seconds(stage, mixer, depth))
            shallow, deep = (statistics.median(seconds) for seconds in times.values())
            print(f"{stage:8} {mixer:10} {shallow:10.2f} s {deep:10.2f} s   {deep / shallow:.2f}", flush=True)


if __name__ == "__main__":
    main()
