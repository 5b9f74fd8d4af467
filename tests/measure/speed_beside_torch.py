"""Tokens/s of every stage's step beside a plain torch loop of the same step, float32 on CPU, in one run.

    python tests/measure/speed_beside_torch.py TEACHER_DIR [--batch 4] [--seq-len 512] [--repeats 5] [--devices 1]

The torch loop is transformers' model as teacher and, as student, RAD-RWKV7 in plain torch with autograd, its recurrence
by chunks ("same"). "softmax" is a loop that has it easier: its student keeps the softmax attention (copies of the
attention modules in stage 1). All take turns on the same rows; printed are the medians and their ratios. --devices:
ours splits the rows over so many CPU devices that share the cores. Ours has the huge pages of a run. "limit": tokens/s
of the step's FLOPs alone at the rate of one large float32 matrix product, the faster of JAX's and torch's, which takes
its turns too.
"""

import argparse
import copy
import dataclasses
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from radlads_jax.config import Mesh, RunConfig, StageConfig, Teacher
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.program import StagePlan, create_state, make_step
from radlads_jax.distill.stages import STAGES
from radlads_jax.models import MIXERS, ModelConfig, sharding
from radlads_jax.models.placement import shardings
from radlads_jax.models.tree import split_params
from radlads_jax.planning.cost import model_flops
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.student import init_mixers, whole_student
from radlads_jax.system import huge_pages

Maker = Callable[[], Callable[[], None]]
# 4096 x 4096 x 4096.
PRODUCT_FLOPS = 2 * 4096**3
MIXER = "rad_rwkv7"


def configs(directory: Path, mixer: str) -> tuple[ModelConfig, ModelConfig]:
    """(student, teacher) of float32."""
    teacher = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype="float32")
    return teacher.as_student(mixer, MIXERS[mixer].choose(teacher.hidden_size)), teacher


def jax_step(stage: str, directory: Path, mixer: str, rows: np.ndarray, remat: str, devices: int) -> Callable[[], None]:
    """One call runs one optimizer step of ours."""
    jax.config.update("jax_num_cpu_devices", devices)
    student_cfg, teacher_cfg = configs(directory, mixer)
    recipe = StageConfig(tokens=10**9, batch_size=rows.shape[0], seq_len=rows.shape[1], remat=remat)
    run = RunConfig(
        teacher=Teacher(path=str(directory), dtype="float32"), dtype="float32", mesh=Mesh(data=devices, fsdp=1)
    )
    run = dataclasses.replace(run, stages=(stage,), **{stage: recipe})
    mesh = mesh_lib.make_mesh(run)
    teacher = load_params(directory, teacher_cfg, dtype="float32")
    student = init_mixers(student_cfg, teacher, 0)
    if STAGES[stage].whole_student:
        student = whole_student(student_cfg, jax.tree.map(jnp.copy, teacher), student)
    plan = StagePlan(run, stage, student_cfg, teacher_cfg, mesh)
    params, frozen = split_params(student, plan.trains)
    if mesh is not None:
        params, frozen, teacher = (
            jax.device_put(x, shardings(mesh, x, cfg))
            for x, cfg in ((params, student_cfg), (frozen, student_cfg), (teacher, teacher_cfg))
        )
    step = make_step(plan)
    state = create_state(plan, params)
    mask = np.ones(rows.shape, np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
    batch = {"tokens": rows, "segment_ids": np.ones_like(rows), "positions": positions, "loss_mask": mask}
    batch = sharding.place_rows(mesh, batch, rows.shape[0])

    def run_step() -> None:
        nonlocal state
        state, metrics = step(state, frozen, teacher if STAGES[stage].needs_teacher else None, batch)
        assert np.isfinite(metrics["loss"])

    return run_step


def product(library: str) -> Callable[[], None]:
    """One call runs PRODUCT_FLOPS in one float32 matrix product."""
    size = round((PRODUCT_FLOPS / 2) ** (1 / 3))
    if library == "torch":
        x = torch.ones(size, size)
        return lambda: (x @ x, None)[1]
    y, multiply = jnp.ones((size, size)), jax.jit(jnp.matmul)
    return lambda: (multiply(y, y).block_until_ready(), None)[1]


class TorchRwkv7(torch.nn.Module):
    """RAD-RWKV7's mixer, with the attention module's signature; `shared` carries v_first between the layers."""

    def __init__(self, attention: torch.nn.Module, config, shared: dict):
        super().__init__()
        self.shared, self.is_first = shared, attention.layer_idx == 0
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = attention.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            copy.deepcopy(getattr(attention, f"{p}_proj")).requires_grad_(True) for p in "qkvo"
        )
        size, width = self.heads * self.head_dim, config.hidden_size
        ranks = MIXERS["rad_rwkv7"].choose(width)
        for name, rank in (
            ("w", ranks.rank_decay),
            ("a", ranks.rank_iclr),
            ("v", ranks.rank_value),
            ("g", ranks.rank_gate),
        ):
            setattr(self, f"{name}0", torch.nn.Parameter(torch.zeros(size)))
            setattr(self, f"{name}1", torch.nn.Parameter(torch.zeros(width, rank)))
            setattr(self, f"{name}2", torch.nn.Parameter(0.1 * torch.randn(rank, size)))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads * K] -> [B, heads, T, K], repeated to all heads."""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return x.repeat_interleave(self.heads // x.shape[1], dim=1)

    def forward(self, hidden_states, position_embeddings, **_):
        x, (cos, sin) = hidden_states, (table[:, None] for table in position_embeddings)

        def rotate(y):
            first, second = y.chunk(2, -1)
            return y * cos + torch.cat([-second, first], -1) * sin

        r, k, v = rotate(self.split(self.q_proj(x))), rotate(self.split(self.k_proj(x))), self.split(self.v_proj(x))
        log_w = -math.exp(-0.5) * torch.sigmoid(self.split(self.w0 + torch.tanh(x @ self.w1) @ self.w2))
        iclr = torch.sigmoid(self.split(self.a0 + x @ self.a1 @ self.a2))
        if self.is_first:
            self.shared["v_first"] = v
        else:
            v = v + (self.shared["v_first"] - v) * torch.sigmoid(self.split(self.v0 + x @ self.v1 @ self.v2))
        kk = torch.nn.functional.normalize(k, dim=-1)
        out = torch_wkv7(r, log_w, k * (1 - log_w.exp() + iclr), v, -kk, kk * iclr) * self.head_dim**-0.5
        out = out.transpose(1, 2).flatten(2) * (torch.sigmoid(x @ self.g1) @ self.g2)
        return self.o_proj(out), None


def torch_wkv7(r, log_w, k, v, a, b, size: int = 32):
    """The recurrence by chunks of `size` tokens, [B, H, T, K] float32: DESIGN's algebra as one writes it in torch."""
    total = log_w.unflatten(2, (-1, size)).cumsum(3)
    r, log_w, k, v, a, b = (x.unflatten(2, (-1, size)) for x in (r, log_w, k, v, a, b))
    r, a, k, b = r * total.exp(), a * (total - log_w).exp(), k * (-total).exp(), b * (-total).exp()
    eye = torch.eye(size)
    inverse = torch.linalg.solve_triangular(eye - (a @ b.mT).tril(-1), eye, upper=False, unitriangular=True)
    from_keys, read_b, read_k = (a @ k.mT).tril(-1) @ v, (r @ b.mT).tril(), (r @ k.mT).tril() @ v
    end = total[..., -1, :, None].exp()
    state, outs = torch.zeros(*r.shape[:2], r.shape[-1], v.shape[-1]), []
    for n in range(r.shape[2]):
        u = inverse[:, :, n] @ (a[:, :, n] @ state + from_keys[:, :, n])
        outs.append(r[:, :, n] @ state + read_b[:, :, n] @ u + read_k[:, :, n])
        state = end[:, :, n] * (state + b[:, :, n].mT @ u + k[:, :, n].mT @ v[:, :, n])
    return torch.stack(outs, 2).flatten(2, 3)


def torch_step(stage: str, directory: Path, rows: np.ndarray, student: str) -> Callable[[], None]:
    """One call runs one optimizer step of the torch loop; student: "same" or "softmax"."""
    teacher = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    teacher.requires_grad_(False)
    tokens, shared = torch.tensor(rows, dtype=torch.long), {}

    def mixer(attention: torch.nn.Module) -> torch.nn.Module:
        if student == "same":
            return TorchRwkv7(attention, teacher.config, shared)
        return copy.deepcopy(attention).requires_grad_(True)

    if stage == "stage1":
        trained = torch.nn.ModuleList(mixer(layer.self_attn) for layer in teacher.model.layers)
        loss = _torch_alignment(teacher, trained, tokens)
    else:
        trained = copy.deepcopy(teacher).requires_grad_(True)
        trained.lm_head.weight = torch.nn.Parameter(trained.lm_head.weight.clone())
        for layer in trained.model.layers:
            layer.self_attn = mixer(layer.self_attn)
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


def medians(makers: dict[str, Maker], repeats: int, environments: dict[str, dict[str, str]]) -> dict[str, float]:
    """Median seconds of each step in the midst of its training, taken in turns; environments: what some have besides.

    Each lives in a process of its own: the idle threads of one library slow the other down where they share one.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, make in makers.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, make), daemon=True))
        with unittest.mock.patch.dict(os.environ, environments.get(name, {})):
            processes[-1].start()
        theirs.close()
        pipes[name].recv()  # the turn that compiles
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(repeats):
        for name, pipe in pipes.items():
            try:
                pipe.send("step")
                times[name].append(pipe.recv())
            except (EOFError, BrokenPipeError):
                raise RuntimeError(f"the process of {name} ended; all of them together may need more memory") from None
    for process in processes:
        process.terminate()
        process.join()
    return {name: statistics.median(values) for name, values in times.items()}


def serve(pipe: multiprocessing.connection.Connection, make: Maker) -> None:
    """A process that runs two steps, and tells the second's seconds, whenever it is asked.

    The first takes back the memory that the system took from an idle process, as no step of a training has to.
    """
    run = make()
    while True:
        run()
        start = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - start)
        pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", default="none", choices=["none", "dots", "full"])
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--stages", default="stage1,stage2,stage3")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    vocab = read_config(args.teacher)["vocab_size"]
    rows = rng.integers(0, vocab, (args.batch, args.seq_len)).astype(np.int32)
    threads, both = torch.get_num_threads(), configs(args.teacher, MIXER)
    print(f"{MIXER}, {args.batch} rows of {args.seq_len}, float32, {threads} torch threads, {args.devices} JAX devices")
    print(f"{'tokens/s':8} {'ours':>8} {'same':>8} {'softmax':>8} {'limit':>8} {'ours/same':>10} {'ours/softmax':>13}")
    for stage in args.stages.split(","):
        makers: dict[str, Maker] = {
            "ours": functools.partial(jax_step, stage, args.teacher, MIXER, rows, args.remat, args.devices)
        }
        for student in ("same", "softmax"):
            makers[student] = functools.partial(torch_step, stage, args.teacher, rows, student)
        for library in ("jax", "torch"):
            makers[library] = functools.partial(product, library)
        seconds = medians(makers, args.repeats, {"ours": huge_pages.setting()})
        ours, same, softmax = (rows.size / seconds[name] for name in ("ours", "same", "softmax"))
        rate = PRODUCT_FLOPS / min(seconds["jax"], seconds["torch"])
        limit = rate / model_flops(*both, stage, args.seq_len)
        speeds = " ".join(f"{speed:8.0f}" for speed in (ours, same, softmax, limit))
        print(f"{stage:8} {speeds} {ours / same:10.2f} {ours / softmax:13.2f}", flush=True)


if __name__ == "__main__":
    main()
