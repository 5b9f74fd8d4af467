"""What a run is told: defaults for get_config(arg), and the checked, frozen form that the code reads.

A configs/*.py file has get_config(arg) -> ConfigDict, made from `defaults()` or `recipes.paper()`. `validate` turns it
into a RunConfig and raises a ValueError that names the nearest field for a misspelt one, and got / expected for a
wrong type or value.
"""

import dataclasses
import math
import typing
from typing import Any

from ml_collections import ConfigDict

from radlads_jax import fields
from radlads_jax.fields import bounded, require
from radlads_jax.fields import parse_arg as parse_arg  # what config files take from here
from radlads_jax.student import Student, check_student
from radlads_jax.text import Data, check_data

STAGE_NAMES = ("pretrain", "stage1", "stage2", "stage2a", "stage2c", "stage3")
_DTYPES = ("float32", "bfloat16")
_OPTIMIZERS = ("adam", "adafactor")
# The largest decay of a moment that a bfloat16 follows, whose steps are at most 2^-8 of it.
_SMALL_BETA = 0.996
WARMUP = 50
RATE_FACTORS = (1 / 3, 1.0, 3.0)  # what a sweep multiplies a stage's rates by


@dataclasses.dataclass(frozen=True)
class Teacher:
    """path: a Hugging Face directory or hub id; or "" to start from fresh weights of the dimensions in `scratch`.

    logits: a directory of `python -m radlads_jax.store_logits`, which stage 2 reads in the teacher's place; "" = none.
    top_k: a KL is of so many of the teacher's likeliest tokens and of all others as one; 0 = of the whole vocabulary
    (stored: 64). temperature: what the logits of both are divided by in a KL, which is then times its square.
    look_back: of fresh weights, how many tokens back each of the first layer's first heads looks at the start.
    """

    path: str = ""
    revision: str = ""
    dtype: str = bounded("bfloat16", one_of=_DTYPES)
    logits: str = ""
    top_k: int = bounded(0, least=0)
    temperature: float = bounded(1.0, above=0)
    scratch: dict[str, Any] = dataclasses.field(default_factory=dict)
    look_back: tuple[int, ...] = ()

    @property
    def stored_top_k(self) -> int:
        return self.top_k or 64


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage's recipe (RADLADS section 2). Batches are of batch_size rows of seq_len tokens, in `accumulate` parts.

    accumulate: 0 for as many parts as leave one row to every group of devices along data and fsdp.
    mixer_lr -> mixer_lr_final: the mixers that stage 1 trains; lr -> lr_final: all other weights, kept softmax layers'
    too; a quarter cosine between the fractions decay_begin and decay_end of the steps, after warmup_steps from 1% to
    100% (in `defaults()`: a twentieth of the steps, at most 50). freeze: path regexes that are not trained. remat:
    "none", "dots" or "full". sweep: a third, once and three times the rates are tried for `trial_steps` steps first,
    the best taken.
    """

    tokens: int = bounded(0, least=1)
    seq_len: int = bounded(512, least=1)
    batch_size: int = bounded(32, least=1)
    accumulate: int = bounded(1, least=0)
    lr: float = bounded(1e-5, least=0)
    lr_final: float = bounded(1e-5, least=0)
    mixer_lr: float = bounded(1e-5, least=0)
    mixer_lr_final: float = bounded(1e-5, least=0)
    decay_begin: float = 0.0
    decay_end: float = 1.0
    warmup_steps: int = bounded(WARMUP, least=0)
    freeze: tuple[str, ...] = ()
    remat: str = bounded("full", one_of=("none", "dots", "full"))
    sweep: bool = False

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps: enough whole batches for the tokens."""
        return -(-self.tokens // self.tokens_per_step)

    @property
    def trial_steps(self) -> int:
        """The steps of each trial of a sweep: a tenth, at least 20."""
        return min(self.steps, max(20, self.steps // 10))


@dataclasses.dataclass(frozen=True)
class Optim:
    """name: adam; or adafactor, which keeps a row and a column of a matrix's second moment, and asks no beta2 or eps.

    moment_dtype: what adam's moments, or adafactor's first one, are kept in between steps; they are computed in
    float32. weight_decay: of matrices alone.
    """

    name: str = bounded("adam", one_of=_OPTIMIZERS)
    beta1: float = bounded(0.9, least=0, below=1)
    beta2: float = bounded(0.95, least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.0, least=0)
    clip: float = bounded(1.0, least=0)
    moment_dtype: str = bounded("float32", one_of=_DTYPES)


@dataclasses.dataclass(frozen=True)
class Train:
    """Steps between log lines, between checkpoints, checkpoints kept; non-finite steps in a row that end the run.

    disk_gb: what the work directory may hold, where a quota allows less than the disk has free; 0 = all of that.
    slice_tokens: tokens whose logits are held at once in the loss (0 = chosen by the kernel). wandb_project: "" = none.
    eval_every: steps between scores on held-out rows while the whole student trains, and at such a stage's end; 0: only
    when all is trained. answer_tales: made-up tales in whose answers the student is scored then too, at the end beside
    its teacher and the untrained control.
    """

    log_every: int = bounded(10, least=1)
    checkpoint_every: int = bounded(500, least=1)
    keep_checkpoints: int = bounded(2, least=1)
    disk_gb: float = bounded(0.0, least=0)
    max_skipped: int = bounded(10, least=1)
    slice_tokens: int = bounded(0, least=0)
    eval_every: int = bounded(0, least=0)
    eval_batch_size: int = bounded(8, least=1)
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = bounded(64, least=1)
    answer_tales: int = bounded(0, least=0)
    wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis: rows over data, fsdp; weights over fsdp; heads, widths over tensor; tokens over context.

    fsdp -1: all devices that the others leave (on a CPU one); tensor is then the least, and as many more are taken as
    the rows of every stage need to be split over the rest.
    """

    data: int = bounded(1, least=1)
    fsdp: int = -1
    tensor: int = bounded(1, least=1)
    context: int = bounded(1, least=1)


@dataclasses.dataclass(frozen=True)
class Export:
    """engine: the one that the directory is written for, e.g. "mlx"; "" = what most of those load that read it."""

    dtype: str = bounded("bfloat16", one_of=_DTYPES)
    retie: bool = False
    max_shard_gb: float = bounded(5.0, above=0)
    engine: str = ""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run. dtype: of the student's activations and matmuls; its weights are float32.

    added: recipes of stages beside those of STAGE_NAMES, by name (distill/stages.py, `add_stage`).
    """

    seed: int = bounded(0, least=0, below=2**31)
    dtype: str = bounded("bfloat16", one_of=_DTYPES)
    stages: tuple[str, ...] = ("stage1", "stage2", "stage3")
    teacher: Teacher = Teacher()
    student: Student = Student()  # noqa: RUF009 (it is frozen)
    data: Data = Data()  # noqa: RUF009 (it is frozen)
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
        tokens=600_000_000, seq_len=4096, batch_size=32, mixer_lr=1e-4, decay_begin=0.833, decay_end=0.875
    )
    stage2c: StageConfig = StageConfig(tokens=8_000_000, seq_len=2048, batch_size=4)
    stage3: StageConfig = StageConfig(tokens=100_000_000, seq_len=16384, batch_size=96)
    added: dict[str, StageConfig] = dataclasses.field(default_factory=dict)

    def stage(self, name: str) -> StageConfig:
        return self.added[name] if name in self.added else getattr(self, name)

    def with_stage(self, name: str, recipe: StageConfig) -> "RunConfig":
        """The same run with another recipe of this stage."""
        changed = {"added": self.added | {name: recipe}} if name in self.added else {name: recipe}
        return dataclasses.replace(self, **changed)

    @property
    def recipes(self) -> dict[str, StageConfig]:
        """Of the stages that run, in their order."""
        return {name: self.stage(name) for name in self.stages}

    @property
    def eval_tokens(self) -> int:
        """Held out of the text: rows as long as the first stage's."""
        return self.data.eval_rows * self.stage(self.stages[0]).seq_len

    def settings(self) -> dict[str, Any]:
        """Every setting as nested dicts, added stages among the others: as a config file has them."""
        settings = dataclasses.asdict(self)
        return settings | settings.pop("added")


_GROUPS = {field.name for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.default)}

# The recipes of stages that strangers add.
_ADDED: dict[str, StageConfig] = {}
# The stages that read config.data.chats.
CHAT_STAGES = {"stage2c"}


def add_recipe(name: str, recipe: StageConfig, *, reads_chats: bool = False) -> None:
    """Makes config.<name> a stage's recipe with these defaults, in what `defaults()` makes from then on."""
    if name in typing.get_type_hints(RunConfig):
        raise ValueError(f"a stage is called {name!r}, which is a setting already; expected a new name.")
    _ADDED[name] = recipe
    if reads_chats:
        CHAT_STAGES.add(name)
    else:
        CHAT_STAGES.discard(name)


def stage_names() -> tuple[str, ...]:
    """Every stage that a config may name."""
    return (*STAGE_NAMES, *_ADDED)


def defaults() -> ConfigDict:
    """The paper's recipe as a ConfigDict, locked: a field that does not exist can't be set.

    A warm-up that nobody sets follows its stage's steps: a twentieth of them, at most 50.
    """
    run = {name: value for name, value in fields.with_placeholders(RunConfig()).items() if name != "added"}
    config = ConfigDict(run | {name: fields.with_placeholders(recipe) for name, recipe in _ADDED.items()})
    config.teacher.scratch, config.student.options = ConfigDict(), ConfigDict()
    for name in stage_names():
        fields.follow(config[name], "warmup_steps", _fitting_warmup, "tokens", "seq_len", "batch_size")
    return config.lock()


def fitting_warmup(steps: int) -> int:
    """Steps of warm-up that leave a stage of so many the most of its steps at the full rate."""
    return max(0, min(WARMUP, -(-steps // 20)))


def _fitting_warmup(tokens: int, seq_len: int, batch_size: int) -> int:
    # The numbers are the user's, and not looked at yet.
    return fitting_warmup(-(-tokens // max(seq_len * batch_size, 1)))


def check_override(path: str, text: str | None) -> None:
    """Raises ValueError for what stands behind "--config.": a path to no field, or a number or flag that is none.

    text: None where no value came with the name. Tuples and what is below teacher.scratch are not looked at.
    """
    kind, where = RunConfig, "config"
    for name in path.split("."):
        hint = StageConfig if kind is RunConfig and name in _ADDED else fields.type_of(kind, name, where)
        kind, where = fields.set_type(hint), f"{where}.{name}"
        if not dataclasses.is_dataclass(kind):
            break
    if text is not None and kind in (int, float, bool):
        fields.parse(text, kind, where)


def validate(config: ConfigDict) -> RunConfig:
    """The checked, frozen form. Raises ValueError naming the field, what was got and what is expected."""
    values = config.to_dict()
    added = {name: fields.build(StageConfig, values.pop(name), f"config.{name}") for name in _ADDED if name in values}
    run = dataclasses.replace(fields.build(RunConfig, values, "config"), added=added)
    unknown = [s for s in run.stages if s not in stage_names()]
    if unknown:
        raise ValueError(
            f"config.stages holds {unknown}; expected names out of {', '.join(stage_names())}. On the command line "
            "each is a flag of its own: --config.stages=stage1 --config.stages=stage2."
        )
    require(bool(run.stages), "config.stages", run.stages, f"at least one of {', '.join(STAGE_NAMES)}")
    require(len(set(run.stages)) == len(run.stages), "config.stages", run.stages, "each stage at most once")
    fields.check_bounds("config", run)
    # Stages that are not run are not looked at.
    for name in _GROUPS - set(STAGE_NAMES):
        fields.check_bounds(f"config.{name}", getattr(run, name))
    for name, recipe in run.recipes.items():
        fields.check_bounds(f"config.{name}", recipe)
        _check_stage(f"config.{name}", recipe, run.mesh.context)
    _check_teacher(run.teacher)
    check_student(run.student)
    check_data(run.data)
    _check_chats(run)
    _check_optim(run.optim)
    fsdp = run.mesh.fsdp
    require(fsdp == -1 or fsdp >= 1, "config.mesh.fsdp", fsdp, "at least 1, or -1 for all devices")
    shard = run.export.max_shard_gb
    require(1e-9 <= shard < math.inf, "config.export.max_shard_gb", shard, "a byte (1e-9) at least, and an end")
    return run


def _check_stage(where: str, stage: StageConfig, shards: int) -> None:
    divisible = stage.seq_len % shards == 0
    require(divisible, f"{where}.seq_len", stage.seq_len, f"a multiple of config.mesh.context, {shards}")
    require(
        not stage.accumulate or stage.batch_size % stage.accumulate == 0,
        f"{where}.accumulate",
        stage.accumulate,
        f"a divisor of batch_size ({stage.batch_size}), or 0 for one row at a time on every group of devices",
    )
    require(
        0 <= stage.decay_begin < stage.decay_end <= 1,
        f"{where}.decay_begin",
        stage.decay_begin,
        f"0 <= decay_begin < decay_end <= 1 (decay_end is {stage.decay_end})",
    )
    for name, first in (("lr", stage.lr), ("mixer_lr", stage.mixer_lr)):
        final = getattr(stage, f"{name}_final")
        require(final <= first, f"{where}.{name}_final", final, f"at most {name}, {first:g}, for rates fall")
    for pattern in stage.freeze:
        fields.check_regex(f"{where}.freeze", pattern)


def _check_optim(optim: Optim) -> None:
    small = optim.moment_dtype == "bfloat16"
    if optim.name == "adafactor":
        for name in ("beta2", "eps"):
            value, default = getattr(optim, name), getattr(Optim(), name)
            require(value == default, f"config.optim.{name}", value, f"{default:g}, for adafactor asks none")
        said = "float32, for adafactor without beta1 keeps no moment in it"
        require(bool(optim.beta1) or not small, "config.optim.moment_dtype", optim.moment_dtype, said)
    for name in ("beta1", "beta2") if small else ():
        beta = getattr(optim, name)
        said = f"at most {_SMALL_BETA} where moments are kept in bfloat16, whose steps hide what moves them by less"
        require(beta <= _SMALL_BETA, f"config.optim.{name}", beta, said)


def _check_chats(run: RunConfig) -> None:
    wanted, data, names = bool(CHAT_STAGES & set(run.stages)), run.data, " or ".join(sorted(CHAT_STAGES))
    example = f"the path of conversations in .jsonl where config.stages has {names}, and nothing elsewhere"
    require(wanted == bool(data.chats), "config.data.chats", data.chats, example)
    require(wanted or not data.replay, "config.data.replay", data.replay, f"0, for config.stages has no {names}")
    field, default = data.messages_field, Data().messages_field
    said = f"{default!r}, for config.stages has no {names}"
    require(wanted or field == default, "config.data.messages_field", field, said)


def _check_teacher(teacher: Teacher) -> None:
    require(
        bool(teacher.path) != bool(teacher.scratch),
        "config.teacher.path",
        teacher.path,
        "a Hugging Face directory or hub id, e.g. --config.teacher.path=Qwen/Qwen2.5-0.5B-Instruct (or "
        "config.teacher.scratch, not both)",
    )
    back = teacher.look_back
    require(not back or not teacher.path, "config.teacher.look_back", back, "() where the teacher has weights already")
    require(min(back, default=1) > 0, "config.teacher.look_back", back, "numbers of tokens, each at least 1")
