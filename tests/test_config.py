"""Configs: all of them load; what is misspelt, of a wrong type or contradictory is refused."""

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys

import ml_collections
import pytest
from absl import flags
from ml_collections import config_flags

from radlads_jax.config import (
    STAGE_NAMES,
    RunConfig,
    Student,
    check_override,
    defaults,
    parse_arg,
    validate,
)
from radlads_jax.distill.stages import STAGES
from radlads_jax.recipes import paper

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PAPER = [path for path in CONFIGS if "_rad_rwkv" in path.stem]
ABLATIONS = [path for path in CONFIGS if path.stem.startswith("ablation_")]
TEACHERS = {
    "qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5_1_5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2_5_3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2_5_7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2_5_14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2_5_32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2_5_72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwq_32b": "Qwen/QwQ-32B",
    "qwen3_8b": "Qwen/Qwen3-8B",
}


def load(path: pathlib.Path, arg: str | None = None) -> ml_collections.ConfigDict:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if arg is None else module.get_config(arg)


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Where a config leaves teacher and data to the user, some."""
    if not config.teacher.path and not config.teacher.scratch:
        config.teacher.path = "a/teacher"
    if config.data.source != "synthetic" and not config.data.path:
        config.data.path = "text"
    return config


def changed(path: str, value: object) -> ml_collections.ConfigDict:
    """A valid config but for one field, of whatever type."""
    config = complete(defaults())
    *groups, name = path.split(".")
    group = config
    for each in groups:
        group = group[each]
    with group.unlocked(), group.ignore_type():
        group[name] = value
    return config


def refusal(call, *args) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args)
    message = str(caught.value)
    assert message and "\n" not in message, "expected one paragraph"
    return message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_to_run_it(path):
    run = validate(complete(load(path)))
    assert run.stages
    header = path.read_text(encoding="utf-8").split('"""')[1]
    assert f"python -m radlads_jax.launch --config configs/{path.name} --workdir runs/" in header
    readme = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    assert any(f"`{name}`" in readme for name in (path.name, path.stem, path.stem.split("_rad_")[0]))


def test_all_of_the_papers_conversions_are_there():
    runs = {path.stem: validate(load(path)) for path in PAPER}
    conversions = {name: (run.teacher.path, run.student) for name, run in runs.items()}
    assert conversions == {
        f"{name}_{mixer}": (teacher, Student(mixer=mixer))
        for name, teacher in TEACHERS.items()
        for mixer in ("rad_rwkv6", "rad_rwkv7")
    }


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_recipe(path):
    run = validate(load(path))
    assert run.stages == ("stage1", "stage2", "stage3")
    # The table of hyper-parameters, and the optimizer steps that follow from it.
    rows = {
        "stage1": (512, 32, 6104, 1e-3, 1e-5, 1e-3, 1e-5),
        "stage2": (512, 96, 10173, 1e-5, 1e-5, 1e-5, 1e-5),
        "stage2a": (4096, 32, 4578, 1e-5, 1e-5, 1e-4, 1e-5),
        "stage3": (16384, 96, 64, 1e-5, 1e-5, 1e-5, 1e-5),
    }
    for name, row in rows.items():
        stage = run.stage(name)
        rates = (stage.lr, stage.lr_final, stage.mixer_lr, stage.mixer_lr_final)
        assert (stage.seq_len, stage.batch_size, stage.steps, *rates) == row
        assert stage.warmup_steps == 50
    assert (run.stage2a.decay_begin, run.stage2a.decay_end) == (0.833, 0.875)
    assert dataclasses.astuple(run.optim) == ("adam", 0.9, 0.95, 1e-8, 0.0, 1.0, "float32")
    assert run.data.cross_document
    assert validate(load(path, "long=true")).stages == ("stage1", "stage2a")


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_one_thing(path):
    run = validate(load(path))
    base = validate(paper("Qwen/Qwen2.5-7B-Instruct", "rad_rwkv6"))
    expected = {
        "ablation_rope": {"use_rope": True},
        "ablation_no_token_shift": {"token_shift": False},
        "ablation_no_gate": {"gate": "none"},
        "ablation_group_norm": {"group_norm": True, "balance_state": False},
        "ablation_fresh_qkvo": {"fresh_qkvo": True},
        "ablation_skip_stage1": {},
    }
    assert run.student == dataclasses.replace(base.student, **expected[path.stem])
    assert run.teacher == base.teacher
    skips = path.stem == "ablation_skip_stage1"
    assert run.stages == (("stage2",) if skips else ("stage1", "stage2"))
    assert sum(run.stage(name).tokens for name in run.stages) == 600_000_000


def test_converts_arguments():
    convert = ROOT / "configs/convert.py"
    run = validate(complete(load(convert, "lr=1e-4")))
    assert run.stages == ("stage1", "stage2")
    for name in set(STAGE_NAMES) - {"pretrain", "stage1"}:
        stage = run.stage(name)
        mixer_lr = 1e-3 if name == "stage2a" else 1e-4
        assert (stage.lr, stage.lr_final, stage.mixer_lr, stage.mixer_lr_final) == (1e-4, 1e-4, mixer_lr, 1e-4), name
    assert (run.stage1.lr, run.stage1.mixer_lr) == (1e-3, 1e-3)
    assert validate(complete(load(convert, "long=true,lr=2e-5"))).stages == ("stage1", "stage2a")
    assert validate(complete(load(convert))) == validate(complete(load(convert, "")))


def test_heads_look_back_at_other_tokens():
    config = load(ROOT / "configs/demo_teacher.py")
    assert validate(config).teacher.look_back == (1, 2, 1)
    config.teacher.look_back = (1, 0)
    with pytest.raises(ValueError, match=r"look_back is \(1, 0\); expected numbers of tokens, each at least 1"):
        validate(config)


@pytest.mark.parametrize(("name", "count"), [("demo", 10_000), ("demo_teacher", 100_000)])
def test_the_documents_of_a_config_are_of_its_own_language(name, count):
    config = load(ROOT / f"configs/{name}.py")
    assert validate(config).data.documents == count
    config.data.source, config.data.path = "text", "corpus.txt"
    validate(config)
    config.data.documents = count
    assert f"config.data.documents is {count}" in refusal(validate, config)


def test_parse_arg():
    assert parse_arg(None, n=1, on=False, name="a").to_dict() == {"n": 1, "on": False, "name": "a"}
    assert parse_arg("n=7,on,name=b=c", n=1, on=False, name="a").to_dict() == {"n": 7, "on": True, "name": "b=c"}
    assert parse_arg("on=0", on=True).on is False
    assert re.search("'lnog'.*'long'", refusal(lambda: parse_arg("lnog=true", long=False)))
    assert re.search(r"\blong\b.*'maybe'.*\btrue or false\b", refusal(lambda: parse_arg("long=maybe", long=False)))
    assert re.search(r"\bn\b.*'1\.5'.*\bwhole number\b", refusal(lambda: parse_arg("n=1.5", n=1)))


def test_names_that_two_files_know_agree():
    assert set(STAGE_NAMES) == set(STAGES)


def test_a_misspelt_field_can_not_be_set():
    with pytest.raises(AttributeError, match='Did you mean "seed"'):
        defaults().sed = 1
    with pytest.raises(AttributeError, match='Did you mean "tokens"'):
        defaults().stage1.tokns = 1
    with pytest.raises(TypeError, match="tokens"):
        defaults().stage1.tokens = "abc"


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("sede", 1, ["config.sede", "did you mean 'seed'?"]),
        ("stage1.tokns", 1, ["config.stage1.tokns", "did you mean 'tokens'?"]),
        ("student.xyz", 1, ["config.student.xyz", "expected one of mixer, attention_layers, attention_every"]),
        ("stage1", 5, ["config.stage1 is 5", "a group of fields"]),
        ("stage1.tokens", "abc", ["config.stage1.tokens is 'abc'", "expected int"]),
        ("stage1.tokens", True, ["config.stage1.tokens is True", "expected int"]),
        ("stage1.tokens", -1, ["config.stage1.tokens is -1", "at least 1"]),
        ("stage1.tokens", 0, ["config.stage1.tokens is 0", "at least 1"]),
        ("stage2.seq_len", 0, ["config.stage2.seq_len is 0", "at least 1"]),
        ("stage3.batch_size", -96, ["config.stage3.batch_size is -96", "at least 1"]),
        ("stage1.accumulate", 5, ["config.stage1.accumulate is 5", "divisor of batch_size (32)"]),
        ("stage1.lr", -1e-3, ["config.stage1.lr is -0.001", "at least 0"]),
        ("stage1.mixer_lr", float("nan"), ["config.stage1.mixer_lr is nan"]),
        ("stage1.lr_final", float("inf"), ["config.stage1.lr_final is inf"]),
        ("stage1.warmup_steps", -1, ["config.stage1.warmup_steps is -1"]),
        ("stage1.decay_begin", 1.0, ["config.stage1.decay_begin is 1.0", "decay_end is 1.0"]),
        ("stage2.lr_final", 1.0, ["config.stage2.lr_final is 1.0", "at most lr, 1e-05"]),
        ("stage1.mixer_lr", 1e-6, ["config.stage1.mixer_lr_final is 1e-05", "at most mixer_lr, 1e-06"]),
        ("stage1.remat", "some", ["config.stage1.remat is 'some'", "'none', 'dots' or 'full'"]),
        ("stage1.freeze", ("mlp(",), ["config.stage1.freeze", "'mlp('", "no regular expression"]),
        ("stage1.freeze", "mlp", ["config.stage1.freeze is 'mlp'", "a tuple of str"]),
        ("stages", ("stage1", "stag2"), ["config.stages", "stag2", "stage2a", "--config.stages=stage1"]),
        ("stages", ("stage1", "stage1"), ["config.stages", "each stage at most once"]),
        ("dtype", "float16", ["config.dtype is 'float16'", "'float32' or 'bfloat16'"]),
        ("teacher.dtype", "int8", ["config.teacher.dtype is 'int8'"]),
        ("teacher.path", "", ["config.teacher.path", "--config.teacher.path="]),
        ("teacher.scratch", {"model_type": "qwen2"}, ["config.teacher.path", "not both"]),
        ("teacher.look_back", (1,), ["config.teacher.look_back is (1,)", "has weights already"]),
        ("export.dtype", "fp8", ["config.export.dtype is 'fp8'"]),
        ("export.max_shard_gb", 0.0, ["config.export.max_shard_gb is 0.0"]),
        ("student.gate", "half", ["config.student.gate is 'half'", "'none', 'full' or 'low_rank'"]),
        ("student.use_rope", "yes", ["config.student.use_rope is 'yes'", "expected bool"]),
        ("student.token_shift", 1, ["config.student.token_shift is 1", "expected bool"]),
        ("student.rank_decay", -32, ["config.student.rank_decay is -32"]),
        ("student.attention_every", -1, ["config.student.attention_every is -1"]),
        ("student.attention_layers", ("1",), ["config.student.attention_layers is '1'", "expected int"]),
        ("data.source", "csv", ["config.data.source is 'csv'", "'jsonl', 'parquet'"]),
        ("data.path", "", ["config.data.path is ''", "--config.data.path="]),
        ("data.eval_rows", 0, ["config.data.eval_rows is 0"]),
        ("data.documents", 0, ["config.data.documents is 0"]),
        ("optim.beta2", 1.0, ["config.optim.beta2 is 1.0", "at least 0 and less than 1"]),
        ("optim.eps", 0.0, ["config.optim.eps is 0.0", "more than 0"]),
        ("optim.clip", float("nan"), ["config.optim.clip is nan", "at least 0"]),
        ("optim.name", "sgd", ["config.optim.name is 'sgd'", "'adam' or 'adafactor'"]),
        ("mesh.tensor", 0, ["config.mesh.tensor is 0", "at least 1"]),
        ("mesh.fsdp", 0, ["config.mesh.fsdp is 0", "-1 for all devices"]),
        ("optim.moment_dtype", "float16", ["config.optim.moment_dtype is 'float16'", "'bfloat16'"]),
        ("train.log_every", 0, ["config.train.log_every is 0", "at least 1"]),
        ("seed", 2**31, ["config.seed is 2147483648", "less than 2,147,483,648"]),
        ("data.seed", -1, ["config.data.seed is -1", "at least 0"]),
    ],
)
def test_a_wrong_field_is_named(path, value, parts):
    message = refusal(validate, changed(path, value))
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optim.name": "adafactor", "optim.beta2": 0.99},
            r"config\.optim\.beta2 is 0\.99; expected 0\.95, .*adafactor",
        ),
        ({"optim.name": "adafactor", "optim.eps": 1e-6}, r"config\.optim\.eps is 1e-06; expected 1e-08"),
        ({"data.source": "binidx", "data.max_tokens": 100}, r"config\.data\.max_tokens is 100; expected 0: .* whole"),
        ({"data.source": "synthetic"}, r"config\.data\.path is '.*'; expected nothing.*--config\.data\.source=text"),
        ({"data.split": "test"}, r"config\.data\.split is 'test'; expected 'train'.*belongs to hf, "),
        ({"data.source": "jsonl", "data.separator": "---"}, r"config\.data\.separator is '---'.*belongs to text, "),
        ({"data.text_field": "body"}, r"config\.data\.text_field is 'body'.*jsonl and parquet and hf"),
        ({"data.documents": 100}, r"config\.data\.documents is 100; expected 20000, .*belongs to synthetic, "),
        ({"data.messages_field": "talk"}, r"config\.data\.messages_field is 'talk'.*has no stage2c"),
        ({"optim.moment_dtype": "bfloat16", "optim.beta2": 0.999}, r"config\.optim\.beta2 is 0\.999.*at most 0\.996"),
        ({"optim.name": "adafactor", "optim.beta1": 0.0, "optim.moment_dtype": "bfloat16"}, r"moment_dtype.*float32"),
    ],
)
def test_what_another_setting_leaves_without_effect(fields, message):
    chosen = complete(defaults())
    chosen.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        validate(chosen)
    first = next(iter(fields))
    chosen.update_from_flattened_dict({first: defaults().to_dict()[first.split(".")[0]][first.split(".")[1]]})
    validate(chosen)


def test_every_number_has_bounds():
    """But those whose rule is of more than a range."""
    free = {"decay_begin", "decay_end", "mesh.fsdp"}
    groups = {f.name: f.default for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.default)}
    for name, group in [("", RunConfig()), *groups.items()]:
        for field in dataclasses.fields(group):
            where = f"{name}.{field.name}" if name in ("data", "mesh") else field.name
            is_number = type(getattr(group, field.name)) in (int, float)
            assert ("bounds" in field.metadata or not is_number) != (where in free), where


@pytest.mark.parametrize("path", ["stage2.freeze", "student.attention_layers", "train.sample_prompts"])
@pytest.mark.parametrize("value", [("",), [""], (), []])
def test_an_empty_flag_is_an_empty_tuple(path, value):
    run = validate(changed(path, value))
    group, name = path.split(".")
    assert getattr(getattr(run, group), name) == ()


@pytest.mark.parametrize("value", [("",), ()])
def test_a_run_has_stages(value):
    message = refusal(validate, changed("stages", value))
    assert "config.stages" in message and "stage1, stage2" in message


def test_stages_that_are_not_run_are_not_looked_at():
    config = changed("stage3.tokens", 0)
    config.stages = ("stage1", "stage2")
    assert validate(config).stages == ("stage1", "stage2")


def test_two_placements_are_refused():
    config = changed("student.attention_every", 2)
    config.student.attention_layers = (1,)
    with pytest.raises(ValueError, match=r"attention_every is 2.*attention_layers"):
        validate(config)


def test_both_answers_to_the_size_of_the_state():
    config = changed("student.group_norm", True)
    assert validate(config).student.group_norm is True
    config.student.balance_state = True
    message = refusal(validate, config)
    assert "student.group_norm" in message and "student.balance_state" in message


@pytest.mark.parametrize(
    ("path", "text", "part"),
    [
        ("stag1.tokens", "5", "config.stag1 is not a field; did you mean 'stage1'?"),
        ("stage1.tokns", "5", "config.stage1.tokns is not a field; did you mean 'tokens'?"),
        ("stage1.tokens", "abc", "config.stage1.tokens is 'abc'; expected a whole number"),
        ("stage1.tokens", "1e6", "expected a whole number such as 200000"),
        ("stage1.lr", "fast", "config.stage1.lr is 'fast'; expected a number"),
        ("data.streaming", "maybe", "config.data.streaming is 'maybe'; expected true or false"),
        ("student.use_rope", "on", "config.student.use_rope is 'on'; expected true or false"),
        ("optim.nmae", "adafactor", "config.optim.nmae is not a field; did you mean 'name'?"),
    ],
)
def test_overrides_that_are_refused(path, text, part):
    assert part in refusal(check_override, path, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("stage1.tokens", "200_000"),
        ("stage1.lr", "1e-4"),
        ("data.streaming", None),
        ("data.streaming", "True"),
        ("student.mixer", "rad_rwkv6"),
        ("student.attention_layers", "1,2"),
        ("teacher.scratch.vocab_size", "512"),
    ],
)
def test_overrides_that_are_fine(path, text):
    check_override(path, text)


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.student.use_rope=true", {"use_rope": True}),
        ("--config.student.balance_state", {"balance_state": True}),
        ("--noconfig.student.token_shift", {"token_shift": False}),
        ("--config.student.group_norm=false", {"group_norm": False}),
        ("--config.student.gate=none", {"gate": "none"}),
    ],
)
def test_switches_on_the_command_line(monkeypatch, flag, expected):
    argv = ["launch", flag]
    monkeypatch.setattr(sys, "argv", argv)
    values, config = flags.FlagValues(), complete(defaults())
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
    check_override(flag.split("config.")[1].split("=")[0], flag.partition("=")[2] or None)
    values(argv)
    assert validate(config).student == Student(**expected)


def test_importing_configs_is_quick():
    code = "import sys, radlads_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
