"""The mixers that a run of stage 1 alone has trained in every layer of a teacher, in the place of fresh ones.

Stage 1 trains every layer by itself, on what the teacher gives it to read: which other layers are converted does not
matter (but to a value residual, which is of the first one's values). So one such run serves students with any softmax
layers, and to choose these.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from radlads_jax.config import RunConfig
from radlads_jax.decoding.loaded import read_model_config
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models.config import ModelConfig
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.placement import abstract, shardings
from radlads_jax.models.tree import Params
from radlads_jax.run import fingerprint
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.checkpoint_sums import DamagedCheckpoint
from radlads_jax.run.settings import begun_setting, begun_student, trained_stages
from radlads_jax.student import Student
from radlads_jax.system.json_files import read_json
from radlads_jax.system.storage import AnyPath, as_path
from radlads_jax.system.untrusted import listed

_STAGE = "stage1"
# Of a student, what its mixers are the same without: which layers stay softmax and how, and how they began.
_OF_SOFTMAX = ("attention_layers", "attention_every", "attention_rope", "attention_output_gate", "attention_log_scale")
_OF_BEGINNING = ("init", "calibrate", "init_from", "fresh_qkvo")


class EarlierMixers(NamedTuple):
    """student: of the earlier run. contents: what tells its mixers from any others."""

    run: AnyPath
    student: ModelConfig
    step: int
    tokens: int
    contents: str


def misfit(run: AnyPath, teacher: Mapping[str, Any]) -> str:
    """Why a run's mixers can not stand in any layer of the teacher, told by contents; nothing where they can."""
    trained = trained_stages(run)
    if trained is None:
        return "is no run that is done"
    if trained != [_STAGE]:
        return f"has trained {', '.join(trained)}"
    student = read_model_config(run)
    if student.softmax_layers:
        return f"has softmax attention in the layers {', '.join(map(str, student.softmax_layers))}"
    if fingerprint.written(run).get("teacher") != teacher:
        return "was made of another teacher"
    frozen = begun_setting(run, f"config.{_STAGE}.freeze")
    return f"has frozen {listed(frozen)} of its mixers, which no checkpoint holds" if frozen else ""


def find(run: RunConfig, teacher: ModelConfig, depends: Mapping[str, Any]) -> EarlierMixers:
    """The mixers that config.student.init_from names. depends: as of Job.

    Raises ValueError where they are of another teacher, of other settings, or not there any more.
    """
    place = as_path(run.student.init_from)
    wrong = misfit(place, depends["teacher"]) if depends["teacher"] else "can not be of a teacher of fresh weights"
    if wrong := wrong or _other_settings(run, place):
        raise ValueError(
            f"config.student.init_from {place} {wrong}; expected a run with --config.stages={_STAGE} of this teacher "
            "to these mixers, and every layer converted. Make one, or leave it out."
        )
    line = read_json(place / "summary.json")["stages"][0]
    step, checkpoints = line["steps"], place / "checkpoints" / _STAGE
    if not (checkpoints / str(step)).exists():
        raise ValueError(
            f"config.student.init_from {place} has no {checkpoints / str(step)} any more; expected the checkpoint of "
            "its last step. Put it back, or leave init_from out."
        )
    try:
        with Checkpoints(checkpoints) as stored:
            contents = stored.contents(step)
    except DamagedCheckpoint as error:
        raise _damaged(place, error) from error
    own: dict[str, Any] = {name: getattr(Student(), name) for name in (*_OF_SOFTMAX, *_OF_BEGINNING)}
    student = make_student_config(teacher, dataclasses.replace(run, student=dataclasses.replace(run.student, **own)))
    return EarlierMixers(place, student, step, line["tokens"], contents)


def _other_settings(run: RunConfig, place: AnyPath) -> str:
    """What the earlier run was told otherwise of its mixers, in words."""
    if not (before := begun_student(place)):
        return "has no config.json"
    now = json.loads(json.dumps(dataclasses.asdict(run.student)))
    now |= {f"options.{name}": value for name, value in now.pop("options").items()}
    default = dataclasses.asdict(Student())
    for name in sorted((before.keys() | now.keys()) - {*_OF_SOFTMAX, *_OF_BEGINNING, "options"}):
        was, value = (settings.get(name, default.get(name)) for settings in (before, now))
        if was != value:
            return f"was told config.student.{name} {was!r}, and this one {value!r}"
    return ""


def load(earlier: EarlierMixers, student: ModelConfig, mesh: Mesh | None) -> Params:
    """{"stacks": {i: {"mixer": ...}}} of the student's converted stacks, float32.

    Raises ValueError where what is read is not what was saved.
    """
    own = abstract_params(earlier.student)["stacks"]
    trained = {i: {"mixer": stack["mixer"]} for i, stack in own.items() if earlier.student.is_aligned(i)}
    try:
        with Checkpoints(earlier.run / "checkpoints" / _STAGE) as stored:
            wanted = abstract(mesh, {"stacks": trained}, earlier.student)
            stacks = stored.restore_params(earlier.step, wanted)["stacks"]
    except DamagedCheckpoint as error:
        raise _damaged(earlier.run, error) from error

    def cut(stacks: Params) -> Params:
        return {"stacks": {i: _layers(earlier.student, stacks, *_span(student, i)) for i in _converted(student)}}

    return jax.jit(cut, out_shardings=shardings(mesh, jax.eval_shape(cut, stacks), student))(stacks)


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


def _damaged(place: AnyPath, error: DamagedCheckpoint) -> ValueError:
    return ValueError(
        f"config.student.init_from {place}: {error.reason}; expected its checkpoint of step {error.step} as it was "
        "saved. Make the run anew, or leave init_from out."
    )
