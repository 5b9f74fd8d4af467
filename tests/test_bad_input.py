"""What a user can get wrong: one paragraph, exit code 1, no export, and the directory free for another try."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
from ml_collections import ConfigDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from untrained import random_params

from radlads_jax import launch
from radlads_jax.config import defaults, validate
from radlads_jax.models.config import ModelConfig
from radlads_jax.porting.save import save_params
from radlads_jax.run.job import make_job
from radlads_jax.run.settings import check_same_config, remember_config

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(
    family="qwen2",
    vocab_size=260,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    stacks=(("attention", 2),),
    qkv_bias=True,
    tie_embeddings=True,
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """A directory with a teacher, the same teacher in several files, and text."""
    root = tmp_path_factory.mktemp("good")
    params = random_params(CONFIG, 0.02)
    tokenizer = byte_tokenizer()
    for name, size in (("teacher", 10**9), ("sharded", 10_000)):
        save_params(params, CONFIG, root / name, base_config={"eos_token_id": 256}, max_shard_size=size)
        tokenizer.save(str(root / name / "tokenizer.json"))
        write_json(root / name / "tokenizer_config.json", {"eos_token": "<end>"})
    (root / "text.txt").write_text("\n\n\n".join(f"The number {n} follows {n - 1}." for n in range(1, 400)))
    return root


@pytest.fixture
def inputs(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "given"))


def byte_tokenizer(extra: int = 0) -> Tokenizer:
    """A token for each byte, more of its kind that nothing makes, and an end of text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [letters[0] * (2 + i) for i in range(extra)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, **keys) -> None:
    write_json(path, json.loads(path.read_text()) | keys)


def settings(inputs: Path, **fields) -> ConfigDict:
    """A run of a few steps on the given teacher and text; fields: more of them, "a.b" written a__b."""
    config = defaults()
    config.dtype = config.teacher.dtype = "float32"
    config.stages = ("stage1", "stage2")
    config.teacher.path = str(inputs / "teacher")
    config.data.path = str(inputs / "text.txt")
    config.data.eval_rows = 4
    for stage in (config.stage1, config.stage2):
        stage.tokens, stage.seq_len, stage.batch_size, stage.remat = 64, 16, 4, "none"
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def run_main(monkeypatch, config: ConfigDict, workdir: Path) -> int:
    monkeypatch.setattr(launch, "_CONFIG", SimpleNamespace(value=config))
    monkeypatch.setattr(launch, "_WORKDIR", SimpleNamespace(value=str(workdir)))
    monkeypatch.setattr(launch, "_FORCE", SimpleNamespace(value=False))
    monkeypatch.setattr(launch, "_PREFLIGHT_ONLY", SimpleNamespace(value=False))
    return launch.main(["launch"])


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def point_index_elsewhere(inputs: Path) -> None:
    index = json.loads((inputs / "sharded" / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    files = sorted(set(index["weight_map"].values()))
    wrong = next(file for file in files if file != index["weight_map"][name])
    edit_json(inputs / "sharded" / INDEX, weight_map=index["weight_map"] | {name: wrong})


def remove_shard(inputs: Path) -> None:
    sorted((inputs / "sharded").glob("*.safetensors"))[-1].unlink()


def pickled(inputs: Path) -> None:
    (inputs / "teacher" / WEIGHTS).rename(inputs / "teacher" / "pytorch_model.bin")


def too_many_ids(inputs: Path) -> None:
    byte_tokenizer(extra=10).save(str(inputs / "teacher" / "tokenizer.json"))


def no_tokenizer(inputs: Path) -> None:
    for path in (inputs / "teacher").glob("tokenizer*"):
        path.unlink()


def teacher_keys(**keys) -> Callable[[Path], None]:
    return lambda inputs: edit_json(inputs / "teacher" / "config.json", **keys)


def text(content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda inputs: (inputs / "text.txt").write_bytes(data) and None


def nothing(inputs: Path) -> None:
    del inputs


# What is done to good files, settings besides, and what the message has to say.
CASES: dict[str, tuple[Callable[[Path], object], dict, list[str]]] = {
    "missing teacher": (nothing, {"teacher__path": "/no/such/teacher"}, ["/no/such/teacher", "no existing directory"]),
    "hub id that cannot be had": (nothing, {"teacher__path": "nobody/nothing"}, ["nobody/nothing", "the hub"]),
    "no config.json": (lambda inputs: (inputs / "teacher/config.json").unlink(), {}, ["config.json does not exist"]),
    "broken config.json": (lambda inputs: cut(inputs / "teacher/config.json", 30), {}, ["config.json is not JSON"]),
    "pickles only": (pickled, {}, ["pytorch_model.bin", "never loaded"]),
    "truncated weights": (lambda inputs: cut(inputs / "teacher" / WEIGHTS, -10), {}, [WEIGHTS, "is truncated"]),
    "weights cut in the header": (lambda inputs: cut(inputs / "teacher" / WEIGHTS, 50), {}, [WEIGHTS, "has 50 bytes"]),
    "empty weights": (lambda inputs: cut(inputs / "teacher" / WEIGHTS, 0), {}, [WEIGHTS, "has 0 bytes"]),
    "index with a wrong file": (point_index_elsewhere, {"teacher__path": "sharded"}, [INDEX, "does not fit its files"]),
    "index without its file": (remove_shard, {"teacher__path": "sharded"}, [INDEX, "lacks"]),
    "weights of another width": (teacher_keys(intermediate_size=32), {}, ["misshapen", "gate_proj", "[24, 16]"]),
    "fewer layers than weights": (teacher_keys(num_hidden_layers=1), {}, ["unexpected", "model.layers.1."]),
    "more layers than weights": (teacher_keys(num_hidden_layers=3), {}, ["missing", "model.layers.2."]),
    "unknown family": (teacher_keys(model_type="mamba"), {}, ["'mamba'", "qwen2, qwen3, llama, mistral"]),
    "experts": (teacher_keys(num_experts=8), {}, ["mixture of experts", "num_experts"]),
    "a family of experts": (teacher_keys(model_type="qwen2_moe"), {}, ["'qwen2_moe'"]),
    "sliding window": (teacher_keys(use_sliding_window=True), {}, ["use_sliding_window"]),
    "mistral's sliding window": (teacher_keys(model_type="mistral", sliding_window=64), {}, ["sliding_window 64"]),
    "yarn": (teacher_keys(rope_scaling={"rope_type": "yarn", "factor": 4.0}), {}, ["'yarn'"]),
    "a student for a teacher": (
        teacher_keys(model_type="rwkv7qwen2", architectures=["RWKV7Qwen2ForCausalLM"]),
        {},
        ["rad_rwkv7 student already", "config.teacher.path"],
    ),
    "tokenizer of another model": (too_many_ids, {}, ["ids up to 266", "vocab_size is 260"]),
    "no tokenizer": (no_tokenizer, {}, ["no tokenizer that can be read"]),
    "empty text": (text(""), {}, ["text.txt has no text in it"]),
    "blank text": (text("\n \n\n\n\t\n"), {}, ["text.txt has no text in it"]),
    "text that is none": (text(b"\xff\xfe\x00"), {}, ["text.txt is no UTF-8 text"]),
    "missing text": (nothing, {"data__path": "/no/such/text"}, ["/no/such/text does not exist"]),
    "too little text": (text("One sentence. " * 8), {}, ["one batch of 4 rows"]),
    "nothing left to train on": (text("One sentence."), {}, ["eval_tokens=64", "hold out fewer tokens"]),
    "lines that are no JSON": (text("{"), {"data__source": "jsonl"}, ["line 1 is not JSON"]),
    "no such column": (text('{"body": "a"}'), {"data__source": "jsonl"}, ["no column 'text'", "body"]),
    "token file that is none": (nothing, {"data__source": "binidx"}, ["text.txt"]),
    "sequence length 0": (nothing, {"stage2__seq_len": 0}, ["config.stage2.seq_len is 0"]),
    "negative sequence length": (nothing, {"stage1__seq_len": -16}, ["config.stage1.seq_len is -16"]),
    "negative tokens": (nothing, {"stage1__tokens": -1}, ["config.stage1.tokens is -1"]),
    "both bounds of the state": (
        nothing,
        {"student__group_norm": True, "student__balance_state": True},
        ["config.student.group_norm", "config.student.balance_state"],
    ),
    "token shift in rad_rwkv7": (nothing, {"student__token_shift": True}, ["config.student.token_shift"]),
    "attention with stage 1": (nothing, {"student__mixer": "attention"}, ["config.student.mixer", "stage1"]),
    "nothing left to convert": (nothing, {"student__attention_layers": (0, 1)}, ["names all 2 layers"]),
    "a layer that is not there": (nothing, {"student__attention_layers": (2,)}, ["[2]", "0 to 1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(case, inputs, tmp_path, monkeypatch, capsys):
    damage, fields, parts = CASES[case]
    damage(inputs)
    if fields.get("teacher__path") == "sharded":
        fields = fields | {"teacher__path": str(inputs / "sharded")}
    workdir = tmp_path / "run"
    code = run_main(monkeypatch, settings(inputs, **fields), workdir)
    message = capsys.readouterr().err
    assert code == 1
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert [part for part in parts if part not in message] == [], message
    left = {path.name for path in workdir.rglob("*")} if workdir.exists() else set()
    assert not {name for name in left if "export" in name or name == "summary.json"}


@pytest.mark.parametrize("teacher", ["teacher", "sharded"])
def test_the_same_files_unharmed_are_fine(teacher, inputs, tmp_path):
    job = make_job(validate(settings(inputs, teacher__path=str(inputs / teacher))), tmp_path / "run")
    assert job.student.recurrent_mixer == "rad_rwkv7"
    assert job.load_teacher("float32")["embed"]["embedding"].shape == (260, 16)
    assert dataclasses.replace(job.teacher, dtype="float32") == CONFIG


def test_a_run_that_could_not_begin_leaves_its_directory_free(inputs, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    assert run_main(monkeypatch, settings(inputs, data__path=str(inputs / "txt")), workdir) == 1
    assert f" {inputs / 'txt'} " in capsys.readouterr().err
    assert not (workdir / "config.json").exists()
    check_same_config(workdir, settings(inputs).to_dict())


def test_a_directory_with_a_run_of_other_settings_is_refused(inputs, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"
    remember_config(workdir, settings(inputs).to_dict())
    before = (workdir / "config.json").read_bytes()
    check_same_config(workdir, settings(inputs, train__log_every=3, train__checkpoint_every=7).to_dict())
    check_same_config(workdir, settings(inputs, mesh__tensor=2, stage1__accumulate=2).to_dict())
    # A version that did not know a field yet did what is its default now.
    older = settings(inputs).to_dict()
    del older["optim"]["moment_dtype"]
    remember_config(tmp_path / "older", older)
    check_same_config(tmp_path / "older", settings(inputs).to_dict())
    with pytest.raises(ValueError, match=r"moment_dtype was 'float32' and is now 'bfloat16'"):
        check_same_config(tmp_path / "older", settings(inputs, optim__moment_dtype="bfloat16").to_dict())
    (workdir / "checkpoints" / "stage1" / "3").mkdir(parents=True)
    assert run_main(monkeypatch, settings(inputs, seed=1, stage1__lr=0.5), workdir) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "config.seed was 0 and is now 1" in message and "config.stage1.lr was 0.001 and is now 0.5" in message
    assert (workdir / "config.json").read_bytes() == before


def test_the_program_ends_with_1(inputs, tmp_path):
    """Once as a user runs it, from the command line to the exit code."""
    cut(inputs / "teacher" / WEIGHTS, -10)
    flags = [f"--config.teacher.path={inputs / 'teacher'}", f"--config.data.path={inputs / 'text.txt'}"]
    command = [sys.executable, "-m", "radlads_jax.launch", "--config", "configs/convert.py", *flags]
    done = subprocess.run(
        [*command, "--workdir", str(tmp_path / "run")],
        cwd=ROOT,
        env=processes.environ(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(rf"error: .*{re.escape(WEIGHTS)}.*\btruncated\b", done.stderr), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not list((tmp_path / "run").glob("*export*"))
