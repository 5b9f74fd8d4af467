"""A run's settings as its work directory keeps them."""

import dataclasses
import json
import typing
from collections.abc import Collection, Sequence
from typing import Any

from ml_collections import ConfigDict

from radlads_jax import fields
from radlads_jax.config import CHAT_STAGES, Data, RunConfig, Teacher, defaults, stage_names
from radlads_jax.student import Student
from radlads_jax.system import storage
from radlads_jax.system.json_files import read_json, write_json
from radlads_jax.system.untrusted import brief

# Of a recipe what changes no result, but for the rounding of sums; a recipe that is told without it has these.
FREE_OF_RECIPES: dict[str, Any] = {"accumulate": 1, "remat": "full"}
# What may differ between a run and its continuation: none of it changes the result either.
_SAMPLES = ("sample_prompts", "sample_tokens", "answer_tales")
_FREE_OF_TRAIN = (
    "log_every",
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
    "disk_gb",
    "max_skipped",
    "wandb_project",
    *_SAMPLES,
)
_FREE_FIELDS = (*_FREE_OF_TRAIN, "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", *FREE_OF_RECIPES)
# What only stages of conversations read, beside their recipes.
_OF_CHATS = ("data.chats", "data.messages_field", "data.replay")
# Where a run that knows what it depends on by contents may find the same elsewhere.
_PATH_FIELDS = ("teacher.path", "teacher.revision", "data.path", "data.revision", "data.tokenizer", "data.chats")
# And what a finished one reads no more.
_LOGITS = "config.teacher.logits"
# What switches of the student were before they were true, false or none.
_FORMER_SWITCHES = {"": None, "on": True, "off": False}


def with_whole_paths(run: RunConfig) -> RunConfig:
    """The run with every path by a name that means the same from any working directory; ids of the hub as they are."""
    name_of_data = storage.whole_name_or_id if run.data.source in ("hf", "synthetic") else storage.whole_name
    path, logits = storage.whole_name_or_id(run.teacher.path), storage.whole_name(run.teacher.logits)
    teacher = dataclasses.replace(run.teacher, path=path, logits=logits)
    data = dataclasses.replace(
        run.data,
        path=name_of_data(run.data.path),
        tokenizer=storage.whole_name_or_id(run.data.tokenizer),
        chats=storage.whole_name(run.data.chats),
    )
    student = dataclasses.replace(run.student, init_from=storage.whole_name(run.student.init_from))
    return dataclasses.replace(run, teacher=teacher, data=data, student=student)


def keep_begun_rules(workdir: storage.AnyPath, config: ConfigDict) -> None:
    """Gives fields that follow others by a rule what DIR's run began with, whose version may have had another rule.

    Not those of a stage that has not begun, whose recipe is free.
    """
    begun, settled = _begun_settings(workdir), settled_stages(workdir)
    for name, (group, field) in fields.following(config).items():
        if name in begun and _is_read_by(settled, name):
            group[field] = begun[name]


def begun_setting(workdir: storage.AnyPath, name: str) -> Any:
    """What DIR's run has begun with, by a name as "config.data.chats"; None where it has not."""
    return _begun_settings(workdir).get(name)


def begun_student(workdir: storage.AnyPath) -> dict[str, Any]:
    """What DIR's run was told of its student, by names as "mixer" and "options.window"."""
    prefix = "config.student."
    return {n.removeprefix(prefix): v for n, v in _begun_settings(workdir).items() if n.startswith(prefix)}


def settled_stages(workdir: storage.AnyPath) -> set[str]:
    """The stages whose recipe can not be another any more: with a checkpoint, or done, or before one that is."""
    stages = {*begun_stages(workdir), *(trained_stages(workdir) or [])}
    order = begun_setting(workdir, "config.stages") or []
    return stages | {*order[: _last(order, stages)]}


def _last(order: Sequence[str], stages: Collection[str]) -> int:
    """How many of them there are up to the last one of these stages."""
    return 1 + max((i for i, stage in enumerate(order) if stage in stages), default=-1)


def trained_stages(workdir: storage.AnyPath) -> list[str] | None:
    """Those that DIR/summary.json is of; None where there is no such file."""
    path, advice = workdir / "summary.json", "Remove the file: scores are measured again."
    if not path.exists():
        return None
    stages = read_json(path, advice).get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) and "name" in stage for stage in stages):
        raise ValueError(f"{path}: stages is {brief(repr(stages))}; expected what a run wrote there. {advice}")
    return [stage["name"] for stage in stages]


def begun_stages(workdir: storage.AnyPath) -> set[str]:
    """The stages of which DIR has a checkpoint; any other starts at its first step."""
    place = workdir / "checkpoints"
    stages = [name for name, is_file in storage.children(place).items() if not is_file] if place.is_dir() else []
    return {stage for stage in stages if any(map(_is_whole, (place / stage).iterdir()))}


def _is_whole(step: storage.AnyPath) -> bool:
    """Whether it is a checkpoint; in a bucket one has its name before it is whole, and then a file more."""
    return step.name.isdigit() and (not storage.in_bucket(step) or (step / "commit_success.txt").exists())


def _begun_settings(workdir: storage.AnyPath) -> dict[str, Any]:
    """Every setting of DIR/config.json by its name, as this version writes them; empty where there is none."""
    path = workdir / "config.json"
    if not path.exists():
        return {}
    settings = flat_settings(_with_whole_paths(read_json(path, "Restore it, or choose another --workdir.")))
    for name, hint in typing.get_type_hints(Student).items():
        setting = f"config.student.{name}"
        if hint == bool | None and settings.get(setting) in ("", "on", "off"):
            settings[setting] = _FORMER_SWITCHES[settings[setting]]
    if settings.get("config.data.source") != "synthetic":
        # Any number was taken beside other sources once, and read by none.
        settings.pop("config.data.documents", None)
    if "config.teacher.temperature" not in settings and not settings.get("config.teacher.logits"):
        # Before KL could be softened, this was of stored logits alone.
        settings.pop("config.teacher.top_k", None)
    return settings


def check_same_config(workdir: storage.AnyPath, config: dict) -> list[str]:
    """Raises ValueError where DIR belongs to a run with other settings; what it did not know yet had its default.

    Those of a stage that has not begun may be others, and the list of stages behind those that have: they are returned,
    in words, as far as a stage reads them that is to run.
    """
    begun = _begun_settings(workdir)
    if not begun:
        return []
    by_contents = [f"config.{field}" for field in _PATH_FIELDS]
    if bool(begun.get(_LOGITS)) == bool(flat_settings(config).get(_LOGITS)):
        by_contents.append(_LOGITS)
    has_contents = (workdir / "fingerprint.json").exists()
    changed = _changed(begun, config, except_for=by_contents if has_contents else ())
    settled = settled_stages(workdir)
    refused = [name for name in changed if _is_read_by(settled, name)]
    old = list(begun.get("config.stages", RunConfig().stages))
    new = list(config.get("stages", RunConfig().stages))
    trained = _last(old, settled)
    if "config.stages" in changed and old[:trained] == new[:trained]:
        refused.remove("config.stages")
    if refused:
        first = "; ".join(changed[name] for name in refused[:10])
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise ValueError(
            f"{workdir} holds a run with other settings: {first}{more}. Repeat its settings, which its config.json "
            "has, to continue it, or choose another --workdir."
        )
    told = [words for name, words in changed.items() if _is_read_by(new, name)]
    kept = begun_stages(workdir)
    if told and (lost := [stage for stage in trained_stages(workdir) or [] if stage not in kept]):
        raise ValueError(
            f"{workdir} is finished, its checkpoints of {', '.join(lost)} are gone, and {'; '.join(told)}; "
            "expected the checkpoints, from which more stages go on. Put them back, or choose another --workdir."
        )
    return told


def _changed(begun: dict[str, Any], config: dict, except_for: Collection[str]) -> dict[str, str]:
    """Every setting, by its name, that differs between a run and what is asked now and would change it: how, in words.

    What one of them does not know has its default there.
    """
    known, asked = (flat_settings(json.loads(json.dumps(settings))) for settings in (defaults().to_dict(), config))
    old, new = known | begun, known | asked
    free = tuple(f".{field}" for field in _FREE_FIELDS)
    names = [n for n in sorted(old.keys() | new.keys()) if n not in except_for and not n.endswith(free)]
    return {n: f"{n} was {old.get(n)!r} and is now {new.get(n)!r}" for n in names if old.get(n) != new.get(n)}


def _is_read_by(stages: Collection[str], setting: str) -> bool:
    """Whether one of these stages reads a setting, which is named in full, or the whole run does."""
    if setting.removeprefix("config.") in _OF_CHATS:
        return not CHAT_STAGES.isdisjoint(stages)
    group = setting.split(".")[1]
    return group not in stage_names() or group in stages


def _with_whole_paths(settings: dict) -> dict:
    """Stored settings, whose paths an earlier version kept as they were typed."""
    teacher, data = settings.get("teacher", {}), settings.get("data", {})
    known = {name: data[name] for name in ("source", "path", "tokenizer", "chats") if name in data}
    run = RunConfig(teacher=Teacher(teacher.get("path", "")), data=Data(**known))
    whole = dataclasses.asdict(with_whole_paths(run))
    changed = {"teacher": teacher | {"path": whole["teacher"]["path"]}} if "path" in teacher else {}
    return settings | changed | ({"data": data | {name: whole["data"][name] for name in known}} if known else {})


def names_others(workdir: storage.AnyPath, run: RunConfig) -> bool:
    """Whether a run names its teacher, text or tokenizer by other names than DIR/config.json has."""
    begun, now = _begun_settings(workdir), flat_settings(json.loads(json.dumps(with_whole_paths(run).settings())))
    names = [name for name in begun if name.endswith(tuple(f".{field}" for field in _PATH_FIELDS))]
    return any(begun[name] != now.get(name) for name in names)


def remember_config(workdir: storage.AnyPath, config: dict) -> None:
    """Writes DIR/config.json."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", config)


def flat_settings(settings: dict, where: str = "config") -> dict[str, Any]:
    """Every setting by its name, "config.stage1.lr"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{where}.{key}"
        flat |= flat_settings(value, name) if isinstance(value, dict) else {name: value}
    return flat
