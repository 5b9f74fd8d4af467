"""Every path in a bucket: the same conversion as on a disk, read and written in place; refusals before any training."""

import gzip
import json
import pathlib
import signal
import subprocess
import sys
import time

import fsspec
import jax
import numpy as np
import processes
import pyarrow
import pyarrow.parquet
import pytest
import tiny_run
from etils.epath import backend
from fake_gcs import FakeGcs
from ml_collections import ConfigDict
from test_many_hosts import assert_same_run, command, finish, start
from untrained import TEACHER, random_params, save_teacher

from radlads_jax.config import defaults, validate
from radlads_jax.data import binidx, synthetic
from radlads_jax.data.sources import Source, documents, fingerprint
from radlads_jax.decoding.loaded import load_model
from radlads_jax.distill.mesh import make_mesh
from radlads_jax.evaluation.model_scores import output_directory
from radlads_jax.models.decoder import abstract_params
from radlads_jax.models.placement import shardings
from radlads_jax.planning.planner import teacher_config
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.report import write_report
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import train
from radlads_jax.run.exporting import export_again
from radlads_jax.run.job import make_job
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.run.settings import check_same_config, remember_config
from radlads_jax.system import storage
from radlads_jax.system.stopping import Interrupted

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gcs(tmp_path_factory):
    """A store of one bucket, to which this process's clients go."""
    with FakeGcs("bucket").serving() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in store.environ().items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        pytest.importorskip("gcsfs")
        forget_clients()
        yield store
        forget_clients()


def forget_clients() -> None:
    storage._require_bucket.cache_clear()
    backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.get_filesystem_class("gcs").clear_instance_cache()


@pytest.fixture
def another_host(gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("corpus") / "tales.jsonl"
    file.write_text("".join(json.dumps({"text": synthetic.document(0, i)}) + "\n" for i in range(60)))
    return file


def tiny_config(teacher, data) -> ConfigDict:
    settings = tiny_run.settings(teacher, steps={"stage1": tiny_run.STEPS["stage1"]})
    del settings["data.documents"]
    settings |= {"data.source": "jsonl", "data.path": str(data)}
    settings |= {"train.log_every": 2, "train.checkpoint_every": 4}
    config = defaults()
    config.update_from_flattened_dict(settings)
    return config


def convert(config: ConfigDict, workdir) -> dict:
    path = storage.as_path(workdir)
    storage.require_writable(path)
    check_same_config(path, config.to_dict())
    job = make_job(validate(config), path)
    remember_config(path, config.to_dict())
    return train.convert(job)


@pytest.fixture(scope="module")
def finished(teacher_dir, corpus, tmp_path_factory) -> pathlib.Path:
    """The directory of a run on the disk."""
    workdir = tmp_path_factory.mktemp("run")
    convert(tiny_config(teacher_dir, corpus), workdir)
    return workdir


@pytest.fixture(scope="module")
def run(gcs, finished, teacher_dir, corpus) -> str:
    """The same run in the bucket, stopped once and continued."""
    gcs.put_directory(teacher_dir, "bucket", "teacher")
    gcs.put("bucket", "tales.jsonl", corpus.read_bytes(), {})
    config, log = tiny_config("gs://bucket/teacher", "gs://bucket/tales.jsonl"), MetricsLogger.log

    def log_and_stop(self, name, step, values):
        log(self, name, step, values)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(MetricsLogger, "log", log_and_stop)
        convert(config, "gs://bucket/run")
    assert not gcs.names("bucket", "run/export") and not gcs.names("bucket", "run/summary.json")
    convert(config, "gs://bucket/run")
    return "gs://bucket/run"


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "time"} for record in records]


def test_a_run_in_a_bucket_is_the_run_on_the_disk(gcs, run, finished, tmp_path):
    fetched = gcs.get_directory("bucket", "run", tmp_path)
    for name in ("model.safetensors", "tokenizer.json", "modeling_rwkv7qwen2.py", "generation_config.json"):
        assert (fetched / "export" / name).read_bytes() == (finished / "export" / name).read_bytes()
    assert {p.name for p in (fetched / "export").iterdir()} == {p.name for p in (finished / "export").iterdir()}
    assert without_times(read_metrics(run)) == without_times(read_metrics(finished))
    summaries = [json.loads((workdir / "summary.json").read_text()) for workdir in (fetched, finished)]
    assert summaries[0]["student"] == summaries[1]["student"]
    assert (fetched / "report" / "index.html").read_text().count("<section") > 5
    assert len(list((fetched / "tensorboard" / "stage1").glob("events*"))) == 2
    assert sorted(p.name for p in (fetched / "checkpoints" / "stage1").iterdir()) == ["4", "5"]


def test_a_finished_run_in_a_bucket_does_nothing(gcs, run, capsys):
    before = dict(gcs.buckets["bucket"])
    convert(tiny_config("gs://bucket/teacher", "gs://bucket/tales.jsonl"), run)
    assert "nothing to do" in capsys.readouterr().out
    written = {name for name, stored in gcs.buckets["bucket"].items() if before.get(name) != stored}
    assert written == {"run/config.json"} and gcs.buckets["bucket"].keys() == before.keys()


def test_the_other_commands_take_it(gcs, run, finished):
    models = [load_model(path) for path in (run, finished)]
    assert str(models[0].directory) == f"{run}/export"
    jax.tree.map(np.testing.assert_array_equal, models[0].params, models[1].params)
    assert models[0].encode("This is a tale") == models[1].encode("This is a tale")
    page = write_report(run)
    assert str(page) == f"{run}/report/index.html" and "gs://bucket/teacher" in page.read_text()
    assert str(output_directory(run, None)) == run
    target = export_again(run, "gs://bucket/again", dtype="bfloat16")
    assert str(target) == "gs://bucket/again"
    assert len(gcs.buckets["bucket"]["again/model.safetensors"][0]) < len(
        gcs.buckets["bucket"]["run/export/model.safetensors"][0]
    )
    planned = validate(tiny_config("gs://bucket/teacher", "unused"))
    assert teacher_config(planned).hidden_size == TEACHER.hidden_size


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_devices_together_read_a_teacher_once(gcs, run, teacher_dir, mesh):
    del run
    config = tiny_config("gs://bucket/teacher", "unused")
    config.mesh.update(mesh)
    config.stage1.batch_size = 8
    placed = shardings(make_mesh(validate(config)), abstract_params(TEACHER), TEACHER)
    name = "teacher/model.safetensors"
    gcs.read.clear()
    got = load_params("gs://bucket/teacher", TEACHER, dtype="float32", shardings=placed)
    assert gcs.read[name] < 1.05 * len(gcs.buckets["bucket"][name][0])
    want = load_params(teacher_dir, TEACHER, dtype="float32", shardings=placed)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.sharding == y.sharding, got, want))


def test_tokens_are_prepared_once_and_copied_to_every_host(gcs, run, another_host):
    del run
    names = gcs.names("bucket", "run/data/")
    assert sorted(name.rsplit(".")[-1] for name in names) == ["bin", "idx", "json"]
    gcs.read.clear()
    prefix = f"gs://bucket/{names[0].removesuffix('.bin')}"
    first, second = binidx.open_token_file(prefix), binidx.open_token_file(f"{prefix}.bin")
    assert isinstance(first.tokens, np.memmap) and first.num_documents == 60
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.tokens.tobytes() == gcs.buckets["bucket"][names[0]][0]
    assert gcs.read[names[0]] == first.tokens.nbytes


def test_what_is_read_from_the_bucket_leaves_no_copy_here(gcs, tmp_path_factory):
    """Stored logits are many times the disk of the host that writes them."""
    path = storage.as_path("gs://bucket/logits/block.bin")
    for keep in (False, True):
        written = storage.unpublished(path, kept=True)
        written.write_bytes(b"x" * 1000)
        storage.publish(written, path, keep=keep)
        assert gcs.names("bucket", "logits/") == ["logits/block.bin"] and not written.exists()
        assert storage._place_of_copy(path).exists() == keep


def test_a_token_file_that_is_written_again_is_fetched_again(gcs):
    for ids in ([1, 2, 3], [4, 5, 6]):
        with binidx.TokenFileWriter("gs://bucket/tokens/mine", 100) as writer:
            writer.add(ids)
        assert binidx.open_token_file("gs://bucket/tokens/mine").tokens.tolist() == ids
    with pytest.raises(ZeroDivisionError), binidx.TokenFileWriter("gs://bucket/tokens/other", 100) as writer:
        writer.add([1 // 0])
    assert gcs.names("bucket", "tokens/") == ["tokens/mine.bin", "tokens/mine.idx"]


def test_text_of_every_kind_is_read_in_place(gcs, tmp_path):
    texts = ["Ein Märchen.", "Noch eins,\nmit zwei Zeilen.", "水"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("\n\n\n".join(texts[:2]), encoding="utf-8")
    (tmp_path / "plain" / "b.txt").write_text(texts[2], encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    import datasets

    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    gcs.put_directory(tmp_path, "bucket", "text")
    kinds = {"plain": "text", "lines.jsonl": "jsonl", "packed.jsonl.gz": "jsonl", "rows.parquet": "parquet"}
    for name, kind in (kinds | {"saved": "hf"}).items():
        source = Source(f"gs://bucket/text/{name}", kind)
        assert list(documents(source)) == texts, name
        before = fingerprint(source)
        assert before == fingerprint(source) and before["files"]
        assert before == fingerprint(Source(str(tmp_path / name), kind)), "wherever it lies"
    gcs.put("bucket", "text/lines.jsonl", lines.upper().encode(), {})
    there, here = (Source(f"{place}/lines.jsonl", "jsonl") for place in ("gs://bucket/text", tmp_path))
    assert fingerprint(there) != fingerprint(here)


def test_an_export_that_fails_is_none_and_is_replaced(gcs, monkeypatch):
    def save(directory: str, shard: int = 10**9):
        base = {"model_type": "qwen2", "eos_token_id": 0}
        return save_params(random_params(TEACHER), TEACHER, directory, base_config=base, max_shard_size=shard)

    save("gs://bucket/export", 50_000)
    assert len(gcs.names("bucket", "export/model-")) > 1 and "export/config.json" in gcs.names("bucket")
    monkeypatch.setattr("radlads_jax.porting.safetensors_write._as_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save("gs://bucket/export")
    assert gcs.names("bucket", "export/") == ["export/.partial"]
    with pytest.raises(ValueError, match=r"gs://bucket/export .*\bno weights\b.*model\.safetensors"):
        load_model("gs://bucket/export")
    monkeypatch.undo()
    save("gs://bucket/export")
    assert {"export/config.json", "export/model.safetensors"} <= set(gcs.names("bucket", "export/"))
    assert "export/.partial" not in gcs.names("bucket")
    gcs.put("bucket", "mine/deep/notes.txt", b"mine", {})
    with pytest.raises(ValueError, match=r"gs://bucket/mine .*config\.json"):
        save("gs://bucket/mine")


def test_what_was_logged_beyond_a_checkpoint_is_dropped_in_a_bucket_too(gcs):
    def log(start: int, steps: range) -> None:
        with MetricsLogger("gs://bucket/log") as logger:
            logger.begin("stage1", start, 10, tokens_per_step=1)
            for step in steps:
                logger.log("stage1", step, {"loss": float(step)})
            logger.sync()
            assert [r["step"] for r in read_metrics("gs://bucket/log")] == list(range(1, steps.stop))

    log(0, range(1, 5))
    log(2, range(3, 4))
    assert gcs.names("bucket", "log/tensorboard/stage1/events")


def test_between_two_attempts_to_send_is_a_pause(gcs, monkeypatch):
    """A client tries for minutes, and no step is to wait for it each time."""

    def fail(*_, **__):
        raise ConnectionError

    mirror = storage.Mirror(storage.as_path("gs://bucket/pause"))
    (mirror.path / "a").write_text("a")
    with monkeypatch.context() as patch:
        patch.setattr(storage._filesystem(), "put_file", fail)
        with pytest.raises(ConnectionError):
            mirror.send()
        assert not mirror.send(every=60.0)
    assert mirror.send() and gcs.names("bucket", "pause/") == ["pause/a"]
    mirror.close()


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("gs://nowhere/run", r"gs://nowhere .*buckets create gs://nowhere\b"),
        ("gs:/bucket/run", "gs:/bucket/run .*gs://BUCKET/NAME"),
        ("s3://bucket/run", "s3://bucket/run .*gs://BUCKET/NAME"),
        ("gs://", "^gs:// .*gs://BUCKET/NAME"),
    ],
)
def test_urls_that_lead_nowhere(gcs, where, said):
    with pytest.raises(ValueError, match=said):
        storage.as_path(where)


@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
def test_a_missing_permission_is_told_before_any_work(gcs, monkeypatch, method):
    path = storage.as_path("gs://bucket/may")
    monkeypatch.setattr(gcs, "denied", {method})
    with pytest.raises(ValueError, match=r"gs://bucket/may .*roles/storage\.objectAdmin") as refused:
        storage.require_writable(path)
    assert "someone" in str(refused.value) and len(str(refused.value)) < 700
    if method == "GET":
        storage._require_bucket.cache_clear()
        with pytest.raises(ValueError, match=r"gs://bucket .*roles/storage\.objectViewer"):
            storage.as_path("gs://bucket/may")


def test_without_the_client_a_bucket_names_the_extra(gcs, monkeypatch):
    storage._require_bucket.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[gcs\]'"):
        storage.as_path("gs://bucket/run")


def test_the_command_refuses_in_one_paragraph(gcs, monkeypatch):
    monkeypatch.setattr(gcs, "denied", {"POST"})
    flags = ["--config=configs/convert.py", "--config.teacher.path=gs://bucket/teacher", "--config.data.path=x.txt"]
    done = subprocess.run(
        [sys.executable, "-m", "radlads_jax.launch", *flags, "--workdir=gs://bucket/new"],
        cwd=ROOT,
        env=processes.environ(**gcs.environ()),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: gs://bucket/new cannot be written") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_hosts_share_nothing_but_a_bucket(gcs, teacher_dir, tmp_path):
    """Each has a disk of its own. Stopped by a signal to one of them, and continued."""
    gcs.put_directory(teacher_dir, "bucket", "slow/teacher")
    stages, mixer = ("stage1", "stage2"), "rad_rwkv7"
    finish(start(command(teacher_dir, tmp_path / "one", "fsdp=1", stages, mixer), 1, 1))
    words = command("gs://bucket/slow/teacher", "gs://bucket/slow/run", "fsdp=2,tensor=2", stages, mixer)
    started = start(words, 2, 2, tmp_path / "disks")
    while not gcs.names("bucket", "slow/run/checkpoints/") and started[0].poll() is None:
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    finish(started, 128 + signal.SIGTERM)
    assert not gcs.names("bucket", "slow/run/export")
    copies = [{file.suffix for file in (tmp_path / "disks" / str(i)).rglob("synthetic-*")} for i in range(2)]
    assert copies == [{".bin", ".idx"}] * 2
    finish(start(words, 2, 2, tmp_path / "disks"))
    assert_same_run(gcs.get_directory("bucket", "slow/run", tmp_path / "two"), tmp_path / "one")
