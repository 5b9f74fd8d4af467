"""What is looked at before hours are spent: disk, data, tokenizer, teacher, checkpoints, kernels; a line for each.

All of it together costs seconds. Over several hosts every process takes part, and the first one prints.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from pallas_kernels import dispatch
from radlads_jax.data import packing, pipeline
from radlads_jax.data.tokenise import prompt_beginning
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.student_config import layers_to_choose
from radlads_jax.models import ModelConfig, sharding
from radlads_jax.models.config import SOFTMAX
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.state import mixer_state
from radlads_jax.models.tree import Params
from radlads_jax.porting.hub import load_tokenizer
from radlads_jax.porting.model_card import kept_said
from radlads_jax.porting.model_tensors import model_tensors
from radlads_jax.porting.writers import writer_for
from radlads_jax.reporting.run_log import ranges
from radlads_jax.run import earlier_mixers, ending, fingerprint, heldout, rates
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.job import Job
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.run.to_write import bytes_to_write, exported
from radlads_jax.run.tokens import described, described_chats
from radlads_jax.system import hosts
from radlads_jax.system.space import free_bytes, shown_bytes
from radlads_jax.system.storage import sizes_below
from radlads_jax.system.untrusted import brief, listed

# Random weights are at log(vocab) or above it, and so is a teacher that reads another tokenizer's ids; one that can say
# something of its text is far below.
_NEAR_CHANCE = 0.85
# Of a text: by Muennighoff et al. (arXiv 2305.16264) four times teach nearly as much as new text, forty times no more.
_MOST_REPEATS = 40


class Finding(NamedTuple):
    """What one check found. problem: why the run should not begin, and what to change; "" where all is well."""

    name: str
    result: str
    problem: str = ""


def check(job: Job, teacher: TeacherWeights, *, force: bool = False, whole: bool = False) -> None:
    """Prints a line for each check; one of them reads a whole teacher, and with it its weights.

    A run that continues was found well when it began: of it only what is left to write is compared with the disk, and
    nothing is printed where that fits; `whole` checks all the same. Raises ValueError with all problems in one
    paragraph, unless `force` is given; in any case where no checkpoint can be written and read back, or OSError.
    """
    ending.check(job)
    begun = hosts.agreed(int(fingerprint.has_begun(job.workdir)))
    if begun and not whole:
        findings = [disk(job)]
    else:
        findings = [disk(job), data(job), Finding("rates", rates.described(map(job.stage_plan, job.run.stages)))]
        findings += [stored_logits(job)] if job.logits is not None else []
        recurrent = job.student.recurrent_mixer is not None
        if job.earlier is not None:
            findings.append(Finding("init_from", earlier_mixers.described(job.earlier, job.student)))
        findings += [layers(job)] if recurrent and (job.student.softmax_layers or job.student.copied) else []
        findings += [softmax_layers(job)] if job.student.kept_attention is not None else []
        findings += [tokenizer(job), _checkpoints(job), export_format(job)]
        findings += [positions(job)] if recurrent else []
        if job.source is not None and recurrent:
            findings.append(_teacher_loss(job, cast(Params, teacher.held())))
        findings.append(_kernels(job))
    problems = [finding.problem for finding in findings if finding.problem]
    if hosts.is_first() and (problems or whole or not begun):
        _print(findings)
    if hosts.agreed(len(problems)) and not force:
        said = " ".join(problems) or "another process found a problem, and tells which."
        raise ValueError(f"{said} (--force begins all the same.)")


def disk(job: Job) -> Finding:
    """What checkpoints and export will take at most, by their shapes, beside the room that disk and quota leave."""
    left = bytes_to_write(job)
    room, of_what = _room(job)
    if room is None:
        return Finding("disk", f"at most {shown_bytes(left)} to write; how much a bucket has left is not known")
    result = f"at most {shown_bytes(left)} of checkpoints and export to write, {shown_bytes(room)} {of_what}"
    if left <= room:
        return Finding("disk", result)
    return Finding(
        "disk",
        result,
        f"the run will write up to {shown_bytes(left)} below {job.workdir}, where {shown_bytes(room)} are {of_what}; "
        "expected room for all of it. Free some, choose a --workdir on a larger disk, or write less: lower "
        "config.train.keep_checkpoints, or set config.optim.moment_dtype=bfloat16.",
    )


def _room(job: Job) -> tuple[int | None, str]:
    """Bytes that the work directory may still grow by, None where that is not known, and of what they are."""
    free, quota = free_bytes(job.workdir), job.run.train.disk_gb
    if not quota:
        return free, "free"
    used = sum(sizes_below(job.workdir).values()) if job.workdir.exists() else 0
    left = max(int(quota * 1e9) - used, 0)
    if free is not None and free < left:
        return free, "free"
    return left, f"left of config.train.disk_gb={quota:g}, of which {shown_bytes(used)} are taken"


def stored_logits(job: Job) -> Finding:
    """Which stages read the teacher's stored logits, and when its weights are in memory all the same."""
    assert job.logits is not None
    plans = [job.stage_plan(name) for name in job.run.stages]
    reading = " and ".join(plan.name for plan in plans if plan.reads_logits)
    size, vocab = shown_bytes(job.logits.num_bytes), f"{job.teacher.vocab_size:,}"
    said = f"{reading} read{'s' if ' and ' not in reading else ''} the top {job.logits.top_k} of {vocab} tokens "
    said += f"({size}), without the teacher's weights, which are held at the start and for the scores at the end"
    if any(plan.reads_logits and plan.recipe.sweep for plan in plans):
        said += ", for the scores of a sweep's trials too"
    live = [plan.name for plan in plans if plan.needs_weights]
    why = " and by ".join(f"{name} (its loss is the {STAGES[name].loss}, of which nothing is stored)" for name in live)
    return Finding("logits", said + (f", and by {why}" if live else ""))


def positions(job: Job) -> Finding:
    """How long the rows are beside what the teacher knows: a problem where a stage learns from it further out."""
    run, scaling, most = job.run, job.teacher.rope_scaling, job.teacher.max_position_embeddings
    said = f"the teacher's max_position_embeddings is {most:,}"
    if scaling is not None and scaling.kind == "linear":
        # Some count the positions before the scaling, as those of a teacher that was made for longer rows by it.
        most = int(most * scaling.factor)
        said += f", its RoPE scaled for up to {scaling.factor:g} times as many"
    longest = max(recipe.seq_len for recipe in run.recipes.values())
    result = f"rows of at most {longest:,} tokens; {said}"
    beyond = [name for name, recipe in run.recipes.items() if STAGES[name].needs_teacher and recipe.seq_len > most]
    if not beyond:
        return Finding("positions", result)
    names = " and ".join(f"config.{name}.seq_len, {run.stage(name).seq_len:,}" for name in beyond)
    return Finding(
        "positions",
        result,
        f"{said}, below {names}; expected rows within it, for further out "
        "its logits are no model to learn from. Lower it, or give the teacher the RoPE scaling that it is meant for.",
    )


def layers(job: Job) -> Finding:
    """The layers that stay softmax attention, or how many will; of a teacher with others too, what becomes of each."""
    if job.student.copied:
        kept = ranges(job.student.softmax_layers) or "none"
        converted = ranges(job.student.converted_layers)
        said = f"{converted} are converted to {job.student.recurrent_mixer}, {kept} stay softmax attention"
        return Finding("layers", f"{said}, all others are the teacher's {job.student.recurrent_mixer}")
    if not job.to_choose:
        how = ", as chosen when the run began" if layers_to_choose(job.run.student) else ""
        return Finding("layers", f"of {job.student.num_layers} these stay softmax attention{how}: {_kept(job.student)}")
    said = f"{job.to_choose} of {job.teacher.num_layers} will be chosen to stay softmax attention"
    return Finding("layers", f"{said}; sizes are those of as many, evenly spaced: {_kept(job.student)}")


def softmax_layers(job: Job) -> Finding:
    """What the softmax layers that stay have other than the teacher's, and which stage trains them first."""
    kept = job.student.kept_attention
    assert kept is not None  # else there is nothing to say
    if kept.rope:
        trains = "they begin as the teacher's, and stage1 leaves them"
    elif "stage1" in job.run.stages:
        trains = "stage1 aligns them as the mixers"
    else:
        trains = "they begin without what the teacher's RoPE told them, and no stage1 aligns them"
    scores = "; evaluations and export scale the logits, training does not" if kept.log_scale else ""
    return Finding("softmax", f"layers {_kept(job.student)}: {', '.join(kept_said(kept))}; {trains}{scores}")


def _kept(student: ModelConfig) -> str:
    return ", ".join(map(str, student.softmax_layers))


def export_format(job: Job) -> Finding:
    """The format that the student will be exported in, whether it has a place for all of it, and what loads it."""
    form = writer_for(job.student, job.run.export.engine)
    retied = exported(job)
    if job.to_choose:
        # Layers that are chosen follow no interval, nor do the first ones.
        retied = _with_first_layers(retied, job.to_choose)
    if not (obstacles := form.obstacles(retied, None)):
        read_by = [_read_by(form.readers(retied)), *form.remarks(retied)]
        return Finding("export", f"as {form.name}{'; '.join(read_by)}")
    return Finding(
        "export",
        f"{form.name} has no place for {'; '.join(obstacles)}",
        f"the student will be exported as {form.name}, which has no place for {'; '.join(obstacles)}; expected "
        f"{form.expected}. Choose another teacher or config.student.mixer.",
    )


def _with_first_layers(student: ModelConfig, count: int) -> ModelConfig:
    recurrent = student.recurrent_mixer
    assert recurrent is not None  # else there is nothing to choose
    return dataclasses.replace(student, stacks=((SOFTMAX, count), (recurrent, student.num_layers - count)))


def _read_by(readers: Mapping[str, list[str]]) -> str:
    loading = [name for name, reasons in readers.items() if not reasons]
    others = [f"{name} does not: {', '.join(reasons)}" for name, reasons in readers.items() if reasons]
    return "; ".join([f", which {' and '.join(loading)} load", *others]) if readers else ""


def data(job: Job) -> Finding:
    """How often every stage goes through the data; a problem where that is too often, or a stream was cut for fewer."""
    shares, short, often = [], [], []
    cut = job.run.data.streaming and job.depends["data"].get("max_tokens") == job.token_file.num_tokens
    for name, recipe in job.run.recipes.items():
        tokens = recipe.steps * recipe.tokens_per_step
        if STAGES[name].reads_chats:
            shares.append(_conversations(job, name, tokens))
            continue
        share = pipeline.repeats(job.token_file, recipe.seq_len, tokens, job.run.eval_tokens)
        short += [name] if cut and share > 1 and not job.run.data.max_tokens else []
        often += [name] if share > _MOST_REPEATS else []
        shares.append(f"{name} reads {f'{share:.0%} of them' if share <= 1 else f'them {share:.1f} times'}")
    held_out = job.run.eval_tokens
    count = packing.held_out_start(job.token_file, held_out)
    behind = job.token_file.num_tokens - count - held_out
    rest = f" and {behind:,} behind those, which none reads" if behind else ""
    much = " (config.data.eval_rows: more than is left to train on)" if held_out > count else ""
    text = described(job.token_file, job.depends["data"])
    read = f"{count:,} tokens besides {held_out:,} held out{much}{rest}, of {text}"
    problem = (
        f"the tokens in {job.token_file.prefix.parent} were read from a stream for a run of fewer, and "
        f"{listed(short)} would repeat them; expected as many as the longest stage reads. Choose another --workdir, "
        "which reads as many."
    )
    if often:
        problem = (
            f"{listed(often)} would read {count:,} tokens of text more than {_MOST_REPEATS} times, and it teaches "
            f"nothing more by then; expected about {4 * count:,} tokens a stage, which is four times, or longer text. "
            f"Set {' and '.join(f'config.{name}.tokens' for name in often)}."
        )
    return Finding("data", f"{read}; {', '.join(shares)}", problem if short or often else "")


def _conversations(job: Job, name: str, tokens: int) -> str:
    """What a stage of so many tokens reads of the conversations, and beside them."""
    assert job.chats is not None
    rows = job.run.stage(name).batch_size
    replayed = round(job.run.data.replay * rows) / rows
    share = pipeline.repeats(job.chats, job.run.stage(name).seq_len, round(tokens * (1 - replayed)))
    beside = f", beside {replayed:.0%} of its rows of text" if replayed else ""
    often = f"{share:.0%} of" if share <= 1 else f"{share:.1f} times"
    return f"{name} reads {often} {described_chats(job.chats)}{beside}"


def tokenizer(job: Job) -> Finding:
    """Whether the data's tokenizer numbers tokens as the teacher's own does, where the teacher has another."""
    vocab, end = job.tokenizer.get_vocab(), job.tokenizer.eos_token
    ends = "are not ended" if end is None else f"end with {brief(end)} ({job.tokenizer.eos_token_id})"
    first = brief(job.tokenizer.decode(list(job.beginning)))
    begin = f"begin with {first} ({', '.join(map(str, job.beginning))}) and " if job.beginning else ""
    if job.beginning != (usual := prompt_beginning(job.tokenizer)):
        ends += f"; prompts begin otherwise, with {brief(job.tokenizer.decode(list(usual)) or 'nothing')}"
    result = f"{len(vocab):,} tokens in a vocabulary of {job.teacher.vocab_size:,}; documents {begin}{ends}"
    own = _own_vocabulary(job)
    moved = [token for token, number in vocab.items() if own.get(token, number) != number]
    if not moved:
        return Finding("tokenizer", result)
    return Finding(
        "tokenizer",
        result,
        f"the tokenizer in {job.tokenizer_dir} gives {len(moved):,} tokens other ids than that of the teacher in "
        f"{job.source}: {listed(moved)}; expected the same ids. Leave config.data.tokenizer out.",
    )


def _own_vocabulary(job: Job) -> dict[str, int]:
    """The vocabulary of the teacher's own tokenizer; empty where it has none or is the data's."""
    if job.source is None or job.tokenizer_dir == job.source:
        return {}
    try:
        return load_tokenizer(job.source).get_vocab()
    except ValueError:
        return {}


def _checkpoints(job: Job) -> Finding:
    """Saves and restores a small checkpoint in the work directory, its array split over all devices.

    Raises ValueError where the numbers come back changed.
    """
    place = epath.Path(job.workdir) / ".preflight"
    if hosts.is_first():
        place.rmtree(missing_ok=True)
    hosts.barrier()
    try:
        same = _round_trip(job, place)
    finally:
        hosts.barrier()  # All have read what is about to go.
        if hosts.is_first():
            place.rmtree(missing_ok=True)
    if not same:
        raise ValueError(
            f"a checkpoint saved in {job.workdir} was restored with other numbers; expected the same bits. Do not "
            "trust this disk: choose another --workdir."
        )
    return Finding("checkpoints", "a small one was saved and restored")


def _round_trip(job: Job, place: epath.Path) -> bool:
    placed = NamedSharding(job.mesh, PartitionSpec(sharding.AXES)) if job.mesh is not None else None
    rows = job.mesh.size if job.mesh is not None else 1
    numbers = jax.jit(lambda: jnp.sin(jnp.arange(rows * 1024.0).reshape(rows, 1024)), out_shardings=placed)()
    with Checkpoints(place / "checkpoint") as written:
        written.save(1, {"numbers": numbers}, data_state={}, meta={}, wait=True)
    abstract = {"numbers": jax.ShapeDtypeStruct(numbers.shape, numbers.dtype, sharding=placed)}
    # By another one, as in a run: Orbax's own that has saved to a bucket takes it for unfinished in all but process 0.
    with Checkpoints(place / "checkpoint") as reader:
        restored, _, _ = reader.restore(1, abstract)
    return bool(hosts.fetched(jax.jit(jnp.array_equal)(numbers, restored["numbers"])))


def _teacher_loss(job: Job, teacher: Params) -> Finding:
    """The teacher's loss per token on the first rows of the first batch; a problem where it is that of chance."""
    run = job.run
    rows = min(run.train.eval_batch_size, run.stage(run.stages[0]).batch_size)
    batch = dict(next(job.batches(run.stages[0], rows)))
    # Every token that follows one of its segment, also where a stage counts the assistant's alone.
    ids = batch["segment_ids"]
    batch["loss_mask"] = np.pad((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0), ((0, 0), (0, 1))).astype(np.float32)
    measured = heldout.evaluate(job.teacher, teacher, [batch], rows, mesh=job.mesh)
    loss, chance = measured["student"]["loss"], math.log(job.teacher.vocab_size)
    result = (
        f"loss {loss:.3f} on the first {measured['tokens']:,} tokens; that of chance is {chance:.3f}{_rounded(job)}"
    )
    if loss < _NEAR_CHANCE * chance:
        return Finding("teacher", result)
    return Finding(
        "teacher",
        result,
        f"the teacher {job.source} has a loss of {loss:.3f} on the first {measured['tokens']:,} tokens, where guessing "
        f"among its {job.teacher.vocab_size:,} tokens gives {chance:.3f}; expected one well below that. Check that the "
        "weights are trained and whole, that data and teacher have one tokenizer (config.data.tokenizer, or the one "
        "that made the token file), and that the text is of a language that the teacher knows.",
    )


def _rounded(job: Job) -> str:
    """Said of a teacher that is read in a narrower dtype than it is stored in."""
    if job.source is None or job.run.teacher.dtype != "bfloat16":
        return ""
    stored = {str(tensor.dtype) for tensor in model_tensors(job.source, job.teacher).values()} - {"bfloat16"}
    if not stored:
        return ""
    names, kept = " and ".join(sorted(stored)), "config.teacher.dtype=float32 leaves them as they are"
    return f"; weights stored as {names} are rounded to bfloat16, also those that mixers begin with ({kept})"


def _kernels(job: Job) -> Finding:
    """The devices, how the run is spread over them, and which implementation of the recurrence they get."""
    sizes = {} if job.mesh is None else {axis: size for axis, size in job.mesh.shape.items() if size > 1}
    used = "one device" if job.mesh is None else " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    result = f"{used} of {jax.device_count()} ({jax.devices()[0].device_kind})"
    mixer = job.student.recurrent_mixer or SOFTMAX
    if (operator := MIXERS[mixer].operator) is not None:
        # The recurrence's state is [B, H, K, V].
        states = (state.shape for state in mixer_state(job.student, mixer).values() if len(state.shape) == 4)
        head_sizes = next(states, ())[-2:]
        run = dispatch.choose(operator.name, operator.implementations, None, head_sizes)
        name = next(name for name, function in operator.implementations.items() if function is run)
        result = f"{operator.name} runs as {name} on {result}"
    return Finding("kernels", result)


def _print(findings: list[Finding]) -> None:
    console = Console()
    console.print("[bold]before the run[/bold]")
    for name, result, problem in findings:
        style = "red" if problem else None
        line = f"  {'NO' if problem else 'ok'}  {name:12} {result}"
        console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
