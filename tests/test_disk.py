"""Full disks and damaged files: what was whole stays, the error says so, and the run goes on to the same bits."""

import contextlib
import json
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import killed
import numpy as np
import pytest
import tiny_run
from untrained import TEACHER, random_params, save_teacher

from radlads_jax.porting.save import save_params
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.curves import Curves
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.system.stopping import Interrupted


@contextlib.contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: the error of a full disk, for everybody and on any machine."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_that_does_not_fit(tmp_path: pathlib.Path) -> None:
    x = {"x": jnp.asarray(np.random.default_rng(0).standard_normal(100_000), jnp.float32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, x, data_state={}, meta={}, wait=True)
    with full_beyond(50_000):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(2, x, data_state={}, meta={})
        with pytest.raises(OSError, match=rf"{re.escape(str(tmp_path))}.*\bstep 1\b"):
            checkpoints.wait()
        checkpoints.close()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest(checkpoints.restore_meta) == (1, {})
        checkpoints.save(2, x, data_state={}, meta={}, wait=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
        assert np.array_equal(checkpoints.restore(2, x)[0]["x"], x["x"])


def test_an_export_that_does_not_fit_leaves_the_one_before(tmp_path: pathlib.Path) -> None:
    first, second = (random_params(TEACHER, seed=seed) for seed in (0, 1))
    save_params(first, TEACHER, tmp_path / "export", base_config={})
    before = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    with full_beyond(20_000), pytest.raises(OSError, match="File too large"):
        save_params(second, TEACHER, tmp_path / "export", base_config={})
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    save_params(second, TEACHER, tmp_path / "export", base_config={})
    assert (tmp_path / "export" / "model.safetensors").read_bytes() != before["model.safetensors"]


def test_an_export_ended_between_its_two_renames_is_still_there(tmp_path: pathlib.Path) -> None:
    save_params(random_params(TEACHER), TEACHER, tmp_path / "export", base_config={})
    weights = (tmp_path / "export" / "model.safetensors").read_bytes()
    (tmp_path / "export").rename(tmp_path / ".export.replaced")
    (tmp_path / ".export.partial").mkdir()
    with full_beyond(20_000), pytest.raises(OSError, match="File too large"):
        save_params(random_params(TEACHER, seed=1), TEACHER, tmp_path / "export", base_config={})
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == weights


def test_metrics_that_do_not_fit(tmp_path: pathlib.Path) -> None:
    def log(start: int, end: int) -> None:
        with MetricsLogger(tmp_path) as logger:
            logger.begin("stage1", start, 100, tokens_per_step=1)
            for step in range(start + 1, end + 1):
                logger.log("stage1", step, {"loss": 1 / step})
                logger.progress(step)

    with full_beyond(3000), pytest.raises(OSError, match="File too large"):
        log(0, 100)
    written = read_metrics(tmp_path)
    assert 10 < len(written) < 60
    log(len(written) - 5, 100)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(i, 1 / i) for i in range(1, 101)]


def test_curves_that_do_not_fit_are_an_error_and_no_wait(tmp_path: pathlib.Path) -> None:
    curves = Curves(tmp_path, purge_step=1)
    with full_beyond(3000), pytest.raises(OSError, match="File too large"):
        for step in range(1000):
            curves.add_scalar("loss", 1.0, step)
            curves.flush()
    curves.close()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def damage(checkpoint: pathlib.Path) -> None:
    """Flips a bit in every file of arrays' data, parameters and optimizer."""
    large = [path for path in (checkpoint / "state").rglob("*/d/*") if path.stat().st_size > 20_000]
    assert large
    for path in large:
        data = bytearray(path.read_bytes())
        # All over the file: arrays lie in it in another order every time, and not each of them is read again.
        for place in range(len(data) // 2 % 512, len(data), 512):
            data[place] ^= 1
        path.write_bytes(data)


def test_a_run_goes_on_from_the_newest_whole_checkpoints(teacher, tmp_path, monkeypatch, capsys) -> None:
    """The last one of a stage that is over, and the newest of the one after it, each with one flipped bit."""
    steps = {name: tiny_run.STEPS[name] for name in ("stage1", "stage2")}
    assert steps == {"stage1": 5, "stage2": 4}
    settings = tiny_run.settings(teacher, steps=steps)
    tiny_run.convert(tmp_path / "undisturbed", settings)
    log = MetricsLogger.log

    def log_and_stop(self: MetricsLogger, stage: str, step: int, values: Any) -> None:
        log(self, stage, step, values)
        if (stage, step) == ("stage2", 2):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLogger, "log", log_and_stop)
        with pytest.raises(Interrupted):
            tiny_run.convert(tmp_path / "damaged", settings)
    checkpoints = tmp_path / "damaged" / "checkpoints"
    damage(checkpoints / "stage1" / "5")
    damage(checkpoints / "stage2" / "3")
    capsys.readouterr()
    tiny_run.convert(tmp_path / "damaged", settings)
    said = capsys.readouterr().out
    assert re.search(r"stage2: continuing .*\b2 of 4\b", said)
    assert re.search(r"going back .*\b5\b", said)
    assert re.search(r"stage1: continuing .*\b4 of 5\b", said)
    aside = {path.name for path in checkpoints.glob("*-damaged")}
    assert aside == {"stage1-5-damaged", "stage2-3-damaged"}
    for name in aside:
        shutil.rmtree(checkpoints / name)
    expected, got = (killed.result(tmp_path / name, steps) for name in ("undisturbed", "damaged"))
    # The repeated steps of stage 1 were logged after those of stage 2.
    got["metrics"] = sorted(got["metrics"], key=lambda line: (line["stage"], line["step"]))
    assert [name for name in expected if got[name] != expected[name]] == []


ROOMS = """
disk=$1 rooms=$2
shift 2
mount -t tmpfs -o size=100k tmpfs "$disk" || exit 1
for room in $rooms; do
    mount -o remount,size=${room}k "$disk" || exit 1
    "$PYTHON" -m radlads_jax.launch "$@" >> "$LOG" 2>&1
    echo "$room $?" >> "$LOG.codes"
done
cp -r "$disk/run" "$OUT"
"""


def namespace() -> list[str]:
    """A command that may mount in a namespace of its own, as root or as a user who is root there."""
    for words in (["unshare", "-m"], ["unshare", "-Urm"]):
        if shutil.which("unshare") and subprocess.run([*words, "mount", "-t", "tmpfs", "none", "/mnt"]).returncode == 0:
            return words
    pytest.skip("neither root nor a user namespace may mount a small disk here")


@pytest.mark.slow
def test_a_run_on_a_disk_that_is_full_again_and_again(teacher, tmp_path) -> None:
    """The room grows from nothing to enough in steps of a few kilobytes; every start ends where that is used up."""
    cache = tmp_path / "cache"
    with killed.Starter(cache) as starter:
        words = killed.flags(teacher, tmp_path / "undisturbed", "rad_rwkv7")
        whole = starter.attempt(words, tmp_path / "undisturbed", killed.Moment(), "KILL", fresh=True)
        assert whole.code == 0, whole.text
    used = sum(path.stat().st_size for path in (tmp_path / "undisturbed").rglob("*") if path.is_file()) // 1000
    rooms = [40, *(int(used * share) for share in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5)), 10 * used]
    (tmp_path / "disk").mkdir()
    environ = killed.environment(cache) | {"PYTHON": sys.executable, "LOG": f"{tmp_path}/log", "OUT": f"{tmp_path}/run"}
    flags = killed.flags(teacher, tmp_path / "disk" / "run", "rad_rwkv7")
    command = [*namespace(), "bash", "-c", ROOMS, "rooms", str(tmp_path / "disk"), " ".join(map(str, rooms)), *flags]
    done = subprocess.run(command, env=environ, cwd=killed.ROOT, capture_output=True, text=True)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0, done.stderr + log[-5000:]
    codes = [line.split()[1] for line in (tmp_path / "log.codes").read_text().splitlines()]
    print(dict(zip(rooms, codes, strict=True)))
    assert codes[-1] == "0" and set(codes) == {"0", "1"} and codes.count("1") >= 4
    assert log.count("error: ") == codes.count("1")
    assert killed.problems(tmp_path / "run", killed.result(tmp_path / "undisturbed")) == []
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]
