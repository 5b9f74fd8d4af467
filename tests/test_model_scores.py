"""What an evaluation is asked for, and what becomes of an earlier one."""

import json
import types

import pytest

from radlads_jax.evaluation import model_scores
from radlads_jax.evaluation import tasks as suite


def test_an_earlier_evaluation_is_replaced_by_one_of_as_much_alone(tmp_path, capsys):
    def evaluated(**result):
        result = {"model": "m", "teacher": "t", "dtype": "float32"} | result
        model_scores.keep_earlier(tmp_path, result)
        (tmp_path / "evaluation.json").write_text(json.dumps(result))
        (tmp_path / "evaluation.md").write_text(str(result))

    evaluated(tasks={"piqa": 1}, kl={})
    evaluated(tasks={"piqa": 2}, probes={"recall": 1})
    assert not capsys.readouterr().err
    evaluated(probes={"recall": 2})
    assert "evaluation-1.json" in " ".join(capsys.readouterr().err.split())
    evaluated(probes={"recall": 3}, dtype="bfloat16")
    kept = [json.loads((tmp_path / f"evaluation{name}.json").read_text()) for name in ("-1", "-2", "")]
    assert kept[0]["tasks"] == {"piqa": 2} and [len(each["probes"]) for each in kept] == [1, 1, 1]
    assert (tmp_path / "evaluation-2.md").exists() and not (tmp_path / "evaluation-3.md").exists()
    for number, damaged in ((3, b"[]"), (4, b"\xff{")):
        (tmp_path / "evaluation.json").write_bytes(damaged)
        evaluated(tasks={"piqa": 1})
        assert (tmp_path / f"evaluation-{number}.json").read_bytes() == damaged


def test_names_of_no_task_are_told_before_any_data_is_asked_for():
    manager = types.SimpleNamespace(all_tasks=["lambada_openai", "piqa"])
    suite._check_names(["piqa"], manager)
    said = r"--tasks has lambada_openia \(did you mean lambada_openai\?\), x; .*radlads, recall"
    with pytest.raises(ValueError, match=said):
        suite._check_names(["piqa", "lambada_openia", "x"], manager)


def test_a_mistyped_directory_is_no_model_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"nothere is no directory here, .*--output DIR"):
        model_scores.output_directory(str(tmp_path / "nothere"), None)
