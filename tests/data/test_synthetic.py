"""The synthetic language: the same text for ever, answers that are right, and a tokenizer transformers agrees on."""

import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from radlads_jax.data import synthetic, words
from radlads_jax.data.tales import PASSAGES, begin, tell

DEMO_TEACHER = Path(__file__).parents[2] / "configs" / "demo_teacher"
NUMBER = {word: value for value, word in enumerate(words.NUMBERS, 1)}
PREPOSITION = f"(?:{'|'.join(words.PREPOSITIONS)})"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_TEACHER / "tokenizer.json"))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(synthetic.documents(synthetic.TRAIN_SEED, 1000))


def test_documents_never_change(texts: list[str]) -> None:
    digest = hashlib.sha256("\0".join(texts[:200]).encode()).hexdigest()
    assert digest == "9f416f72f095697a14878a614557e1a11dc0bfcd4d1a3a89833f5e75d2949f76"


def test_a_document_depends_on_its_seed_and_index_alone(texts: list[str]) -> None:
    assert synthetic.document(synthetic.TRAIN_SEED, 123) == texts[123]
    assert not set(texts) & set(synthetic.documents(synthetic.TRAIN_SEED + 1, 1000))
    assert len(set(texts)) == 1000


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(seed: int, index: int) -> None:
    with pytest.raises(ValueError, match=rf"seed {seed} and index {index}\b.*\b0\b"):
        synthetic.document(seed, index)


def test_lengths(tokenizer: Tokenizer, texts: list[str]) -> None:
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]
    assert min(lengths) >= 60
    assert max(lengths) <= 320


def test_the_text_reads_as_written(texts: list[str]) -> None:
    for text in texts:
        assert text.startswith("This is a tale of ")
        assert text.endswith(" The end.")
        assert not re.search(r"  |\s\.|\ba [aeiou]\w|[^a-zA-Z0-9 .,:?\n]", text)


def follow(text: str) -> int:
    """Answer a tale's questions from its statements, read one by one; the number of answers that were checked."""
    bound: dict[str, str] = {}
    said, checked = "", 0
    for sentence in re.findall(r"[^.?]+[.?]", text.replace("\n", " ")):
        sentence = sentence.strip().removeprefix("Once more: ")
        if match := re.fullmatch(r"The \w+ (?:says|spells): (.*)\.", sentence):
            said = match[1]
        elif match := re.fullmatch(r"The \w+ repeats: (.*)\.", sentence):
            assert match[1] == said, sentence
            checked += 1
        elif match := re.fullmatch(r"The \w+ repeats in pairs: (.*)\.", sentence):
            pairs = match[1].split(", ")
            assert sorted(pairs) == sorted(map(" ".join, itertools.pairwise(said.split()))), sentence
            checked += len(pairs)
        elif match := re.fullmatch(rf"(?:{'|'.join(words.TIMES)}|)\s?[Ww]e (\w+ \w+) (\w+)( again)?\.", sentence):
            told = match[1] in bound
            assert bound.setdefault(match[1], match[2]) == match[2], sentence
            assert told or not match[3]
            checked += told
    assert len(set(bound.values())) == len(bound) >= 3
    assert len({about.split()[0] for about in bound}) == 1
    return checked


def test_answers_follow_from_the_text(texts: list[str]) -> None:
    assert sum(follow(text) for text in texts) > 10 * len(texts)


def test_counts_are_right(texts: list[str]) -> None:
    text = " ".join(texts)
    sums = re.findall(r"has (\w+) bags of (\w+) and finds (\w+) more\. That makes (\w+) bags of (\w+)\.", text)
    lists = re.findall(r"sees ([^.]*)\. That is (\w+) things\.", text)
    runs = re.findall(r"counts(| down| by two) from (\w+) to (\w+): ([^.]*)\.", text)
    days = re.findall(r"Today is (\w+)\. Tomorrow is (\w+)\.", text)
    assert min(map(len, (sums, lists, runs, days))) > 50
    assert all(NUMBER[a] + NUMBER[b] == NUMBER[c] and x == y for a, x, b, c, y in sums)
    assert all(listed.count(" a ") + listed.startswith("a ") == NUMBER[n] for listed, n in lists)
    for how, first, last, run in runs:
        step = {"": 1, " down": -1, " by two": 2}[how]
        counted = [NUMBER[word] for word in run.split(", ")]
        assert counted == list(range(NUMBER[first], NUMBER[last] + step, step))
    assert all((words.DAYS.index(b) - words.DAYS.index(a)) % 7 == 1 for a, b in days)


def test_verbs_agree_with_their_subject_and_pronouns_with_the_name(texts: list[str]) -> None:
    text = "\n".join(texts)
    nouns = "|".join([*words.CREATURES, *map(words.plural, words.CREATURES)])
    verbs = {verb for habits in words.CREATURES.values() for verb in habits}
    # With "that", the verb of the sentence comes after another animal.
    relative = r"(?: that (\w+) the \w+ \w+ \w+)?"
    clauses = re.findall(rf"[Tt]he \w+ \w+ ({nouns}){relative} (\w+)", text)
    assert len(clauses) > 300
    assert sum(bool(seeing) for _, seeing, _ in clauses) > 20
    for noun, seeing, verb in clauses:
        many = noun not in words.CREATURES
        assert verb in (verbs if many else set(map(words.singular_verb, verbs)))
        assert seeing in ("", *(words.SEEING if many else map(words.singular_verb, words.SEEING)))
    because = re.findall(rf"(\w+) \w+ (?:in|{PREPOSITION}) the \w+ because (he|she)", text)
    assert len(because) > 50
    assert all((work in words.HE_WORKS) == (pronoun == "he") for work, pronoun in because)


def test_names_stand_before_their_values_and_nowhere_else_in_a_tale(texts: list[str]) -> None:
    for text in texts:
        told = set(re.findall(r"We (?:give|show|pay|paint) (\w+) \w+\.", text))
        assert len(told) >= 3
        for name in told:
            assert len(re.findall(rf"\b{name}\b", text)) == len(
                re.findall(rf" [Ww]e \w+ {name}\b| do we \w+ {name}\?", text)
            )


@pytest.mark.parametrize("name", PASSAGES)
def test_each_passage_writes_something(name: str) -> None:
    for seed in range(50):
        tale = begin(random.Random(seed))
        tell(tale)
        tell(tale)
        before = len(tale.spans)
        PASSAGES[name](tale)
        assert "".join(span.text for span in tale.spans[before:]).endswith(".")


def test_spans_make_the_document_and_need_memory(texts: list[str]) -> None:
    parts = [span for index in range(len(texts)) for span in synthetic.spans(synthetic.TRAIN_SEED, index)]
    assert "".join(span.text for span in parts) == "".join(texts)
    characters = sum(len(span.text) for span in parts)
    for kind, least in (("answer", 0.07), ("mention", 0.007), ("copy", 0.04), ("count", 0.035)):
        assert sum(len(span.text) for span in parts if span.kind == kind) > least * characters


def test_every_word_is_one_token(tokenizer: Tokenizer, texts: list[str]) -> None:
    distinct = {word for text in texts for word in re.findall(r" [A-Za-z]+", text)}
    assert len(distinct) > 200
    assert [word for word in distinct if len(tokenizer.encode(word).ids) != 1] == []


def test_the_demo_teachers_tokenizer_can_be_made_again(tokenizer: Tokenizer) -> None:
    assert synthetic.train_tokenizer().to_str() == tokenizer.to_str()
    assert [tokenizer.id_to_token(i) for i in range(3)] == list(synthetic.SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() <= synthetic.VOCAB_SIZE


def test_a_vocabulary_too_small_for_the_bytes() -> None:
    with pytest.raises(ValueError, match=r"vocab_size 258\b.*\b259\b"):
        synthetic.train_tokenizer(258)


ODD_TEXTS = (
    "",
    "Hé llo  wörld\n\n 1234 it's 'S",
    "a<|im_end|> b<|endoftext|>\n<|im_start|>",
    "\t  a  \r\n b",
    "日本語 é́ \u00a0\u2028x 🙂",
)


def test_transformers_reads_it_the_same_in_both_ways(tokenizer: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the tokenizer is compared with transformers'")
    synthetic.save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert type(auto).__name__ == "Qwen2Tokenizer"
    rng = random.Random(0)
    noise = ["".join(chr(rng.randint(1, 3000)) for _ in range(40)) for _ in range(50)]
    for text in (*texts[:20], *ODD_TEXTS, *noise):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert auto(text)["input_ids"] == ids
        assert fast(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.normalizer.normalize_str(text)
    for each in (auto, fast):
        assert (each.eos_token_id, each.pad_token_id, len(each)) == (0, 0, tokenizer.get_vocab_size())


def test_chat_template(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it applies the chat template")
    pytest.importorskip("jinja2", reason="transformers needs it for chat templates")
    synthetic.save_tokenizer(tokenizer, tmp_path)
    chat = [{"role": "user", "content": "Who has the lamp?"}]
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert fast.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nWho has the lamp?<|im_end|>\n<|im_start|>assistant\n"
    )
