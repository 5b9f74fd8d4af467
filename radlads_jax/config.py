"""What a run is told: defaults for get_config(arg), and the checked, frozen form that the code reads.

A configs/*.py file has get_config(arg) -> ConfigDict, made from `defaults()` or `recipes.paper()`. `validate` turns it
into a RunConfig and raises a ValueError that names the nearest field for a misspelt one, and got / expected for a
wrong type or value.
"""

import dataclasses
import difflib
import math
import re
import typing
from typing import Any

from ml_collections import ConfigDict

STAGE_NAMES = ("pretrain", "stage1", "stage2", "stage2a", "stage3")
SOURCES = ("synthetic", "text", "jsonl", "parquet", "hf", "binidx")
GATES = ("none", "full", "low_rank")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """path: a Hugging Face directory or hub id; or "" to start from fresh weights of the dimensions in `scratch`."""

    path: str = ""
    revision: str = ""
    dtype: str = "bfloat16"
    scratch: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Student:
    """mixer: "rad_rwkv6", "rad_rwkv7", "gdn" or "attention" (no conversion). attention_layers keep softmax attention.
    attention_every: N keeps every N-th layer, those with (i + 1) % N == 0, in place of attention_layers; 0 = off.

    use_rope, token_shift, gate, group_norm, balance_state: "" = the mixer's published choice, else "on"/"off" (gate:
    "none"/"full"/"low_rank"). rank_*: 0 = from the width. fresh_qkvo: q, k, v, o start fresh in place of the teacher's.
    """

    mixer: str = "rad_rwkv7"
    attention_layers: tuple[int, ...] = ()
    attention_every: int = 0
    use_rope: str = ""
    token_shift: str = ""
    gate: str = ""
    group_norm: str = ""
    balance_state: str = ""
    fresh_qkvo: bool = False
    rank_decay: int = 0
    rank_iclr: int = 0
    rank_value: int = 0
    rank_shift: int = 0
    rank_gate: int = 0


@dataclasses.dataclass(frozen=True)
class Data:
    """source: one of SOURCES; path: file, directory or hub id. tokenizer: a directory, "" = the teacher's.

    cross_document: the published behaviour, rows without boundaries. eval_rows: held-out rows at the data's end.
    max_tokens: stop tokenising there (0 = all of it, or what the recipe needs for a streamed source).
    documents, seed: how many the synthetic source makes, and which.
    """

    source: str = "text"
    path: str = ""
    name: str = ""
    split: str = "train"
    text_field: str = "text"
    streaming: bool = False
    tokenizer: str = ""
    separator: str = "\n\n\n"
    cross_document: bool = False
    max_tokens: int = 0
    eval_rows: int = 64
    documents: int = 20000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage's recipe (RADLADS section 2). Batches are of batch_size rows of seq_len tokens, in `accumulate` parts.

    accumulate: 0 for as many parts as leave one row to every group of devices along data and fsdp.
    lr -> lr_final: all weights but the mixers'; mixer_lr -> mixer_lr_final: the mixers'; a quarter cosine between the
    fractions decay_begin and decay_end of the steps, after warmup_steps from 1% to 100%. freeze: path regexes that are
    not trained. remat: "none", "dots" or "full".
    """

    tokens: int = 0
    seq_len: int = 512
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-5
    lr_final: float = 1e-5
    mixer_lr: float = 1e-5
    mixer_lr_final: float = 1e-5
    decay_begin: float = 0.0
    decay_end: float = 1.0
    warmup_steps: int = 50
    freeze: tuple[str, ...] = ()
    remat: str = "full"

    @property
    def steps(self) -> int:
        """Optimizer steps: enough whole batches for the tokens."""
        return -(-self.tokens // (self.batch_size * self.seq_len))


@dataclasses.dataclass(frozen=True)
class Optim:
    """Adam. moment_dtype: what both of its moments are kept in between steps; they are computed in float32."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    moment_dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Train:
    """Steps between log lines, between checkpoints, checkpoints kept; non-finite steps in a row that end the run.

    slice_tokens: tokens whose logits are held at once in the loss (0 = chosen by the kernel). wandb_project: "" = none.
    """

    log_every: int = 10
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    max_skipped: int = 10
    slice_tokens: int = 0
    eval_batch_size: int = 8
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis: rows over data, fsdp; weights over fsdp; heads, widths over tensor; tokens over context.

    fsdp -1: all devices that the others leave (on a CPU one); tensor is then the least, and as many more are taken as
    the rows of every stage need to be split over the rest.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1


@dataclasses.dataclass(frozen=True)
class Export:
    dtype: str = "bfloat16"
    retie: bool = False
    max_shard_gb: float = 5.0


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. dtype: of the student's activations and matmuls; its weights are float32."""

    seed: int = 0
    dtype: str = "bfloat16"
    stages: tuple[str, ...] = ("stage1", "stage2", "stage3")
    teacher: Teacher = Teacher()
    student: Student = Student()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    mesh: Mesh = Mesh()
    export: Export = Export()
    pretrain: StageConfig = StageConfig(tokens=20_000_000, lr=3e-3, lr_final=1e-4, mixer_lr=3e-3, mixer_lr_final=1e-4)
    stage1: StageConfig = StageConfig(
        tokens=100_000_000, lr=1e-3, lr_final=1e-5, mixer_lr=1e-3, mixer_lr_final=1e-5, batch_size=32
    )
    stage2: StageConfig = StageConfig(tokens=500_000_000, batch_size=96)
    stage2a: StageConfig = StageConfig(
        tokens=600_000_000,
        seq_len=4096,
        batch_size=32,
        mixer_lr=1e-4,
        decay_begin=0.833,
        decay_end=0.875,
    )
    stage3: StageConfig = StageConfig(tokens=100_000_000, seq_len=16384, batch_size=96)

    def stage(self, name: str) -> StageConfig:
        return getattr(self, name)


def defaults() -> ConfigDict:
    """The paper's recipe as a ConfigDict, locked: a field that does not exist can't be set."""
    config = ConfigDict(dataclasses.asdict(RunConfig()))
    config.teacher.scratch = ConfigDict()
    return config.lock()


def parse_arg(arg: str | None, **known: Any) -> ConfigDict:
    """Reads "name=value,name=value" (the part behind the colon in --config file.py:arg) with `known` as defaults."""
    values = dict(known)
    for part in filter(None, (arg or "").split(",")):
        key, _, text = part.partition("=")
        if key not in known:
            raise ValueError(f"the config's argument {key!r} is not known{_nearest(key, known)}")
        values[key] = _parse(text, type(known[key]), f"the config's argument {key}")
    return ConfigDict(values)


def check_override(path: str, text: str | None) -> None:
    """Raises ValueError for what stands behind "--config.": a path to no field, or a number or flag that is none.

    text: None where no value came with the name. Tuples and what is below teacher.scratch are not looked at.
    """
    kind, where = RunConfig, "config"
    for name in path.split("."):
        kind, where = _hint(kind, name, where), f"{where}.{name}"
        if not dataclasses.is_dataclass(kind):
            break
    if text is not None and kind in (int, float, bool):
        _parse(text, kind, where)


def _parse(text: str, kind: type, where: str) -> Any:
    if kind is bool:
        _require(text.lower() in ("", "1", "0", "true", "false"), where, text, "true or false")
        return text.lower() in ("", "1", "true")
    try:
        return kind(text)
    except ValueError as error:
        expected = "a whole number such as 200000" if kind is int else "a number such as 1e-5"
        raise ValueError(f"{where} is {text!r}; expected {expected}.") from error


def validate(config: ConfigDict) -> RunConfig:
    """The checked, frozen form. Raises ValueError naming the field, what was got and what is expected."""
    run = _build(RunConfig, config.to_dict(), "config")
    unknown = [s for s in run.stages if s not in STAGE_NAMES]
    if unknown:
        raise ValueError(
            f"config.stages holds {unknown}; expected names out of {', '.join(STAGE_NAMES)}. On the command line each "
            "is a flag of its own: --config.stages=stage1 --config.stages=stage2."
        )
    _require(len(set(run.stages)) == len(run.stages), "config.stages", run.stages, "each stage at most once")
    for name in run.stages:
        _check_stage(f"config.{name}", run.stage(name), run.mesh.context)
    for field, value in {
        "config.dtype": run.dtype,
        "config.teacher.dtype": run.teacher.dtype,
        "config.export.dtype": run.export.dtype,
        "config.optim.moment_dtype": run.optim.moment_dtype,
    }.items():
        _require(value in ("float32", "bfloat16"), field, value, "'float32' or 'bfloat16'")
    _check_teacher(run.teacher)
    _check_student(run.student)
    _check_data(run.data)
    _check_optim(run.optim)
    _at_least(1, run.train, "config.train", "log_every", "checkpoint_every", "keep_checkpoints", "max_skipped")
    _at_least(1, run.train, "config.train", "eval_batch_size", "sample_tokens")
    _at_least(0, run.train, "config.train", "slice_tokens")
    _at_least(1, run.mesh, "config.mesh", "data", "tensor", "context")
    fsdp = run.mesh.fsdp
    _require(fsdp == -1 or fsdp >= 1, "config.mesh.fsdp", fsdp, "at least 1, or -1 for all devices")
    _require(run.export.max_shard_gb > 0, "config.export.max_shard_gb", run.export.max_shard_gb, "more than 0")
    return run


def _check_stage(where: str, stage: StageConfig, pieces: int) -> None:
    _at_least(1, stage, where, "tokens", "seq_len", "batch_size")
    _at_least(0, stage, where, "accumulate")
    divisible = stage.seq_len % pieces == 0
    _require(divisible, f"{where}.seq_len", stage.seq_len, f"a multiple of config.mesh.context, {pieces}")
    _at_least(0, stage, where, "lr", "lr_final", "mixer_lr", "mixer_lr_final", "warmup_steps")
    _require(
        not stage.accumulate or stage.batch_size % stage.accumulate == 0,
        f"{where}.accumulate",
        stage.accumulate,
        f"a divisor of batch_size ({stage.batch_size}), or 0 for one row at a time on every group of devices",
    )
    _require(
        0 <= stage.decay_begin < stage.decay_end <= 1,
        f"{where}.decay_begin",
        stage.decay_begin,
        f"0 <= decay_begin < decay_end <= 1 (decay_end is {stage.decay_end})",
    )
    _require(stage.remat in ("none", "dots", "full"), f"{where}.remat", stage.remat, "'none', 'dots' or 'full'")
    for pattern in stage.freeze:
        _check_regex(f"{where}.freeze", pattern)


def _check_teacher(teacher: Teacher) -> None:
    _require(
        bool(teacher.path) != bool(teacher.scratch),
        "config.teacher.path",
        teacher.path,
        "a Hugging Face directory or hub id, e.g. --config.teacher.path=Qwen/Qwen2.5-0.5B-Instruct (or "
        "config.teacher.scratch, not both)",
    )


def _check_student(student: Student) -> None:
    gates = f"one of {', '.join(GATES)} or '' (the published choice)"
    _require(student.gate in ("", *GATES), "config.student.gate", student.gate, gates)
    for field in ("use_rope", "token_shift", "group_norm", "balance_state"):
        value = getattr(student, field)
        _require(
            value in ("", "on", "off"), f"config.student.{field}", value, "'on', 'off' or '' (the published choice)"
        )
    if student.group_norm == student.balance_state == "on":
        raise ValueError(
            "config.student.group_norm and config.student.balance_state are both 'on'; expected one of them, because "
            "either alone bounds the mixer's output. Set the other to 'off'."
        )
    if student.attention_every and student.attention_layers:
        raise ValueError(
            f"config.student.attention_every is {student.attention_every} and config.student.attention_layers "
            f"{student.attention_layers}; expected one of them, for both say which layers stay softmax attention. "
            "Leave one out."
        )
    _at_least(0, student, "config.student", "attention_every")
    _at_least(0, student, "config.student", "rank_decay", "rank_iclr", "rank_value", "rank_shift", "rank_gate")


def _check_data(data: Data) -> None:
    _require(data.source in SOURCES, "config.data.source", data.source, f"one of {', '.join(SOURCES)}")
    given = bool(data.path) or data.source == "synthetic"
    _require(given, "config.data.path", data.path, f"the path of the {data.source} data, e.g. --config.data.path=PATH")
    _at_least(1, data, "config.data", "eval_rows", "documents")
    _at_least(0, data, "config.data", "max_tokens")


def _check_optim(optim: Optim) -> None:
    for field in ("beta1", "beta2"):
        value = getattr(optim, field)
        _require(0 <= value < 1, f"config.optim.{field}", value, "0 or more and less than 1")
    _require(optim.eps > 0, "config.optim.eps", optim.eps, "more than 0")
    _at_least(0, optim, "config.optim", "weight_decay", "clip")


def _check_regex(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field} holds {pattern!r}, which is no regular expression ({error}).") from error


def _at_least(least: int, group: Any, where: str, *fields: str) -> None:
    for field in fields:
        value = getattr(group, field)
        _require(least <= value < math.inf, f"{where}.{field}", value, f"a number of at least {least}")


def _require(fine: bool, field: str, got: Any, expected: str) -> None:
    if not fine:
        raise ValueError(f"{field} is {got!r}; expected {expected}.")


def _hint(cls: type, name: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    if name not in hints:
        raise ValueError(f"{where}.{name} is not a field{_nearest(name, hints)}")
    return hints[name]


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    hints = {name: _hint(cls, name, where) for name in values}
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; expected a group of fields.")
        return _build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise ValueError(f"{where} is {value!r}; expected a tuple of {item.__name__}.")
        return tuple(_convert(item, v, where) for v in value)
    if typing.get_origin(hint) is dict:
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} is {value!r} ({type(value).__name__}); expected {hint.__name__}.")
    return value


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}."
