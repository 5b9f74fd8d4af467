"""Tasks that can not be run as they are asked for are refused before any weights are loaded."""

import types

import pytest

from radlads_jax.evaluation.task_checks import check_tasks, new_tokens


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 256),
        ({"max_gen_toks": 12, "max_new_tokens": 99}, 12),
        ({"max_new_tokens": 32}, 32),
        ({"max_tokens": 16}, 16),
        ({"max_completion_tokens": 8}, 8),
    ],
)
def test_the_tokens_of_an_answer_by_any_of_their_names(options, tokens):
    assert new_tokens("norquad", options, 512) == tokens


@pytest.mark.parametrize("options", [{"max_gen_toks": 32768}, {"max_gen_toks": 512}, {"max_gen_toks": 0}])
def test_an_answer_that_leaves_no_room_for_its_question(options):
    with pytest.raises(ValueError, match=r"aime generates up to \d+ tokens, of a model that reads 512\b"):
        new_tokens("aime", options, 512)
    with pytest.raises(ValueError, match=r"aime .*max_length"):
        new_tokens("aime", {"max_length": 100}, 512)


def loaded(**fields) -> dict:
    settings = {"num_fewshot": fields.pop("num_fewshot", None), "generation_kwargs": fields.pop("kwargs", None)}
    task = types.SimpleNamespace(**{"OUTPUT_TYPE": "multiple_choice", "get_config": settings.get} | fields)
    return {"it": {"tasks": {"it": task}}}


def test_tasks_are_looked_at_before_the_weights():
    check_tasks(loaded(), 5, 128)
    check_tasks(loaded(num_fewshot=0), None, 128)
    with pytest.raises(ValueError, match=r"--num_fewshot=5 .*\bit\b"):
        check_tasks(loaded(num_fewshot=0), 5, 128)
    check_tasks(loaded(), None, 128, chat_template=True)
    with pytest.raises(ValueError, match=r"--apply_chat_template .*\bit\b"):
        check_tasks(loaded(OUTPUT_TYPE="loglikelihood_rolling"), None, 128, chat_template=True)
    with pytest.raises(ValueError, match=r"\bit would run the code"):
        check_tasks(loaded(UNSAFE_CODE=True), None, 128)
    with pytest.raises(ValueError, match=r"\bit generates up to 256 tokens"):
        check_tasks(loaded(OUTPUT_TYPE="generate_until"), None, 128)
