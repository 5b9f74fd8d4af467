"""The mixers that another run's stage 1 has trained in every layer of the same teacher, in the place of fresh ones.

Stage 1 trains every layer by itself, on what the teacher gives it to read: which other layers are converted does not
matter (but to a value residual, which is of the first one's values). So one such run serves students with any softmax
layers, and to choose these. A run copies what it takes when it begins, and has no need of the other one any more.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from radlads_jax.config import RunConfig
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.mixers import MIXERS
from radlads_jax.models.placement import abstract, shardings
from radlads_jax.models.tree import Params
from radlads_jax.run import fingerprint
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.checkpoint_sums import DamagedCheckpoint
from radlads_jax.run.settings import begun_setting, begun_student, trained_stages
from radlads_jax.student import Student
from radlads_jax.system import hosts
from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath, as_path
from radlads_jax.system.untrusted import listed

_STAGE = "stage1"
_COPY = "earlier_mixers"
# Of a student, what its mixers are the same without: which layers stay softmax and how, and how they began.
_NOT_OF_MIXERS = (
    "attention_layers",
    "attention_every",
    "attention_rope",
    "attention_output_gate",
    "attention_log_scale",
    "init",
    "calibrate",
    "init_from",
    "fresh_qkvo",
)


class EarlierMixers(NamedTuple):
    """place, step: the checkpoint that holds them. student: whose stacks they are in; None: in those of the run itself,
    which has copied them. said: of the run that they are from, as summary and card tell it; contents: what tells them
    from any others."""

    place: AnyPath
    step: int
    student: ModelConfig | None
    said: dict[str, Any]


def find(run: RunConfig, workdir: AnyPath, teacher: ModelConfig, depends: Mapping[str, Any]) -> EarlierMixers:
    """The mixers that config.student.init_from names, or the copy that a run has begun with. depends: as of Job.

    Raises ValueError where they are of another teacher or other settings, have read this run's held-out text, or are
    not there.
    """
    if fingerprint.has_begun(workdir):
        return _copied(workdir)
    place = as_path(run.student.init_from)
    settings, stages = begun_student(place), trained_stages(place) or []
    if not settings or stages[:1] != [_STAGE]:
        raise _refusal(place, "is no run that has begun with stage 1 and is done")
    if wrong := _other(run, place, settings, depends):
        raise _refusal(place, wrong)
    student = _every_layer(teacher, run, _student(settings))
    if wrong := _told(student, _every_layer(teacher, run, run.student)):
        raise _refusal(place, wrong)
    summary, config = (read_json(place / name) for name in ("summary.json", "config.json"))
    line, text = summary["stages"][0], config.get("data", {})
    step, tokens = line.get("steps"), line.get("tokens")
    checkpoints = place / "checkpoints" / _STAGE
    if not isinstance(tokens, int) or not (checkpoints / str(step)).exists():
        raise _refusal(place, f"has no checkpoint of its last step ({checkpoints / str(step)}) any more")
    try:
        with Checkpoints(checkpoints, read_only=True) as stored:
            contents = stored.contents(step)
    except DamagedCheckpoint as error:
        raise _refusal(place, f"has a damaged checkpoint ({error.reason})") from error
    said = {
        "run": str(place),
        "tokens": tokens + summary.get("earlier", {}).get("tokens", 0),
        "text": text.get("path") or text.get("source", ""),
        "recipe": config[_STAGE],
        "line": line,
        "contents": contents,
    }
    return EarlierMixers(checkpoints, step, student, said)


def _refusal(place: AnyPath, wrong: str) -> ValueError:
    return ValueError(
        f"config.student.init_from {place} {wrong}; expected the work directory of a run with --config.stages={_STAGE} "
        "of this teacher to these mixers, every layer converted. Make one, or leave it out."
    )


def _every_layer(teacher: ModelConfig, run: RunConfig, student: Student) -> ModelConfig:
    """The student of which every layer is converted, of what it is told of its mixers."""
    others: dict[str, Any] = {name: getattr(Student(), name) for name in _NOT_OF_MIXERS}
    return make_student_config(teacher, dataclasses.replace(run, student=dataclasses.replace(student, **others)))


def _student(settings: Mapping[str, Any]) -> Student:
    """What the earlier run was told of its mixers."""
    names = {field.name for field in dataclasses.fields(Student)} - {*_NOT_OF_MIXERS, "options"}
    options = {name.removeprefix("options."): value for name, value in settings.items() if name.startswith("options.")}
    return Student(**{name: settings[name] for name in names if name in settings}, options=options)


def _other(run: RunConfig, place: AnyPath, settings: Mapping[str, Any], depends: Mapping[str, Any]) -> str:
    """What the earlier run has learned from, or not, that this one can not begin with, in words."""
    if settings.get("attention_layers") or settings.get("attention_every"):
        return "has kept softmax attention in some layers"
    written = fingerprint.written(place)
    for part in ("teacher", "tokenizer"):
        if depends[part] is None or written.get(part) != depends[part]:
            return f"was made with another {part}"
    if frozen := begun_setting(place, f"config.{_STAGE}.freeze"):
        return f"has frozen {listed(frozen)} of its mixers, which no checkpoint holds"
    rows, length = begun_setting(place, "config.data.eval_rows"), begun_setting(place, f"config.{_STAGE}.seq_len")
    is_same_text = written.get("data", {}).get("tokens") == depends["data"]["tokens"]
    if is_same_text and rows and length and rows * length < run.eval_tokens:
        most = rows * length * run.data.eval_rows // run.eval_tokens
        return (
            f"held out {rows * length:,} tokens of the same text, of which config.data.eval_rows={run.data.eval_rows} "
            f"holds out {run.eval_tokens:,}: it has trained on some of them ({most} would do)"
        )
    return ""


def _told(before: ModelConfig, now: ModelConfig) -> str:
    """What the earlier run was told otherwise of its mixers, in words."""
    if before.recurrent_mixer != now.recurrent_mixer:
        return f"has config.student.mixer={before.recurrent_mixer}, and this one {now.recurrent_mixer}"
    for field in dataclasses.fields(now.mixer):
        was, value = (getattr(cfg.mixer, field.name) for cfg in (before, now))
        if was != value:
            where = "" if hasattr(Student(), field.name) else "options."
            return f"has config.student.{where}{field.name}={was}, and this one {value}"
    return ""


def copied(earlier: EarlierMixers, workdir: AnyPath, student: ModelConfig, mesh: Mesh | None) -> EarlierMixers:
    """The same mixers out of the work directory, to which they are written where they are not there yet."""
    if earlier.student is None:
        return earlier
    mixers, place = load(earlier, student, mesh), workdir / _COPY
    # Of a run that could not begin.
    if hosts.is_first() and place.exists():
        place.rmtree()
    hosts.barrier()
    with Checkpoints(place) as stored:
        stored.save(earlier.step, {"params": mixers}, data_state={}, meta=earlier.said, wait=True)
    return earlier._replace(place=place, student=None)


def _copied(workdir: AnyPath) -> EarlierMixers:
    place = workdir / _COPY
    try:
        if not place.is_dir():
            raise ValueError("it is missing")
        with Checkpoints(place, read_only=True) as stored:
            if (step := stored.latest_step()) is None:
                raise ValueError("nothing is in it")
            return EarlierMixers(place, step, None, stored.restore_meta(step))
    except ValueError as error:
        raise _lost(place, str(error)) from error


def _lost(place: AnyPath, wrong: str) -> ValueError:
    return ValueError(
        f"{place}: {wrong}; expected the mixers that the run began with. Put it back, or choose another --workdir."
    )


def load(earlier: EarlierMixers, student: ModelConfig, mesh: Mesh | None) -> Params:
    """{"stacks": {i: {"mixer": ...}}} of the student's converted stacks, float32.

    Raises ValueError where what is read is not what was saved.
    """
    layout = earlier.student or student
    wanted = abstract(mesh, abstract_mixers(layout), layout)
    try:
        with Checkpoints(earlier.place, read_only=True) as stored:
            mixers = stored.restore_params(earlier.step, wanted)
    except DamagedCheckpoint as error:
        raise _lost(earlier.place, error.reason) from error
    if earlier.student is None:
        return mixers

    def cut(mixers: Params) -> Params:
        return {"stacks": {i: _layers(layout, mixers["stacks"], *_span(student, i)) for i in _converted(student)}}

    return jax.jit(cut, out_shardings=shardings(mesh, jax.eval_shape(cut, mixers), student))(mixers)


def abstract_mixers(student: ModelConfig) -> Params:
    """What `load` gives, without arrays."""
    own = abstract_params(student)["stacks"]
    return {"stacks": {i: {"mixer": own[i]["mixer"]} for i in _converted(student)}}


def _converted(cfg: ModelConfig) -> list[int]:
    return [i for i in range(len(cfg.stacks)) if cfg.is_converted(i)]


def _span(cfg: ModelConfig, stack: int) -> tuple[int, int]:
    """The first layer of a stack, and the first after it."""
    start = cfg.stack_starts[stack]
    return start, start + cfg.stacks[stack][1]


def _layers(cfg: ModelConfig, stacks: Params, start: int, stop: int) -> Params:
    """These neighbouring layers' mixers, of the one stack of cfg that has them all."""
    stack = max(i for i in _converted(cfg) if cfg.stack_starts[i] <= start)
    first = cfg.stack_starts[stack]
    return jax.tree.map(lambda x: x[start - first : stop - first], stacks[stack])


def described(earlier: EarlierMixers, student: ModelConfig) -> str:
    """Where the mixers are from, and what of them fits the student no more."""
    said = f"mixers of {earlier.said['run']}, of {earlier.said['tokens']:,} tokens of {_STAGE}"
    first, mixer = student.first_recurrent_layer, student.recurrent_mixer
    if first and mixer is not None and MIXERS[mixer].shares_values:
        said += f"; their value residual has learned with layer 0's values and gets layer {first}'s"
    return said
