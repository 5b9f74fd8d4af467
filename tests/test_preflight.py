"""The checks before a run: what they find, what they refuse, and that a sound run loses neither time nor files."""

import dataclasses
import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from etils import epath
from ml_collections import ConfigDict
from untrained import random_params

from radlads_jax import launch
from radlads_jax.config import defaults, validate
from radlads_jax.distill.program import abstract_state
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models import ModelConfig
from radlads_jax.models.config import RopeScaling
from radlads_jax.models.tree import path_leaves
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.save import save_params
from radlads_jax.run import job as job_lib
from radlads_jax.run import preflight, train
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.teacher_weights import TeacherWeights
from radlads_jax.system import space

ROOT = pathlib.Path(__file__).parent.parent
TEACHER = ROOT / "configs" / "demo_teacher"
NAMES = ["disk", "data", "rates", "tokenizer", "checkpoints", "export", "positions", "teacher", "kernels"]


def settings(teacher: pathlib.Path = TEACHER, **fields) -> ConfigDict:
    config = defaults()
    config.dtype = config.teacher.dtype = config.export.dtype = "float32"
    config.teacher.path = str(teacher)
    config.data.source, config.data.documents, config.data.eval_rows = "synthetic", 60, 8
    config.stages = ("stage1", "stage2")
    config.train.checkpoint_every, config.train.keep_checkpoints = 1, 2
    for stage in (config.stage1, config.stage2):
        stage.seq_len, stage.batch_size, stage.tokens, stage.remat = 32, 8, 3 * 32 * 8, "none"
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def make(config: ConfigDict, workdir: pathlib.Path) -> job_lib.Job:
    return job_lib.make_job(validate(config), workdir)


@pytest.fixture
def untrained(tmp_path) -> pathlib.Path:
    """The demo's teacher with fresh weights."""
    cfg = model_config_from_hf(read_config(TEACHER))
    base = read_config(TEACHER)
    return save_params(random_params(cfg, 0.02), cfg, tmp_path / "untrained", base_config=base, tokenizer_from=TEACHER)


def check(job, **more) -> TeacherWeights:
    """The teacher's weights after the checks, which load them for one that reads them."""
    teacher = TeacherWeights(job)
    preflight.check(job, teacher, **more)
    return teacher


def holds(teacher: TeacherWeights) -> bool:
    return teacher._params is not None


def lines(text: str) -> dict[str, str]:
    """What each check said, by its name, and its verdict."""
    return {line[2]: line[0].strip() for line in re.finditer(r"^  (ok|NO)  (\w+) .*$", text, re.M)}


@pytest.mark.parametrize("mesh", [{}, {"mesh__fsdp": 4, "mesh__tensor": 2}], ids=["one device", "a mesh"])
def test_a_sound_run_gets_a_line_for_each_check(tmp_path, capsys, mesh):
    job = make(settings(**mesh), tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    teacher = check(job)
    said = lines(capsys.readouterr().out)
    assert list(said) == NAMES and all(line.startswith("ok") for line in said.values())
    assert "4 x tensor 2 of 8" in said["kernels"] if mesh else "one device of 8" in said["kernels"]
    assert "wkv7 runs as chunked" in said["kernels"]
    # 3 steps of 8 rows of 32 tokens, of data that hold rows of 32 behind the 8 that are held out.
    tokens = (job.token_file.num_tokens - 8 * 32) // 32 * 32
    assert f"stage2 reads {3 * 8 * 32 / tokens:.0%} of them" in said["data"]
    loss = float(re.search(r"loss ([\d.]+)", said["teacher"])[1])
    assert loss < 2.5, "the demo's teacher has learnt its language"
    assert sorted((tmp_path / "run").rglob("*")) == before, "nothing stays behind"
    assert holds(teacher)
    np.testing.assert_array_equal(teacher.held()["norm"]["scale"], job.load_teacher("float32")["norm"]["scale"])


def test_an_untrained_teacher_is_refused_unless_forced(untrained, tmp_path, capsys):
    job = make(settings(untrained), tmp_path / "run")
    with pytest.raises(ValueError, match=r"has a loss of \d\.\d+ .*gives 6\.798; expected.*--force"):
        check(job)
    assert lines(capsys.readouterr().out)["teacher"].startswith("NO")
    assert holds(check(job, force=True))


def test_weights_that_are_read_narrower_than_they_are_stored_are_said(untrained, tmp_path, capsys):
    for name, source, dtype in (("a", untrained, "bfloat16"), ("b", untrained, "float32"), ("c", TEACHER, "bfloat16")):
        check(make(settings(source, teacher__dtype=dtype), tmp_path / name), force=True)
        rounded = "stored as float32 are rounded to bfloat16" in lines(capsys.readouterr().out)["teacher"]
        assert rounded == (name == "a")


def test_the_teacher_is_judged_by_all_tokens_also_where_a_stage_counts_few(tmp_path, monkeypatch):
    job = make(settings(), tmp_path / "run")
    teacher, batches = job.load_teacher("float32"), job_lib.Job.batches
    whole = preflight._teacher_loss(job, teacher)

    def none_counted(self, *asked):
        return iter([batch | {"loss_mask": 0 * batch["loss_mask"]} for batch in [next(batches(self, *asked))]])

    monkeypatch.setattr(job_lib.Job, "batches", none_counted)
    assert preflight._teacher_loss(job, teacher) == whole


def test_a_text_that_is_read_too_often_is_refused(tmp_path):
    job = make(settings(), tmp_path / "run")
    held_out, starts = job.run.eval_tokens, job.token_file.document_starts
    count = int(max(starts[starts <= job.token_file.num_tokens - held_out]))
    behind = job.token_file.num_tokens - held_out - count
    said = f"{count:,} tokens besides {held_out:,} held out and {behind:,} behind those"
    assert behind and said in preflight.data(job).result and not preflight.data(job).problem
    often = make(settings(stage2__tokens=41 * count), tmp_path / "run")
    problem = preflight.data(often).problem
    assert f"stage2 would read {count:,} tokens" in problem and f"about {4 * count:,} tokens a stage" in problem
    assert "Set config.stage2.tokens." in problem


def test_the_layers_that_stay_are_told(tmp_path):
    job = make(settings(student__attention_every=2), tmp_path / "run")
    assert preflight.layers(job).result == "of 4 these stay softmax attention: 1, 3"


def test_rows_beyond_the_teachers_positions(tmp_path, capsys):
    """Of a stage that learns from the teacher; another one may go further."""
    long = {"stages": ("stage1", "stage2", "stage3"), "stage2__seq_len": 2080, "stage2__tokens": 2080 * 8}
    long |= {"data__documents": 200, "stage3__batch_size": 1}
    with pytest.raises(ValueError, match=r"is 2,048, below config\.stage2\.seq_len, 2,080; expected .*--force"):
        check(make(settings(**long), tmp_path / "run"))
    assert lines(capsys.readouterr().out)["positions"].startswith("NO")
    further = long | {"stage2__seq_len": 2048, "stage3__seq_len": 4096, "stage3__tokens": 4096}
    check(make(settings(**further), tmp_path / "other"))
    assert "rows of at most 4,096 tokens" in capsys.readouterr().out


def test_rows_within_a_linear_scaling(tmp_path):
    """Of a teacher whose max_position_embeddings is from before it."""
    job = make(settings(data__documents=250, stage2__seq_len=4096, stage2__tokens=4096 * 8), tmp_path / "run")
    assert preflight.positions(job).problem
    for factor, is_fine in ((2.0, True), (1.5, False)):
        scaled = dataclasses.replace(job.teacher, rope_scaling=RopeScaling("linear", factor))
        finding = preflight.positions(dataclasses.replace(job, teacher=scaled))
        assert bool(finding.problem) != is_fine and f"scaled for up to {factor:g} times as many" in finding.result


def test_a_full_disk_is_refused_with_what_is_needed(tmp_path, monkeypatch):
    job = make(settings(), tmp_path / "run")
    free = 10_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    finding = preflight.disk(job)
    assert "10 MB free" in finding.result and "lower config.train.keep_checkpoints" in finding.problem
    with pytest.raises(ValueError, match=rf"\d MB.*{re.escape(str(tmp_path))}.*\b10 MB\b"):
        check(job)


def test_a_quota_is_known_before_the_first_checkpoint(tmp_path, monkeypatch):
    """Qwen2.5-0.5B with the paper's tokens in 20 GB: by one checkpoint of bfloat16 moments, and not otherwise."""
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: int(1e12))
    path = ROOT / "configs" / "qwen2_5_0_5b_rad_rwkv7.py"
    config = runpy.run_path(str(path))["get_config"]("")
    teacher = ModelConfig(
        "qwen2", 151_936, 896, 4864, 14, 2, 64, (("attention", 24),), qkv_bias=True, tie_embeddings=True
    )
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "tokens.bin").open("wb") as file:
        # 510M tokens of four bytes, without filling the disk.
        file.truncate(2_044_000_000)

    def finding(**fields):
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
        run = validate(config)
        student = make_student_config(teacher, run)
        job = object.__new__(job_lib.Job)
        vars(job).update(workdir=tmp_path, run=run, student=student, teacher=teacher.as_teacher_of(student), mesh=None)
        return preflight.disk(job)

    full = finding(train__disk_gb=20.0)
    assert "disk_gb=20" in full.problem and "33.5 GB" in full.problem and "2.04 GB are taken" in full.problem
    assert finding(optim__moment_dtype="bfloat16").problem and finding(train__keep_checkpoints=1).problem == ""
    assert finding(optim__moment_dtype="float32").problem
    assert finding(optim__moment_dtype="bfloat16", export__retie=True).result.startswith("at most 16.9 GB")
    (tmp_path / "checkpoints" / "stage3" / "30").mkdir(parents=True)
    assert finding().result.startswith("at most 11.7 GB"), "one of stage 3 is there, and makes way for its last"


def test_a_bucket_has_no_free_space_to_ask_for(tmp_path, monkeypatch):
    job = make(settings(), tmp_path / "run")
    assert space.free_bytes(epath.Path("gs://bucket/run")) is None
    monkeypatch.setattr(preflight, "free_bytes", lambda directory: None)
    assert "is not known" in preflight.disk(job).result and not preflight.disk(job).problem


def test_the_disk_that_is_asked_for_is_what_a_run_fills(tmp_path, capsys):
    """Two checkpoints of each stage, a third while it is written, and the export: near it, never more."""
    job = make(settings(), tmp_path / "run")
    planned = planned_bytes(job)
    for name in job.run.stages:
        state = jax.tree.map(filled, abstract_state(job.stage_plan(name).on_one_device()))
        with Checkpoints(train.stage_directory(job, name), keep=2) as written:
            for step in (2, 3):
                written.save(step, state, data_state={}, meta={})
    export = tmp_path / "run" / "export"
    save_params(random_params(job.student, 0.02), job.student, export, base_config=job.base_config)
    checkpoints = size_of(tmp_path / "run" / "checkpoints")
    third = max(map(size_of, (tmp_path / "run" / "checkpoints").glob("*/*")))
    exported = (export / "model.safetensors").stat().st_size
    assert 0.8 * planned < checkpoints + third + exported <= planned
    # Before it has scores it exports again, beside what is there; then nothing is left to write, or looked at, or said.
    assert planned_bytes(job) == pytest.approx(exported, rel=0.2)
    summary = {"stages": [{"name": name} for name in job.run.stages]}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert planned_bytes(job) == 0
    assert not holds(check(job)) and capsys.readouterr().out == ""
    assert holds(check(job, whole=True)) and list(lines(capsys.readouterr().out)) == NAMES


def filled(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Numbers that do not compress."""
    return jnp.asarray(np.random.default_rng(0).normal(size=leaf.shape), leaf.dtype)


def size_of(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def planned_bytes(job: job_lib.Job) -> float:
    size, unit = re.search(r"at most ([\d.]+) (M?B) ", preflight.disk(job).result).groups()
    return float(size) * (1e6 if unit == "MB" else 1)


def test_a_tokenizer_that_numbers_tokens_otherwise_is_refused(tmp_path):
    other = shutil.copytree(TEACHER, tmp_path / "other")
    document = json.loads((other / "tokenizer.json").read_text())
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(document))
    job = make(settings(data__tokenizer=str(other)), tmp_path / "run")
    finding = preflight.tokenizer(job)
    assert re.search(r"\b2 tokens\b.* (a, b|b, a)\b", finding.problem)
    same = make(settings(data__tokenizer=str(shutil.copytree(TEACHER, tmp_path / "same"))), tmp_path / "run2")
    assert not preflight.tokenizer(same).problem


def test_a_checkpoint_that_comes_back_changed_is_refused(tmp_path, monkeypatch):
    job = make(settings(), tmp_path / "run")
    restore = Checkpoints.restore

    def damaged(self, step, abstract):
        state, *documents = restore(self, step, abstract)
        return jax.tree.map(lambda x: x + 1e-6, state), *documents

    monkeypatch.setattr(Checkpoints, "restore", damaged)
    with pytest.raises(ValueError, match=rf"{re.escape(str(job.workdir))} .*\bbits\b.*--workdir"):
        check(job, force=True)
    assert not (tmp_path / "run" / ".preflight").exists()


def from_scratch(**more):
    config = settings(
        teacher__path="", data__tokenizer=str(TEACHER), stages=("pretrain",), student__mixer="attention", **more
    )
    config.teacher.scratch = ConfigDict(read_config(TEACHER) | {"num_hidden_layers": 1})
    config.pretrain = config.stage1
    return config


def test_heads_that_can_not_look_back_are_refused_before_text_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"config\.teacher\.look_back .*at most 4 places"):
        make(from_scratch(teacher__look_back=(1,) * 5), tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_fresh_weights_have_no_loss_to_be_judged_by(tmp_path, capsys):
    assert not holds(check(make(from_scratch(), tmp_path / "run")))
    assert "teacher" not in lines(capsys.readouterr().out)


def test_fresh_weights_are_born_where_they_lie(tmp_path):
    over_eight = make(from_scratch(mesh__data=2, mesh__fsdp=2, mesh__tensor=2), tmp_path / "eight")
    spread = path_leaves(over_eight.load_teacher("float32"))
    alone = path_leaves(make(from_scratch(), tmp_path / "one").load_teacher("float32"))
    assert any(not leaf.is_fully_replicated for leaf in spread.values())
    for path, leaf in alone.items():
        np.testing.assert_allclose(spread[path], leaf, rtol=1e-6, atol=1e-8, err_msg=path)


def test_preflight_only_stops_before_the_run(tmp_path, monkeypatch, capsys):
    for name, value in (("_CONFIG", settings()), ("_WORKDIR", str(tmp_path / "run")), ("_PREFLIGHT_ONLY", True)):
        monkeypatch.setattr(launch, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(launch, "_FORCE", types.SimpleNamespace(value=False))
    monkeypatch.setattr(train, "convert", lambda *_: pytest.fail("the run began"))
    assert launch.main(["launch"]) == 0
    assert list(lines(capsys.readouterr().out)) == NAMES
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "data"}


def test_a_problem_ends_the_command_before_the_run(untrained, tmp_path):
    """As a user runs it: exit code 1, no checkpoint, no config.json that the next command would have to repeat."""
    flags = [f"--config.teacher.path={untrained}", "--config.data.documents=100", "--preflight-only"]
    flags += ["--config.data.eval_rows=8", "--config.stage3.batch_size=2"]
    flags += [f"--config.stage{stage}.tokens=16000" for stage in (1, 2, 3)]
    command = [sys.executable, "-m", "radlads_jax.launch", "--config=configs/demo.py", f"--workdir={tmp_path / 'run'}"]
    environ = processes.environ()
    done = subprocess.run([*command, *flags], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert list(lines(done.stdout)) == NAMES and done.stderr.startswith("error: the teacher ")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "data"}
