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
    evaluated(tasks={"piqa": 2}, probes={"student": {"recall": {"lengths": [512], "samples": [8]}}})
    assert not capsys.readouterr().err
    evaluated(probes={"student": {"recall": {"lengths": [512], "samples": [8]}}})
    assert "evaluation-1.json" in " ".join(capsys.readouterr().err.split())
    evaluated(probes={"student": {"recall": {"lengths": [512], "samples": [8]}}}, dtype="bfloat16")
    kept = [json.loads((tmp_path / f"evaluation{name}.json").read_text()) for name in ("-1", "-2", "")]
    assert kept[0]["tasks"] == {"piqa": 2} and [len(each["probes"]) for each in kept] == [1, 1, 1]
    assert (tmp_path / "evaluation-2.md").exists() and not (tmp_path / "evaluation-3.md").exists()
    for number, damaged in ((3, b"[]"), (4, b"\xff{")):
        (tmp_path / "evaluation.json").write_bytes(damaged)
        evaluated(tasks={"piqa": 1})
        assert (tmp_path / f"evaluation-{number}.json").read_bytes() == damaged


SCORED = {"tasks": {"mmlu": {"relative": 0.9, "student": {"documents": 250, "score": 0.3}, "num_fewshot": [0]}}}
PROBED = {"probes": {"student": {"recall": {"lengths": [512, 1024], "samples": [32, 32]}}}}


@pytest.mark.parametrize(
    ("earlier", "later", "kept"),
    [
        (SCORED, SCORED, False),
        (SCORED, SCORED | PROBED, False),
        (SCORED, {"tasks": {**SCORED["tasks"], "piqa": SCORED["tasks"]["mmlu"]}}, False),
        (SCORED, {"tasks": {"piqa": SCORED["tasks"]["mmlu"]}}, True),
        (SCORED, {"tasks": {"mmlu": {"student": {"documents": 10, "score": 0.3}, "num_fewshot": [0]}}}, True),
        (SCORED, SCORED | {"limit": 10}, True),
        (SCORED, SCORED | {"chat_template": True}, True),
        ({"tasks": {"mmlu": {"student": {}, "control": {"score": 0.1}}}}, {"tasks": {"mmlu": {"student": {}}}}, True),
        (PROBED, {"probes": {"student": {"recall": {"lengths": [512], "samples": [32]}}}}, True),
        (PROBED, {"probes": {"student": {"passkey": PROBED["probes"]["student"]["recall"]}}}, True),
        (PROBED, PROBED | {"seed": 1}, True),
        ({"kl": {"sizes": {"prompts": 64}}}, {"kl": {"sizes": {"prompts": 8}}}, True),
    ],
)
def test_hours_of_an_earlier_evaluation_are_not_written_over(tmp_path, earlier, later, kept):
    of = {"model": "m", "teacher": "t", "dtype": "float32"}
    (tmp_path / "evaluation.json").write_text(json.dumps(of | earlier))
    model_scores.keep_earlier(tmp_path, of | later)
    assert (tmp_path / "evaluation-1.json").exists() == kept


def test_names_of_no_task_are_told_before_any_data_is_asked_for():
    manager = types.SimpleNamespace(all_tasks=["lambada_openai", "piqa"])
    suite._check_names(["piqa"], manager)
    said = r"--tasks has lambada_openia \(did you mean lambada_openai\?\), x; .*radlads, recall"
    with pytest.raises(ValueError, match=said):
        suite._check_names(["piqa", "lambada_openia", "x"], manager)


def test_a_mistyped_directory_is_no_model_of_the_hub(tmp_path):
    with pytest.raises(ValueError, match=r"nothere is no directory here, .*--output DIR"):
        model_scores.output_directory(str(tmp_path / "nothere"), None)
