"""Tokens/s of decoding at several contexts: a student of ours in JAX and as its exported torch model, beside
transformers' softmax model, float32 on CPU.

    python tests/measure/decode_speed.py TEACHER_DIR [--contexts 128,4096,32768] [--mixer rad_rwkv7]
                                         [--attention_every 0] [--tokens 16] [--turns 5]

The student has fresh weights and the teacher's shape: they change no time. Contexts are not read but made up, as random
states, keys and values of the size they have after so many tokens; an exported hybrid alone reads them, and every turn
adds to them. torch runs with one thread and with one a core, and its better figure counts. All take turns in one
process; printed are the medians of the turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from radlads_jax.config import RunConfig
from radlads_jax.decoding.loop import BLOCK, Sequences, decode, empty_sequences, unrolled
from radlads_jax.decoding.writer import memory_line
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models import ModelConfig, init_params
from radlads_jax.models.state import grows
from radlads_jax.models.tree import Params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.save import save_params
from radlads_jax.student import Student

Runs = dict[str, Callable[[], None]]


def make_student(directory: Path, student: Student) -> tuple[ModelConfig, Params]:
    """A fresh student of the teacher's shape."""
    run = RunConfig(dtype="float32", student=student)
    cfg = unrolled(make_student_config(model_config_from_hf(read_config(directory)), run))
    return cfg, jax.jit(lambda: init_params(cfg, 0))()


def ours(cfg: ModelConfig, params: Params, contexts: list[int], tokens: int) -> Runs:
    """A call each that makes `tokens` tokens after a context."""
    for context in contexts:
        print(f"{context:6}: {memory_line(cfg, context)}")

    def run(context: int) -> None:
        sequences = empty_sequences(cfg, 1, context + tokens)
        state = jax.tree.map(lambda x: x + 0.1 if x.ndim > 3 else x, sequences.state)
        state["segment_ids"] = jnp.ones_like(state["segment_ids"])
        sequences = Sequences(state | {"length": jnp.asarray(context)}, jnp.full((1,), context, jnp.int32))
        unread = np.ones((1, 1), np.int32)
        for start in range(0, tokens, BLOCK):
            unread, sequences = decode(cfg, params, sequences, unread[:, -1:], steps=min(BLOCK, tokens - start))

    return {f"ours {context}": lambda context=context: run(context) for context in contexts}


def exported(directory: Path, cfg: ModelConfig, params: Params, contexts: list[int], tokens: int) -> Runs:
    """The same with the torch model of the student's export."""
    with tempfile.TemporaryDirectory() as written:
        export = save_params(params, cfg, Path(written) / "export", base_config=read_config(directory), dtype="float32")
        model = load_torch(export, trust_remote_code=True)
    reads = grows(cfg)

    def after(context: int) -> transformers.Cache:
        prompt = torch.ones(1, context if reads else 1, dtype=torch.long)
        with torch.inference_mode():
            cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        for layer in () if reads else cache.layers:
            layer.length = context
        return cache

    return torch_runs("exported", model, {context: after(context) for context in contexts}, tokens)


def theirs(directory: Path, contexts: list[int], tokens: int) -> Runs:
    """The same with transformers' softmax model."""
    model = load_torch(directory)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def filled(context: int) -> transformers.Cache:
        cache = transformers.DynamicCache(config=config)
        shape = (1, config.num_key_value_heads, context, head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(0.1 * torch.randn(shape), torch.randn(shape), layer)
        return cache

    return torch_runs("theirs", model, {context: filled(context) for context in contexts}, tokens)


def load_torch(directory: Path, **options: Any) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()


def torch_runs(
    name: str, model: transformers.PreTrainedModel, caches: dict[int, transformers.Cache], tokens: int
) -> Runs:
    """A call for every context and number of threads; keys and values forget its tokens, a state's size is the same."""

    @torch.inference_mode()
    def run(context: int, threads: int) -> None:
        torch.set_num_threads(threads)
        token, cache = torch.ones(1, 1, dtype=torch.long), caches[context]
        for _ in range(tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        if name == "theirs":
            cache.crop(-tokens)

    threads = sorted({1, len(os.sched_getaffinity(0))})
    return {f"{name} {c} {n}": lambda c=c, n=n: run(c, n) for c in caches for n in threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--contexts", default="128,4096,32768")
    parser.add_argument("--longest_cache", type=int, default=4096, help="longer contexts are run with ours alone")
    parser.add_argument("--mixer", default="rad_rwkv7", choices=["rad_rwkv6", "rad_rwkv7", "gdn"])
    parser.add_argument("--attention_every", type=int, default=0, help="softmax layers where (i + 1) %% N == 0")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",")]
    cfg, params = make_student(args.teacher, Student(args.mixer, attention_every=args.attention_every))
    cached = [c for c in contexts if c <= args.longest_cache]
    runs = ours(cfg, params, contexts, args.tokens) | theirs(args.teacher, cached, args.tokens)
    runs |= exported(args.teacher, cfg, params, cached if grows(cfg) else contexts, args.tokens)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    speeds = {name: args.tokens / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{args.mixer}, medians of {args.turns} turns of {args.tokens} tokens, load {os.getloadavg()[0]:.1f}")
    print(f"{'context':>8} {'ours':>8} {'exported':>8} {'ratio':>6} {'theirs':>8} {'ratio':>6}   (tokens/s)")
    for context in contexts:
        line = f"{context:8} {(best := speeds[f'ours {context}']):8.1f}"
        for other in ("exported", "theirs"):
            beside = [speed for name, speed in speeds.items() if name.split()[:2] == [other, str(context)]]
            line += f" {max(beside):8.1f} {best / max(beside):6.2f}" if beside else ""
        print(line)


if __name__ == "__main__":
    main()
