"""What comes after a run's last step: export, scores, answers, model card, report, samples, in this order.

What fails leaves all that was before it, and the same command then does what is left. Whatever these steps are told is
checked before the first step of training.
"""

import dataclasses
import shlex
from typing import Any

from radlads_jax.distill.stages import stage_losses
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.mixers import mixer_titles
from radlads_jax.models.placement import shardings
from radlads_jax.models.tree import Params
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.model_card import write_model_card
from radlads_jax.porting.save import MODEL_CARD, check_target, save_params
from radlads_jax.porting.writers import writer_for
from radlads_jax.reporting.sections import write_report
from radlads_jax.run import display, heldout
from radlads_jax.run.job import Job
from radlads_jax.run.settings import trained_stages
from radlads_jax.system import backend, hosts, storage
from radlads_jax.system.json_files import write_json
from radlads_jax.system.outage import is_outage
from radlads_jax.system.untrusted import brief

# In summary.json, what comes after the scores and is not done yet. What an earlier version wrote has all of it.
_TO_DO = "to_do"
_SAMPLES = "samples.md"


def check(job: Job) -> None:
    """Raises ValueError for what would stop one of these steps: prompts, held-out rows, places to write to."""
    for prompt in job.run.train.sample_prompts:
        _check_prompt(job, prompt)
    rows = heldout.batches(job)
    if not hosts.agreed(int(any(batch["loss_mask"].any() for batch in rows))):
        raise ValueError("the held-out rows hold no token with a next one; expected some. Raise config.data.eval_rows.")
    if job.run.train.answer_tales and not job.tokenizer.is_fast:
        raise ValueError(
            f"config.train.answer_tales is {job.run.train.answer_tales}, and the tokenizer of {job.tokenizer_dir} does "
            "not tell which text a token is of; expected one with a tokenizer.json. Leave answer_tales out."
        )
    check_target(job.workdir / "export", job.tokenizer_dir)
    form = writer_for(job.student, job.run.export.engine)
    form.require(job.student, job.tokenizer_dir)
    form.config(job.student, job.base_config)
    for name, is_file in {"report": False, _SAMPLES: True, "summary.json": True}.items():
        place = job.workdir / name
        if place.exists() and place.is_file() != is_file:
            raise ValueError(
                f"{place} is a {'directory' if is_file else 'file'}, where the run writes a "
                f"{'file' if is_file else 'directory'} of that name; expected a free name. Move it away."
            )


def _check_prompt(job: Job, prompt: str) -> None:
    def refuse(wrong: str, expected: str) -> ValueError:
        return ValueError(
            f"config.train.sample_prompts holds {brief(repr(prompt))}, {wrong}; expected {expected}. Correct it, or "
            "leave it out."
        )

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise refuse(f"whose character {error.start + 1} is half of one", "whole characters") from error
    count, new = len(heldout.prompt_tokens(job.tokenizer, prompt)), job.run.train.sample_tokens
    most = job.student.max_position_embeddings
    if not prompt.strip() or count == 0:
        raise refuse("of which the tokenizer makes no text to continue", "some text")
    if count + new > most:
        raise refuse(
            f"which has {count:,} tokens, to be followed by config.train.sample_tokens, {new:,}",
            f"at most max_position_embeddings, {most:,}, together",
        )


def finish(job: Job, student: Params, teacher: Params | None, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """All of it, for a student that is trained; returns the summary that DIR/summary.json holds."""
    display.say(f"exporting to {job.workdir / 'export'}")
    if hosts.is_first():
        _set_former_scores_aside(job)
    _export(job, student)
    wanted = {
        "control": True,
        "answers": job.run.train.answer_tales,
        "card": True,
        "samples": job.run.train.sample_prompts,
    }
    to_do = [step for step, is_wanted in wanted.items() if is_wanted]
    scored = False
    try:
        display.say("evaluating on held-out rows")
        # Evaluated as it is used from here on: with the exported weights, in the dtype it computes in.
        cfg, student = heldout.exported_student(job.run.export, job.student, student)
        summary = heldout.evaluate_job(job, cfg, student, teacher) | {"stages": stages}
        if job.earlier is not None:
            summary["earlier"] = job.earlier.said
        _keep(job, summary, to_do)
        scored = True
    finally:
        if not scored and hosts.is_first():
            _write_page(job)
    return _complete(job, summary, to_do, (cfg, student), teacher)


def _set_former_scores_aside(job: Job) -> None:
    """Scores and samples of a run of fewer stages are not to stand beside the weights that come."""
    stages, workdir = trained_stages(job.workdir), job.workdir
    if stages is not None and stages != list(job.run.stages):
        # What a user has measured is kept, by another name; beside the export too, which is replaced.
        for directory, beside in ((workdir, ""), (workdir / "export", "-of-export")):
            for suffix in (".json", ".md", ".partial.json"):
                if (path := directory / f"evaluation{suffix}").exists():
                    name = f"evaluation-{'-'.join(stages)}{beside}{suffix}"
                    storage.write_text(workdir / name, storage.read_text(path))
                    path.unlink()
    for name in ("summary.json", _SAMPLES):
        (workdir / name).unlink(missing_ok=True)


def _write_page(job: Job) -> storage.AnyPath:
    return write_report(job.workdir, losses=stage_losses(), mixers=mixer_titles())


def go_on(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
    """Does what a finished run has not done yet, and answers and samples that it was not asked for before."""
    to_do, train = summary.pop(_TO_DO, []), job.run.train
    if summary.get("answers", {"tales": 0})["tales"] != train.answer_tales:
        to_do += ["answers", "card"]
    prompts = [sample["prompt"] for sample in summary.get("samples", [])]
    # Older versions did not say how long the samples are.
    tokens = summary.get("sample_tokens", train.sample_tokens)
    if prompts != list(train.sample_prompts) or (prompts and tokens != train.sample_tokens):
        to_do += ["samples"]
    if to_do:
        generates = bool(("answers" in to_do and train.answer_tales) or ("samples" in to_do and train.sample_prompts))
        student = _exported(job) if generates else None
        reads_teacher = (generates or "control" in to_do) and job.student.recurrent_mixer
        teacher = job.load_teacher(job.run.teacher.dtype) if reads_teacher else None
        return _complete(job, summary, to_do, student, teacher)
    display.say(f"{job.workdir} is finished; nothing to do. Its results, from {job.workdir / 'summary.json'}:")
    display.show(heldout.results_table(summary))
    if hosts.is_first() and not (job.workdir / "report" / "index.html").exists():
        _write_page(job)
    return summary


def _complete(
    job: Job,
    summary: dict[str, Any],
    to_do: list[str],
    student: tuple[ModelConfig, Params] | None,
    teacher: Params | None,
) -> dict[str, Any]:
    """Control, answers, card, report, samples, as far as they are to do; the report once more when all is there."""
    models = {} if teacher is None else {"teacher": (job.teacher, teacher)}
    models |= {} if student is None else {"student": student}
    try:
        if "control" in to_do:
            to_do = [step for step in to_do if step != "control"]
            try:
                summary |= heldout.evaluate_control(job, teacher)
            except (RuntimeError, ValueError) as error:
                # It would fail again: the next start goes on without. What was only stopped, or had no answer from a
                # disk, a network or another host, or no room in memory, is still to do.
                if not (is_outage(error) or backend.is_out_of_memory(error)):
                    _keep(job, summary, to_do)
                    display.say("the control can not be scored; the next start goes on without it")
                raise
            _keep(job, summary, to_do)
        if "answers" in to_do:
            summary = {name: value for name, value in summary.items() if name != "answers"}
            if job.run.train.answer_tales:
                # A control that failed on held-out rows is left out here too.
                control = heldout.control_of(job, teacher) if "control" in summary else {}
                summary["answers"] = heldout.answer(job, models | control)
            to_do = [step for step in to_do if step != "answers"]
            _keep(job, summary, to_do)
        if "card" in to_do:
            _write_card(job, summary)
            to_do = [step for step in to_do if step != "card"]
            _keep(job, summary, to_do)
    finally:
        if hosts.is_first():
            _write_page(job)
    if "samples" in to_do:
        summary = {name: value for name, value in summary.items() if name not in ("samples", "sample_tokens")}
        if job.run.train.sample_prompts:
            summary["samples"] = heldout.write_samples(job, models)
            summary["sample_tokens"] = job.run.train.sample_tokens
        elif hosts.is_first():
            (job.workdir / _SAMPLES).unlink(missing_ok=True)
        _keep(job, summary, [])
    display.show(heldout.results_table(summary))
    if "answers" not in summary and job.source is not None and job.student.recurrent_mixer is not None:
        command = (
            f"--model {shlex.quote(str(job.workdir))} --teacher {shlex.quote(job.run.teacher.path)} --tasks=recall"
        )
        display.say(
            "scores of next tokens do not show what it recalls of its context; to ask both models: "
            f"python -m radlads_jax.evaluate {command}"
        )
    if hosts.is_first():
        display.say(f"how it went, as a page: {_write_page(job)}")
    return summary


def _keep(job: Job, summary: dict[str, Any], to_do: list[str]) -> None:
    if hosts.is_first():
        # Its presence says that export and scores are whole.
        write_json(job.workdir / "summary.json", summary | ({_TO_DO: to_do} if to_do else {}))


def _export(job: Job, student: Params) -> None:
    """DIR/export: a Hugging Face directory, its model card still without recipe and scores."""
    options = job.run.export
    save_params(
        student,
        job.student,
        job.workdir / "export",
        base_config=job.base_config,
        dtype=options.dtype,
        max_shard_size=int(options.max_shard_gb * 1e9),
        tokenizer_from=job.tokenizer_dir,
        retie=options.retie,
        writer=options.engine,
    )


def _write_card(job: Job, summary: dict[str, Any]) -> None:
    """The export's model card, with the run's recipe and scores."""
    if job.student.recurrent_mixer is not None and hosts.is_first():
        use = writer_for(job.student, job.run.export.engine).use(job.student)
        card = write_model_card(job.student, run=job.run.settings(), summary=summary, use=use)
        storage.write_text(job.workdir / "export" / MODEL_CARD, card)


def _exported(job: Job) -> tuple[ModelConfig, Params]:
    """The student as DIR/export holds it, in the dtype it computes in."""
    directory = job.workdir / "export"
    dtype = job.student.dtype
    cfg = dataclasses.replace(model_config_from_hf(read_config(directory)), dtype=dtype)
    placed = shardings(job.mesh, abstract_params(cfg), cfg)
    return cfg, load_params(directory, cfg, dtype=dtype, shardings=placed)
