"""A model that is stuck on one letter is flagged, one that knows the answers is not, wherever they stand."""

import importlib.util
import json

import pytest
from untrained import TEACHER, save_teacher

from radlads_jax.decoding.loaded import load_model
from radlads_jax.evaluation import rotation, table
from radlads_jax.evaluation import tasks as suite

LETTERS = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nC. {{{{choices[2]}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: ["A", "B", "C"]
metric_list: [{{metric: acc}}]
"""
RIGHT = "in the wood"


class Task:
    """As lm-eval's tasks give the text of a document."""

    def doc_to_text(self, doc):
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", doc["choices"], strict=True))
        return f"Where is the king?\n{listed}\nAnswer:"


class Adapter:
    """Finds the letter of which `likes(context, letter)` is largest the likeliest."""

    def __init__(self, likes):
        self.likes = likes

    def loglikelihood(self, requests, disable_tqdm):
        del disable_tqdm
        return [(self.likes(*request.args), False) for request in requests]


def knows(context, letter):
    last = context.rsplit("Where is", 1)[-1]
    return float(f"{letter.strip()}. {RIGHT}" in last)


def stuck(context, letter):
    return float(letter.strip() == "B")


def samples(before="", behind=""):
    docs = [{"choices": [RIGHT if i == place else f"on hill {i}" for i in range(3)]} for place in (0, 1, 1, 2)]
    texts = [before + Task().doc_to_text(doc) + behind for doc in docs]
    arguments = [[(text, f" {letter}") for letter in "ABC"] for text in texts]
    pairs = zip(docs, arguments, (0, 1, 1, 2), strict=True)
    return [{"doc": doc, "arguments": args, "target": target} for doc, args, target in pairs]


# With examples before the question too, and in a chat template.
@pytest.mark.parametrize(
    "around", [("",), ("Where is the dog?\nA. here\nAnswer: A\n\n",), ("<user>\n", "<end>\n<assistant>\n")]
)
def test_the_pick_follows_the_option_or_the_letter(around):
    checked = rotation.check(Adapter(knows), [(Task(), samples(*around))])
    assert checked == {"documents": 4, "letter": "A", "share": pytest.approx(1 / 3), "follows": 1.0, "stuck": False}
    checked = rotation.check(Adapter(stuck), [(Task(), samples(*around))])
    assert checked == {"documents": 4, "letter": "B", "share": 1.0, "follows": 0.0, "stuck": True}


def test_options_in_their_own_words_or_nowhere_are_not_moved():
    words, nowhere, twice = samples(), samples(), samples()
    for sample in words:
        sample["arguments"] = [
            (text, f" {option}")
            for (text, _), option in zip(sample["arguments"], sample["doc"]["choices"], strict=True)
        ]
    for sample in nowhere:
        sample["doc"] = {"choices": ["one", "two"]}
    for sample in twice:
        sample["doc"]["hints"] = ["x", "y", "z"]
    task = Task()
    task.doc_to_text = lambda doc: Task().doc_to_text({"choices": (doc["choices"] + ["", ""])[:3]})
    assert [rotation.check(Adapter(stuck), [(task, each)]) for each in (words, nowhere, twice)] == [None] * 3


@pytest.mark.parametrize(
    "arguments", [[("A whole text.",)], [("Where?", {"until": ["."]})], [("Where?", {}), ("Who?", {})], []]
)
def test_what_is_no_choice_is_not_asked_again(arguments):
    """A perplexity's requests are of one text, those for text to be written hold settings in a letter's place."""
    sample = {"doc": {"choices": ["x", "y"]}, "arguments": arguments, "target": ""}
    assert rotation.check(Adapter(stuck), [(Task(), [sample])]) is None


def test_the_picks_of_a_groups_parts_count_together():
    def stuck_in_one(context, letter):
        return stuck(context, letter) if "part two" in context else knows(context, letter)

    parts = [(Task(), samples()), (Task(), samples("part two\n")), (Task(), samples("\n"))]
    checked = rotation.check(Adapter(stuck_in_one), parts)
    # Of 36 picks the 12 of one part are all B, and a third of the others'.
    assert checked["documents"] == 12 and checked["letter"] == "B"
    assert checked["share"] == pytest.approx(20 / 36) and not checked["stuck"]
    scores = {"letters": {"student": {"options": rotation.check(Adapter(stuck), parts)}}}
    assert "100% of its picks" in rotation.warnings(scores, ["student"])[0]


def test_the_best_constant_answer():
    assert rotation.best_constant(samples()) == 0.5
    assert rotation.best_constant([{"target": "a text"}]) is None
    # Such a task's file lists the right option first, and its prompts no options.
    assert rotation.best_constant([{"target": 0}] * 9) is None


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (the extra `eval`)")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_planted_stuck_model_is_flagged_in_the_page(tmp_path, monkeypatch):
    records = [
        {"question": f"Where is king {i}?", "choices": ["here", "there", "away"], "label": i % 2} for i in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    file = tmp_path / "letters.yaml"
    file.write_text(LETTERS.format(file=tmp_path / "data.jsonl", cache=tmp_path / "cache"))
    from radlads_jax.evaluation.adapter import RadladsLM

    def scored(self, requests, **_):
        return [(float(texts[1].strip() == "B"), False) for texts, _context, _continuation in requests]

    monkeypatch.setattr(RadladsLM, "_loglikelihood_tokens", scored)
    model = load_model(save_teacher(tmp_path, TEACHER))
    scores = suite.run_tasks(model, suite.load_tasks([str(file)]))
    # Half of them are B: the score alone would say that it knows more than a third.
    assert scores["letters"]["score"] == scores["letters"]["always"] == 0.5
    assert scores["letters"]["options"]["stuck"] and scores["letters"]["options"]["letter"] == "B"
    page = table.as_markdown({"model": "S"} | suite.compare(TEACHER, scores, None))
    assert (
        "student is stuck on B in letters: 100%" in page and "| letters | acc | 6 | 0 | 33.3 | 50.0 |  | 50.0" in page
    )
