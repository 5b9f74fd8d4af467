"""Weights & Biases: nothing of it unless asked for, and then every step once, a run that goes on with its run."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import time
import types

import processes
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


def train(workdir: pathlib.Path, steps: range, settings: dict = SETTINGS) -> None:
    workdir.mkdir(exist_ok=True)
    with MetricsLogger(workdir, wandb=WandbCurves(workdir, "mine", settings)) as logger:
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


def logged_by(wandb: StandIn) -> list[tuple[str, int]]:
    """(id, step) of every line."""
    return [(line["id"], line["stage1/step"]) for line in wandb.logged]


@pytest.fixture
def ids(wandb, monkeypatch) -> StandIn:
    """Its runs have ids of their own, noted with every line."""
    init, log, made = wandb.init, wandb.log, iter(range(1, 99))

    def begin(**options):
        init(**options)
        wandb.id = options["id"] or f"run{next(made)}"
        return wandb

    monkeypatch.setattr(wandb, "init", begin)
    monkeypatch.setattr(wandb, "log", lambda values: log(values | {"id": wandb.id}))
    return wandb


def test_what_was_logged_beyond_the_checkpoint_is_not_logged_again(ids, tmp_path) -> None:
    """As after SIGKILL: the run goes on from a step before the last one that it has logged."""
    train(tmp_path / "run", range(1, 6))
    for steps in (range(3, 5), range(4, 8)):
        train(tmp_path / "run", steps)
    # Only metrics.jsonl, which can be cut, forgot steps 5 and 4 meanwhile.
    assert len(set(logged_by(ids))) == len(ids.logged)
    assert [step for _, step in logged_by(ids)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_recipe_that_was_given_up_keeps_its_curves_to_itself(wandb, tmp_path) -> None:
    """As after a kill before the first checkpoint, and another rate; the way to compute it is no recipe."""
    for lr, remat, steps in ((1.0, "full", range(1, 4)), (0.1, "full", range(1, 3)), (0.1, "none", range(1, 5))):
        train(tmp_path / "run", steps, {"stage1": {"lr": lr, "remat": remat}})
    train(tmp_path / "run", range(1, 2), {"stage1": {"lr": 0.01}})
    names = [next(name for name in line if name.endswith("/loss")) for line in wandb.logged]
    assert names == ["stage1/loss"] * 3 + ["stage1.2/loss"] * 4 + ["stage1.3/loss"]
    assert [line.get("stage1.2/step") for line in wandb.logged[3:7]] == [1, 2, 3, 4]
    assert ("stage1.2/*", "stage1.2/step") in wandb.metrics


def test_a_copy_is_another_run(ids, tmp_path) -> None:
    train(tmp_path / "run", range(1, 4))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    train(tmp_path / "copy", range(3, 6))
    train(tmp_path / "run", range(4, 6))
    train(tmp_path / "copy", range(6, 7))
    assert logged_by(ids) == [
        *(("run1", step) for step in (1, 2, 3)),
        *(("run2", step) for step in (3, 4, 5)),
        *(("run1", step) for step in (4, 5)),
        ("run2", 6),
    ]


def test_a_directory_that_was_moved_is_the_same_run(ids, tmp_path) -> None:
    train(tmp_path / "run", range(1, 3))
    (tmp_path / "run").rename(tmp_path / "moved")
    train(tmp_path / "moved", range(3, 5))
    # And another in its place is not.
    train(tmp_path / "run", range(1, 2))
    assert [name for name, _ in logged_by(ids)] == ["run1"] * 4 + ["run2"]


def test_what_an_earlier_version_began_goes_on(ids, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb_id").write_text("old\n")
    train(tmp_path / "run", range(1, 3))
    assert logged_by(ids) == [("old", 1), ("old", 2)]


def test_what_wandb_refuses_is_one_paragraph(wandb, tmp_path) -> None:
    wandb.refuses = "api_key not configured"
    with pytest.raises(ValueError, match=r"api_key not configured.*WANDB_MODE=offline"):
        WandbCurves(tmp_path, "mine", SETTINGS)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"'mine'.*-e '\.\[wandb\]'"):
        WandbCurves(tmp_path, "mine", SETTINGS)


def test_it_is_not_imported_unless_asked_for() -> None:
    code = "import sys, radlads_jax.run.train, radlads_jax.launch; print('wandb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=processes.environ(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed (the extra wandb)")
def test_offline_everything_stays_in_the_work_directory(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for steps in (range(1, 3), range(3, 5)):
        train(tmp_path / "run", steps)
    files = [path for path in (tmp_path / "run" / "wandb").rglob("*.wandb")]
    identity = (tmp_path / "run" / "wandb_id").read_text().splitlines()[0]
    assert len(files) == 2 and all(identity in path.name for path in files)
    end = time.monotonic() + 60
    # Another process writes them, to the end of which wandb does not wait.
    while not all(b"stage1/loss" in path.read_bytes() for path in files) and time.monotonic() < end:
        time.sleep(0.1)
    assert all(b"stage1/loss" in path.read_bytes() for path in files)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
