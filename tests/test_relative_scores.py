"""A student's scores beside its teacher's: relative ones, those of the paper, and the page."""

import pytest

from radlads_jax.evaluation import paper, table
from radlads_jax.evaluation import tasks as suite
from radlads_jax.models import MIXERS, ModelConfig

TEACHER = ModelConfig("qwen2", 300, 32, 48, 4, 2, 8, (("attention", 2),), qkv_bias=True, max_position_embeddings=128)
STUDENT = TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32))


def test_relative_scores():
    # RADLADS: QRWKV7-7B keeps (68.2 - 25) / (71.7 - 25) of mmlu and more than all of arc_challenge.
    assert paper.relative_score(0.682, 0.717, 0.25) == pytest.approx(0.9251, abs=1e-4)
    assert paper.relative_score(0.558, 0.550, 0.25) == pytest.approx(1.0267, abs=1e-4)
    assert paper.relative_score(0.3, 0.25, 0.25) is None


def test_published_scores_are_those_of_the_same_shape():
    large = ModelConfig("qwen2", 152064, 5120, 27648, 40, 8, 128, (("attention", 64),), qkv_bias=True)
    name, scores = paper.published_scores(large.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(5120)))
    assert name == "QRWKV6-32B" and scores["mmlu"] == {"student": 0.766, "teacher": 0.818}
    assert paper.teacher_of(name) == "Qwen2.5-32B-Instruct"
    assert paper.published_scores(large) is None and paper.published_scores(STUDENT) is None


def test_suite_stands_for_the_papers_tasks():
    assert suite.expand_tasks(["sciq", "radlads", "mmlu"]) == ["sciq", *paper.SUITE]
    assert suite.expand_tasks(["recall", "sciq"]) == ["sciq"]
    assert [task.metric for task in paper.SUITE.values()].count("acc_norm") == 2


def result_of(score: float, metric: str = "acc", chance: float | None = 0.25) -> dict:
    numbers = {"score": score, "stderr": 0.01, "chance": chance, "always": 0.26, "documents": 40, "num_fewshot": [0]}
    return {"metric": metric, "filter": None, "metrics": {f"{metric},none": score}} | numbers


def test_comparison_and_its_page():
    large = ModelConfig("qwen2", 152064, 3584, 18944, 28, 4, 128, (("attention", 28),), qkv_bias=True)
    student = large.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(3584))
    scores = {"arc_easy": result_of(0.6), "lambada_openai": result_of(0.5, chance=0.0)}
    teacher = {"arc_easy": result_of(0.75), "lambada_openai": result_of(0.4, chance=0.0)}
    perplexity = {"text": result_of(17.123, "word_perplexity", None)}
    result = suite.compare(student, scores | perplexity, teacher | perplexity)
    assert result["tasks"]["arc_easy"]["relative"] == pytest.approx(0.7)
    assert result["tasks"]["text"]["relative"] is None
    assert result["mean_relative"] == pytest.approx((0.7 + 1.25) / 2)
    page = table.as_markdown({"model": "S", "teacher": "T", "limit": 40.0} | result)
    assert "| arc_easy | acc | 40 | 0 | 25.0 | 26.0 | 75.0 ± 1.0 | 60.0 ± 1.0 | 70.0 | 81.5 | 81.7 | 100.4 |" in page
    assert "| text | word_perplexity | 40 | 0 |  | 26.0 | 17.12 | 17.12 |  |  |  |  |" in page
    assert "Mean relative score: 97.5, of 2 of 3 tasks" in page and "first 40 documents" in page
    assert "QRWKV7-7B is the paper's student of this shape; its teacher is Qwen2.5-7B-Instruct" in page
    assert "first 10% of the documents of" in table.as_markdown({"model": "S", "limit": 0.1})
    beside = suite.compare(student, scores, teacher, {"arc_easy": result_of(0.3), "lambada_openai": result_of(0.1)})
    page = table.as_markdown({"model": "S", "teacher": "T", "control": {"sinks": 4, "window": 64}} | beside)
    assert "| arc_easy | acc | 40 | 0 | 25.0 | 26.0 | 75.0 ± 1.0 | 30.0 ± 1.0 | 60.0 ± 1.0 | 70.0 |" in page
    assert "the first 4 and the latest 64 keys" in page
    in_template = suite.compare(student, scores, teacher, chat_template=True)
    assert in_template["published_model"] is None and "published" not in in_template["tasks"]["arc_easy"]
    assert "own chat template" in table.as_markdown({"model": "S", "chat_template": True} | in_template)
    alone = suite.compare(STUDENT, scores, None)
    assert alone["mean_relative"] is None and "published" not in alone["tasks"]["arc_easy"]


def test_a_score_without_an_error_is_compared_with_nothing():
    """One right document puts no teacher above the floor."""
    one = {"arc_easy": result_of(1.0) | {"stderr": None, "documents": 1}}
    line = suite.compare(STUDENT, one, one)["tasks"]["arc_easy"]
    assert line["relative"] is None and not line["at_floor"]


def test_choices_that_a_tasks_own_code_scores_have_no_known_chance():
    samples = {"mine": [{"filtered_resps": [1, 2, 3, 4], "target": 0}] * 5}
    for own, expected in (({}, 0.25), ({"process_results": "!function mine.py"}, None)):
        evaluated = {"configs": {"mine": {"output_type": "multiple_choice"} | own}}
        assert suite._chance(evaluated, samples) == expected


def test_a_teacher_at_the_floor_is_no_measure():
    """(28 - 25) / (26 - 25) would be 300%, from a teacher that may have guessed."""
    scores = {"arc_easy": result_of(0.28), "piqa": result_of(0.7, chance=0.5), "none": result_of(0.2, chance=0.0)}
    teacher = {"arc_easy": result_of(0.26), "piqa": result_of(0.75, chance=0.5), "none": result_of(0.0, chance=0.0)}
    result = suite.compare(STUDENT, scores, teacher)
    assert [line["relative"] for line in result["tasks"].values()] == [None, pytest.approx(0.8), None]
    assert result["mean_relative"] == pytest.approx(0.8) and result["relative_tasks"] == 1
    page = table.as_markdown({"model": "S", "teacher": "T"} | result)
    assert "| arc_easy | acc | 40 | 0 | 25.0 | 26.0 | 26.0 ± 1.0 | 28.0 ± 1.0 | teacher at the floor |" in page
    assert "Mean relative score: 80.0, of 1 of 3 tasks" in page
