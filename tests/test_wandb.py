"""Weights & Biases: nothing of it unless asked for, and then every step once, a run that goes on with its run."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time
import types

import pytest

from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.run.wandb_curves import WandbCurves

SETTINGS = {"seed": 0, "stages": ("stage1",)}


class StandIn(types.ModuleType):
    """The part of wandb that is used, which notes what it is asked."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=RuntimeError)
        self.begun: list[dict] = []
        self.logged: list[dict] = []
        self.metrics: list[tuple] = []
        self.finished = 0
        self.refuses = ""

    def init(self, **options) -> "StandIn":
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.begun.append(options)
        self.id = options["id"] or "new"
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def train(workdir: pathlib.Path, steps: range) -> None:
    workdir.mkdir(exist_ok=True)
    with MetricsLogger(workdir, wandb=WandbCurves(workdir, "mine", SETTINGS)) as logger:
        logger.begin("stage1", steps.start - 1, 9, tokens_per_step=64)
        for step in steps:
            values = {"loss": 1 / step, "grad_norm": float("nan"), "layer_loss": [1.0, 2.0], "finite": 0.0}
            logger.log("stage1", step, values)


def test_every_step_goes_there_and_a_run_goes_on(wandb, tmp_path) -> None:
    train(tmp_path / "run", range(1, 3))
    assert wandb.begun == [
        {
            "project": "mine",
            "name": "run",
            "id": None,
            "resume": "allow",
            "dir": str(tmp_path / "run"),
            "config": SETTINGS,
        }
    ]
    assert wandb.logged == [{"stage1/step": n, "stage1/loss": 1 / n, "stage1/finite": 0.0} for n in (1, 2)]
    assert wandb.metrics == [("stage1/step", None), ("stage1/*", "stage1/step")] and wandb.finished == 1
    train(tmp_path / "run", range(3, 5))
    assert wandb.begun[1]["id"] == "new" and [line["stage1/step"] for line in wandb.logged] == [1, 2, 3, 4]


def test_what_wandb_refuses_is_one_paragraph(wandb, tmp_path) -> None:
    wandb.refuses = "api_key not configured"
    with pytest.raises(ValueError, match=r"api_key not configured.*WANDB_MODE=offline"):
        WandbCurves(tmp_path, "mine", SETTINGS)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"'mine', but wandb can not be imported.*radlads-jax\[wandb\]"):
        WandbCurves(tmp_path, "mine", SETTINGS)


def test_it_is_not_imported_unless_asked_for() -> None:
    code = "import sys, radlads_jax.run.train, radlads_jax.launch; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (the extra wandb)")
def test_offline_everything_stays_in_the_work_directory(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for steps in (range(1, 3), range(3, 5)):
        train(tmp_path / "run", steps)
    files = [path for path in (tmp_path / "run" / "wandb").rglob("*.wandb")]
    identity = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert len(files) == 2 and all(identity in path.name for path in files)
    end = time.monotonic() + 60
    # Another process writes them, to the end of which wandb does not wait.
    while not all(b"stage1/loss" in path.read_bytes() for path in files) and time.monotonic() < end:
        time.sleep(0.1)
    assert all(b"stage1/loss" in path.read_bytes() for path in files)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
