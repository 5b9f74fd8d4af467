"""Tokens/s of every stage's step beside a plain torch loop of the same step, float32 on CPU, in one run.

    python tests/speed_beside_torch.py TEACHER_DIR [--student rad_rwkv7] [--batch 4] [--seq-len 512] [--repeats 5]

The torch loop is transformers' model for the teacher and, as student, the same model with its softmax attention
(copies of the attention modules in stage 1): a recurrence in plain torch would only be slower. Both take turns on the
same rows; printed are the medians and their ratio.
"""

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from radlads_jax.config import Optim, StageConfig
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.step import make_train_step
from radlads_jax.models import MixerConfig
from radlads_jax.optim import make_optimizer
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.student import init_mixers, whole_student
from radlads_jax.train_state import TrainState, split_params


def jax_step(stage: str, directory: Path, mixer: str, rows: np.ndarray, remat: str) -> Callable[[], None]:
    """One call runs one optimizer step of ours."""
    teacher_cfg = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype="float32")
    student_cfg = teacher_cfg.as_student(mixer, MixerConfig.for_student(mixer, teacher_cfg.hidden_size))
    teacher = load_params(directory, teacher_cfg, dtype="float32")
    student = init_mixers(student_cfg, teacher, 0)
    if STAGES[stage].whole_student:
        student = whole_student(student_cfg, jax.tree.map(jnp.copy, teacher), student)
    params, frozen = split_params(student, lambda path: STAGES[stage].trainable(path, student_cfg))
    optimizer = make_optimizer(StageConfig(tokens=10**9), Optim())

    def loss_fn(student, teacher, batch):
        return STAGES[stage].loss_fn(student_cfg, teacher_cfg, student, teacher, batch, remat=remat)

    step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
    state = TrainState.create(params, optimizer)
    mask = np.ones(rows.shape, np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    batch = {"tokens": rows, "segment_ids": np.ones_like(rows), "positions": positions, "loss_mask": mask}

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, teacher if STAGES[stage].needs_teacher else None, batch)
        assert np.isfinite(metrics["loss"])

    return run


def torch_step(stage: str, directory: Path, rows: np.ndarray) -> Callable[[], None]:
    """One call runs one optimizer step of the torch loop."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    teacher.requires_grad_(False)
    tokens = torch.tensor(rows, dtype=torch.long)
    if stage == "stage1":
        trained = torch.nn.ModuleList(copy.deepcopy(layer.self_attn) for layer in teacher.model.layers)
        trained.requires_grad_(True)
        loss = _torch_alignment(teacher, trained, tokens)
    else:
        trained = copy.deepcopy(teacher).requires_grad_(True)
        trained.lm_head.weight = torch.nn.Parameter(trained.lm_head.weight.clone())
        loss = _torch_kl(teacher, trained, tokens) if stage == "stage2" else _torch_cross_entropy(trained, tokens)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()

    return run


def _torch_alignment(teacher, trained, tokens):
    captured: list = []
    for layer, module in zip(teacher.model.layers, trained, strict=True):

        def hook(_, args, kwargs, output, module=module):
            captured.append((module(*args, **kwargs)[0] - output[0]).norm(dim=-1).mean())

        layer.self_attn.register_forward_hook(hook, with_kwargs=True)

    def loss():
        captured.clear()
        teacher.model(tokens, use_cache=False)
        return torch.stack(captured).mean() * teacher.config.hidden_size**-0.5

    return loss


def _torch_kl(teacher, student, tokens):
    def loss():
        with torch.no_grad():
            target = torch.log_softmax(teacher(tokens, use_cache=False).logits, -1)
        logs = torch.log_softmax(student(tokens, use_cache=False).logits, -1)
        return torch.nn.functional.kl_div(logs, target, log_target=True, reduction="none").sum(-1).mean()

    return loss


def _torch_cross_entropy(student, tokens):
    def loss():
        logits = student(tokens, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def medians(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one call that compiles."""
    for run in steps.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--student", default="rad_rwkv7", choices=["rad_rwkv6", "rad_rwkv7"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full"])
    parser.add_argument("--stages", default="stage1,stage2,stage3")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    vocab = read_config(args.teacher)["vocab_size"]
    rows = rng.integers(0, vocab, (args.batch, args.seq_len)).astype(np.int32)
    print(f"{args.student}, {args.batch} rows of {args.seq_len}, float32, {torch.get_num_threads()} torch threads")
    print(f"{'stage':8} {'ours tok/s':>12} {'torch tok/s':>12} {'ratio':>7}")
    for stage in args.stages.split(","):
        steps = {
            "ours": jax_step(stage, args.teacher, args.student, rows, args.remat),
            "torch": torch_step(stage, args.teacher, rows),
        }
        seconds = medians(steps, args.repeats)
        ours, theirs = (rows.size / seconds[name] for name in ("ours", "torch"))
        print(f"{stage:8} {ours:12.0f} {theirs:12.0f} {ours / theirs:7.2f}", flush=True)


if __name__ == "__main__":
    main()
