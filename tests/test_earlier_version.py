"""A work directory that an earlier version of this project began.

The version of 2026-11-27, before models became specs and a run had fingerprints, stopped it in stage 1, at step 3 of 4.
"""

import json
import pathlib
import tarfile

import pytest
import tiny_run

from radlads_jax import config
from radlads_jax.run import train
from radlads_jax.run.job import make_job
from radlads_jax.run.settings import check_same_config, keep_begun_rules, with_whole_paths

BEGUN = pathlib.Path(__file__).parent / "data" / "begun_work_directory.tar.xz"
# What that version printed when it ended the run itself.
SCORES = {"agreement": 0.31079717457, "kl": 0.07581579553, "loss": 5.82476849753, "top1": 0.00605449041}


def test_it_is_finished_with_that_version_s_scores(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(BEGUN) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "begun"
    chosen = config.defaults()
    chosen.update_from_flattened_dict(tiny_run.settings("model", steps={"stage1": 4, "stage2": 3}))
    keep_begun_rules(workdir, chosen)
    run = with_whole_paths(config.validate(chosen))
    check_same_config(workdir, run.settings())
    summary = train.convert(make_job(run, workdir))
    assert summary["student"] == pytest.approx(SCORES, rel=1e-5)
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if s["stage"] == "stage1" and "loss" in s] == [1, 2, 3, 4]
    assert (workdir / "fingerprint.json").is_file() and (workdir / "export" / "model.safetensors").is_file()
