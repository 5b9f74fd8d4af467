"""Metrics: what a run leaves on disk after going on, after being torn off, and what the console shows."""

import io
import json
import pathlib
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from pallas_kernels.chips import chip_of_kind
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import metrics
from radlads_jax.run.metrics import MetricsLogger, mfu


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def run(workdir: pathlib.Path, stage: str, start: int, end: int, total: int = 20, tag: float = 0.0) -> None:
    with MetricsLogger(workdir, console=quiet()) as logger:
        logger.begin(stage, start, total, tokens_per_step=64)
        for step in range(start + 1, end + 1):
            logger.log(stage, step, {"loss": 1.0 / step, "tag": tag})


def steps(workdir: pathlib.Path, stage: str) -> list[tuple[int, float]]:
    return [(r["step"], r["tag"]) for r in read_metrics(workdir) if r["stage"] == stage]


def tensorboard_events(directory: pathlib.Path) -> list[Event]:
    """Reads the record files from their format: length u64, its CRC u32, the event, its CRC u32."""
    events = []
    for path in sorted(directory.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            header = data[at : at + 8]
            assert int.from_bytes(data[at + 8 : at + 12], "little") == masked_crc32c(header)
            length = int.from_bytes(header, "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_one_json_line_per_call(tmp_path: pathlib.Path) -> None:
    with MetricsLogger(tmp_path / "new" / "run", console=quiet()) as logger:
        logger.begin("stage1", 0, 2, tokens_per_step=64)
        logger.log("stage1", 1, {"loss": np.float32(0.5), "skipped": np.array(0)})
        assert read_metrics(tmp_path / "new" / "run")[0]["loss"] == 0.5
        logger.log("stage1", 2, {"loss": float("nan"), "grad_norm": float("inf")})
    lines = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first == {"stage": "stage1", "step": 1, "tokens": 64, "time": first["time"], "loss": 0.5, "skipped": 0.0}
    assert second["tokens"] == 128
    assert (second["loss"], second["grad_norm"]) == (None, None)


@pytest.mark.parametrize("start", [0, 3, 7])
def test_going_on_leaves_every_step_once(tmp_path: pathlib.Path, start: int) -> None:
    run(tmp_path, "stage1", 0, 5, tag=1)
    run(tmp_path, "stage2", 0, 7, tag=2)
    run(tmp_path, "stage2", start, 9, tag=3)
    assert steps(tmp_path, "stage1") == [(step, 1) for step in range(1, 6)]
    assert steps(tmp_path, "stage2") == [(step, 2 if step <= start else 3) for step in range(1, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_dropped(tmp_path: pathlib.Path, cut: int) -> None:
    run(tmp_path, "stage1", 0, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(tmp_path, "stage1") == [(step, 0) for step in range(1, 4)]
    run(tmp_path, "stage1", 3, 5)
    assert steps(tmp_path, "stage1") == [(step, 0) for step in range(1, 6)]


def test_a_broken_line_inside_is_an_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n{"sta\n{"stage": "a", "step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl is not JSON"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "elsewhere") == []


@pytest.mark.parametrize(("stage", "step"), [("stage1", 2), ("stage1", 1), ("stage2", 3)])
def test_steps_are_logged_in_order(tmp_path: pathlib.Path, stage: str, step: int) -> None:
    with MetricsLogger(tmp_path, console=quiet()) as logger:
        logger.begin("stage1", 0, 9, tokens_per_step=64)
        logger.log("stage1", 2, {"loss": 1})
        with pytest.raises(ValueError, match=f"step {step} of {stage} came after step 2 of stage1"):
            logger.log(stage, step, {"loss": 1})


def test_tensorboard_curves(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "mfu", lambda rate, flops: rate * flops / 1e6)
    with MetricsLogger(tmp_path, console=quiet()) as logger:
        logger.begin("stage2", 4, 8, tokens_per_step=64, flops_per_token=10.0)
        logger.log("stage2", 5, {"loss": 0.25})
        logger.progress(5, 2000.0)
    events = tensorboard_events(tmp_path / "tensorboard" / "stage2")
    values = {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value}
    assert values == {("loss", 5): 0.25, ("tokens_per_second", 5): 2000.0, ("mfu", 5): pytest.approx(0.02)}
    assert [e.step for e in events if e.session_log.status == 1] == [5], "points beyond the resumed step are purged"


def test_a_bucket_that_does_not_answer_is_told_once(tmp_path: pathlib.Path, monkeypatch: Any, caplog: Any) -> None:
    answers = iter([False, False, True, False, False])

    def send(*_: Any, **__: Any) -> bool:
        if not next(answers):
            raise ConnectionError("503")
        return True

    monkeypatch.setattr(metrics.Mirror, "send", send)
    with MetricsLogger(tmp_path, console=quiet()) as logger:
        logger.begin("stage1", 0, 9, tokens_per_step=64)
        for step in range(1, 4):
            logger.log("stage1", step, {"loss": 3.0, "tag": 0})
            logger.progress(step)
        logger.sync()
        assert len(caplog.records) == 2 and f"did not reach {tmp_path} (503)" in caplog.text
    assert len(caplog.records) == 2 and steps(tmp_path, "stage1") == [(1, 0), (2, 0), (3, 0)]


def test_closes_when_training_fails(tmp_path: pathlib.Path) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    with pytest.raises(RuntimeError, match="diverged"), MetricsLogger(tmp_path, console=terminal) as logger:
        logger.begin("stage1", 0, 9, tokens_per_step=64)
        logger.log("stage1", 1, {"loss": 3.0})
        logger.progress(1)
        raise RuntimeError("diverged")
    shown = terminal.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is shown again"
    assert len(read_metrics(tmp_path)) == 1
    logger.close()


def test_bar_shows_loss_rate_and_time_left(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    terminal = Console(file=io.StringIO(), force_terminal=True, width=160)
    with MetricsLogger(tmp_path, console=terminal) as logger:
        logger.begin("stage1", 10, 100, tokens_per_step=64)
        clock.now += 50  # compiling, which the time left must not count
        for step in (20, 30):
            logger.log("stage1", step, {"loss": 0.123456})
            logger.progress(step, 12345.6)
            clock.now += 5
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue())
    assert re.search(r"stage1 .* 30/100 +loss 0\.1235 +12,346 tokens/s +ETA 0:00:35", shown)


def test_plain_lines_when_there_is_no_terminal(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock.now)
    console = quiet()
    with MetricsLogger(tmp_path, console=console) as logger:
        logger.begin("stage1", 0, 100, tokens_per_step=64)
        for step in range(1, 101):
            logger.log("stage1", step, {"loss": 2.0})
            logger.progress(step, 50.0)
            clock.now += 1
    eta = {31: "0:01:09", 61: "0:00:39", 91: "0:00:09", 100: "0:00:00"}
    assert console.file.getvalue().splitlines() == [
        "stage1 0/100  starts",
        "stage1 1/100  loss 2  50 tokens/s",
        *(f"stage1 {step}/100  loss 2  50 tokens/s  ETA {left}" for step, left in eta.items()),
    ]


def test_only_the_first_process_writes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsLogger(tmp_path, console=quiet()) as logger:
        logger.begin("stage1", 0, 9, tokens_per_step=64)
        logger.log("stage1", 1, {"loss": 1.0})
        logger.progress(1, 5.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v9 huge", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A1000", None),
        ("cpu", None),
    ],
)
def test_peak_of_known_chips(kind: str, peak: float | None) -> None:
    chip = chip_of_kind(kind)
    assert (chip.flops if chip else None) == peak


def test_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mfu(1e6, 1e9) is None
    chips: list[Any] = [SimpleNamespace(device_kind="TPU v6 lite")] * 4
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "device_count", lambda: len(chips))
    assert mfu(918e3, 1e9) == pytest.approx(0.25)
    assert mfu(1e6, None) is None
