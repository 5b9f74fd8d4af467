"""How near the student comes to its teacher: losses and agreement on held-out rows, and text from both."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pallas_kernels.linear_loss import linear_stats
from pallas_kernels.sharded import constrain
from radlads_jax.config import Export
from radlads_jax.data import pipeline
from radlads_jax.decoding.loop import generate_greedy, left_padded
from radlads_jax.decoding.text_stream import text_after
from radlads_jax.distill.losses import Batch, next_tokens, read_rows
from radlads_jax.models import ModelConfig, bind, sharding
from radlads_jax.models.tree import Params
from radlads_jax.models.window import untrained_control
from radlads_jax.run.answers import answer_scores, answers_table
from radlads_jax.run.job import Job
from radlads_jax.system import hosts, storage
from radlads_jax.system.untrusted import brief

# Of a score while training, how long it took.
SECONDS = "heldout_seconds"
# Nats: what rounding makes of no KL at all.
_SAME = 1e-6


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_sums(
    student_cfg: ModelConfig, teacher_cfg: ModelConfig | None, student: Params, teacher: Params | None, batch: Batch
) -> dict[str, jax.Array]:
    """linear_stats' sums over the batch's tokens that have a next one in their segment, and "tokens", their number."""
    decoder = bind(student_cfg, student)
    kernel, layout = decoder.head_kernel()
    hidden = read_rows(decoder, batch)
    weights = batch["loss_mask"].reshape(-1)
    options: dict[str, Any] = {"kernel_layout": layout}
    if teacher_cfg is not None and teacher is not None:
        frozen = bind(teacher_cfg, teacher)
        teacher_hidden = read_rows(frozen, batch)
        teacher_kernel, options["teacher_kernel_layout"] = frozen.head_kernel()
        options |= {"teacher_hidden": teacher_hidden, "teacher_kernel": teacher_kernel.astype(teacher_hidden.dtype)}
    targets = next_tokens(batch["tokens"]).reshape(-1)
    sums = linear_stats(hidden, kernel.astype(hidden.dtype), targets, weights, **options)
    # On every device, so that every process can read them.
    return jax.tree.map(constrain, sums | {"tokens": weights.sum()})


def evaluate(
    student_cfg: ModelConfig,
    student: Params,
    batches: Sequence[Mapping[str, np.ndarray]],
    batch_size: int,
    teacher_cfg: ModelConfig | None = None,
    teacher: Params | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Means per token: {"student": {loss, top1, kl, agreement}, "teacher": {loss, top1}, "relative_top1", "tokens"}.

    top1: share of tokens whose most likely next one is right; agreement: on which both models' are the same;
    relative_top1: None where the teacher is never right. Without a teacher only the student's loss and top1. Raises
    ValueError where no held-out token has a next one.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        placed = sharding.place_rows(mesh, batch, batch_size)
        on_device = {name: jnp.asarray(rows) for name, rows in placed.items()}
        with sharding.traced_over(mesh):
            sums = jax.device_get(_batch_sums(student_cfg, teacher_cfg, student, teacher, on_device))
        totals = {k: totals.get(k, 0.0) + float(v) for k, v in sums.items()}
    tokens = totals.pop("tokens")
    if tokens == 0:
        raise ValueError("the held-out rows hold no token with a next one; expected some. Raise config.data.eval_rows.")
    means = {k: v / tokens for k, v in totals.items()}
    result: dict[str, Any] = {"student": {k: v for k, v in means.items() if not k.startswith("teacher_")}}
    if teacher_cfg is not None:
        result["teacher"] = {k: means[f"teacher_{k}"] for k in ("loss", "top1")}
        result["relative_top1"] = means["top1"] / means["teacher_top1"] if means["teacher_top1"] else None
    return result | {"tokens": int(tokens)}


def continue_prompts(
    cfg: ModelConfig,
    params: Params,
    tokenizer: Any,
    prompts: tuple[str, ...],
    new_tokens: int,
    beginning: tuple[int, ...] = (),
) -> list[str]:
    """The greedy continuation of every prompt, begun as documents are, cut at the end-of-text token."""
    ids = [[*beginning, *prompt_tokens(tokenizer, prompt)] for prompt in prompts]
    out = generate_greedy(cfg, params, left_padded(ids), new_tokens).tolist()
    end = tokenizer.eos_token_id
    new = [row[: row.index(end)] if end in row else row for row in out]
    return [text_after(tokenizer, prompt, row) for prompt, row in zip(ids, new, strict=True)]


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens that a sample continues."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def samples_page(prompts: tuple[str, ...], texts: dict[str, list[str]]) -> str:
    """Markdown with each prompt's continuations side by side."""
    lines = ["# Samples", ""]
    for i, prompt in enumerate(prompts):
        lines += [f"## {i + 1}", "", f"> {prompt}", ""]
        lines += [f"**{name}**: {continuations[i].strip()}\n" for name, continuations in texts.items()]
    return "\n".join(lines)


def exported_student(options: Export, cfg: ModelConfig, student: Params) -> tuple[ModelConfig, Params]:
    """The student as its export has it, rounded and without the head that is left out, in the dtype it is used in."""
    if options.retie and not cfg.tie_embeddings:
        student = {name: part for name, part in student.items() if name != "head"}
        cfg = dataclasses.replace(cfg, tie_embeddings=True)
    return cfg, jax.tree.map(lambda x: x.astype(options.dtype).astype(cfg.dtype), student)


def batches(job: Job) -> Sequence[Mapping[str, np.ndarray]]:
    """The job's held-out rows."""
    run = job.run
    return pipeline.make_eval_batches(
        job.token_file,
        seq_len=run.eval_tokens // run.data.eval_rows,
        batch_size=run.train.eval_batch_size,
        eval_tokens=run.eval_tokens,
        cross_document=run.data.cross_document,
        rows_of_batch=sharding.own_rows(job.mesh, run.train.eval_batch_size),
    )


def evaluate_job(job: Job, cfg: ModelConfig, student: Params, teacher: Params | None) -> dict[str, Any]:
    """`evaluate` on the job's held-out rows. cfg: the student's, as it is exported."""
    rows = job.run.train.eval_batch_size
    if teacher is None:
        return evaluate(cfg, student, batches(job), rows, mesh=job.mesh)
    return evaluate(cfg, student, batches(job), rows, job.teacher, teacher, job.mesh)


def evaluate_in_training(job: Job, student: Params, teacher: Params | None) -> dict[str, float]:
    """The student's scores as metrics of a step, "heldout_kl" and so on; its weights are not rounded for export yet.

    Without a teacher its loss and top-1 alone; NaN for what is relative to a teacher that is never right. Of answers in
    tales, where the job asks for some, the shares that are right: "heldout_facts_recalled" and so on.
    """
    scores = evaluate_job(job, job.student, student, teacher)
    relative = {"relative_top1": scores["relative_top1"]} if "relative_top1" in scores else {}
    values = scores["student"] | relative
    if job.run.train.answer_tales:
        answers = answer(job, {"student": (job.student, student)})["scores"]
        values |= {score["what"].replace(" ", "_"): score["student"] for score in answers}
    return {f"heldout_{name}": math.nan if value is None else value for name, value in values.items()}


def answer(job: Job, models: Mapping[str, tuple[ModelConfig, Params]]) -> dict[str, Any]:
    """`answer_scores` of these models in the job's tales."""
    return answer_scores(
        models,
        job.tokenizer,
        job.run.train.answer_tales,
        seed=job.run.data.seed,
        beginning=job.beginning,
        batch_size=job.run.train.eval_batch_size,
        mesh=job.mesh,
    )


def in_words(scores: Mapping[str, float]) -> str:
    """What `evaluate_in_training` found."""
    words = {"loss": "loss {:.4f}", "kl": "KL {:.4f}", "relative_top1": "top-1 {:.2%} of the teacher's"}
    said = [text.format(scores[f"heldout_{name}"]) for name, text in words.items() if f"heldout_{name}" in scores]
    recalled = scores.get("heldout_facts_recalled")
    return f"on held-out text: {', '.join(said)}" + ("" if recalled is None else f"; {recalled:.1%} of tales' facts")


def control_of(job: Job, teacher: Params | None) -> dict[str, tuple[ModelConfig, Params]]:
    """The untrained control by its name, "control"; empty where there is none.

    That is where the student is not converted, or the teacher is none of softmax attention alone.
    """
    if teacher is None or job.student.recurrent_mixer is None or job.teacher.recurrent_mixer is not None:
        return {}
    return {"control": (untrained_control(job.teacher, job.student), teacher)}


def evaluate_control(job: Job, teacher: Params | None) -> dict[str, Any]:
    """{"control": {loss, top1, kl, agreement, relative_top1}} of the untrained control, if any, on the same rows."""
    found = {}
    for name, (cfg, params) in control_of(job, teacher).items():
        rows = job.run.train.eval_batch_size
        scores = evaluate(cfg, params, batches(job), rows, job.teacher, teacher, mesh=job.mesh)
        found[name] = scores["student"] | {"relative_top1": scores["relative_top1"]}
    return found


def write_samples(job: Job, models: Mapping[str, tuple[ModelConfig, Params]]) -> list[dict[str, str]]:
    """Continues the job's prompts by every model, into DIR/samples.md; of each {"prompt", model's name: text}."""
    prompts, train = job.run.train.sample_prompts, job.run.train
    texts = {
        name: continue_prompts(cfg, params, job.tokenizer, prompts, train.sample_tokens, job.beginning)
        for name, (cfg, params) in models.items()
    }
    if hosts.is_first():
        storage.write_text(job.workdir / "samples.md", samples_page(prompts, texts))
    return [{"prompt": prompt} | {name: text[i] for name, text in texts.items()} for i, prompt in enumerate(prompts)]


def results_table(summary: dict[str, Any]) -> Group:
    """The stages and the student beside its teacher, for a terminal."""
    stages = Table(title="Stages", title_justify="left")
    for column in ("stage", "steps", "tokens", "tokens/s", "first loss", "last loss"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    for line in summary["stages"]:
        speed = "" if line["tokens_per_second"] is None else f"{line['tokens_per_second']:,.0f}"
        losses = ("" if line[k] is None else f"{line[k]:.4f}" for k in ("first_loss", "last_loss"))
        stages.add_row(line["name"], f"{line['steps']:,}", f"{line['tokens']:,}", speed, *losses)
    if "earlier" in summary:
        stages.caption = f"the mixers began as {summary['earlier']['tokens']:,} tokens of an earlier stage 1 left them"
        stages.caption_justify = "left"
    scores = Table(title=f"Held-out text ({summary['tokens']:,} tokens)", title_justify="left")
    for column in ("", "loss", "top-1", "KL to teacher", "agreement", "top-1 relative"):
        scores.add_column(column, justify="right" if column else "left")
    for name in ("teacher", "control", "student"):
        if name not in summary:
            continue
        values = summary[name]
        row = [f"{values['loss']:.4f}", f"{values['top1']:.2%}"]
        if "kl" in values:
            relative = values.get("relative_top1", summary["relative_top1"])
            row += [f"{values['kl']:.4f}", f"{values['agreement']:.2%}", _percent(relative)]
        scores.add_row(name, *row)
    if "control" in summary:
        worse = summary["student"]["kl"] > summary["control"]["kl"]
        scores.caption = "control: the teacher itself, untrained, with a window of keys in the converted layers"
        if summary["control"]["kl"] < _SAME:
            scores.caption += ", which takes nothing from rows as short as these"
        elif worse:
            scores.caption += ". The student is further from its teacher than that."
        scores.caption_justify = "left"
    samples = [
        f"\n[bold]{_on_a_line(s['prompt'])}[/bold]\n"
        + "\n".join(f"  {name}: {_on_a_line(s[name])}" for name in ("teacher", "student") if name in s)
        for s in summary.get("samples", [])
    ]
    answers = [answers_table(summary["answers"])] if "answers" in summary else []
    return Group(stages, scores, *answers, *samples)


def _on_a_line(text: str) -> str:
    """Text that a model may have made, for a terminal: neither markup nor control characters do anything."""
    line = " ".join(text.split())
    return escape(brief(line, len(line)))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
