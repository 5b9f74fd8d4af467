"""Tokens/s of decoding at several contexts, a student of ours beside transformers' softmax model, float32 on CPU.

    python tests/decode_speed.py TEACHER_DIR [--contexts 128,4096,32768] [--mixer rad_rwkv7] [--tokens 16] [--turns 5]

The student has fresh weights and the teacher's shape: they change no time. Contexts are not read but made up, as random
states, keys and values of the size they have after so many tokens. transformers runs with one torch thread and with one
a core, and its better figure counts. All take turns in one process; printed are the medians of the turns.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from radlads_jax.decoding.loop import BLOCK, Sequences, decode, empty_sequences, unrolled
from radlads_jax.generate import memory_line
from radlads_jax.models import MixerConfig, init_params
from radlads_jax.porting import model_config_from_hf, read_config


def ours(directory: Path, mixer: str, contexts: list[int], tokens: int) -> dict[str, Callable[[], None]]:
    """A call each that makes `tokens` tokens after a context."""
    teacher = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype="float32")
    cfg = unrolled(teacher.as_student(mixer, MixerConfig.for_student(mixer, teacher.hidden_size)))
    params = jax.jit(lambda: init_params(cfg, 0))()
    for context in contexts:
        print(f"{context:6}: {memory_line(cfg, context)}")

    def run(context: int) -> None:
        sequences = empty_sequences(cfg, 1, context)
        state = jax.tree.map(lambda x: x + 0.1 if x.ndim > 3 else x, sequences.state)
        state["segment_ids"] = jnp.ones_like(state["segment_ids"])
        sequences = Sequences(state | {"length": jnp.asarray(context)}, jnp.full((1,), context, jnp.int32))
        unread = np.ones((1, 1), np.int32)
        for start in range(0, tokens, BLOCK):
            unread, sequences = decode(cfg, params, sequences, unread[:, -1:], steps=min(BLOCK, tokens - start))

    return {f"ours {context}": lambda context=context: run(context) for context in contexts}


def theirs(directory: Path, contexts: list[int], tokens: int) -> dict[str, Callable[[], None]]:
    """The same with transformers' model, at every number of threads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def filled(context: int) -> transformers.DynamicCache:
        cache = transformers.DynamicCache(config=config)
        shape = (1, config.num_key_value_heads, context, head_dim)
        for layer in range(config.num_hidden_layers):
            cache.update(0.1 * torch.randn(shape), torch.randn(shape), layer)
        return cache

    caches = {context: filled(context) for context in contexts}

    @torch.inference_mode()
    def run(context: int, threads: int) -> None:
        torch.set_num_threads(threads)
        token, cache = torch.ones(1, 1, dtype=torch.long), caches[context]
        for _ in range(tokens):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-tokens)

    threads = sorted({1, os.cpu_count() or 1})
    return {f"theirs {c} {n}": lambda c=c, n=n: run(c, n) for c in contexts for n in threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--contexts", default="128,4096,32768")
    parser.add_argument("--longest_cache", type=int, default=4096, help="longer contexts are run with ours alone")
    parser.add_argument("--mixer", default="rad_rwkv7", choices=["rad_rwkv6", "rad_rwkv7"])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    contexts = [int(c) for c in args.contexts.split(",")]
    runs = ours(args.teacher, args.mixer, contexts, args.tokens)
    runs |= theirs(args.teacher, [c for c in contexts if c <= args.longest_cache], args.tokens)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    speeds = {name: args.tokens / statistics.median(seconds) for name, seconds in times.items()}
    print(f"{args.mixer}, medians of {args.turns} turns of {args.tokens} tokens, load {os.getloadavg()[0]:.1f}")
    print(f"{'context':>8} {'ours':>8} {'theirs':>8} {'ratio':>6}   (tokens/s)")
    for context in contexts:
        found = [speed for name, speed in speeds.items() if name.split()[:2] == ["theirs", str(context)]]
        line = f"{context:8} {speeds[f'ours {context}']:8.1f}"
        print(line + (f" {max(found):8.1f} {speeds[f'ours {context}'] / max(found):6.2f}" if found else ""))


if __name__ == "__main__":
    main()
