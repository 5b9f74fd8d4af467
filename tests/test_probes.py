"""The probes' contexts are as described, a model that knows the answers passes them, and the picture is drawn."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers, processors
from untrained import save_tokenizer

from radlads_jax.data import synthetic, tokenise
from radlads_jax.decoding.generation import Step
from radlads_jax.decoding.loaded import Model
from radlads_jax.evaluation import intervals, probe_scores, probes
from radlads_jax.evaluation.probes import Text
from radlads_jax.evaluation.scoring import Score
from radlads_jax.models import MIXERS, ModelConfig, abstract_params
from radlads_jax.porting.hub import load_tokenizer

TEACHER = ModelConfig("qwen2", 300, 32, 48, 4, 2, 8, (("attention", 2),), qkv_bias=True)
STUDENT = TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory) -> Model:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), abstract_params(STUDENT))
    return Model(tmp_path_factory.mktemp("none"), STUDENT, params, tokenizer, (0,))


def parts(tokenizer, example) -> tuple[str, str]:
    return tokenizer.decode(example.ids[: example.start]), tokenizer.decode(example.ids[example.start :])


@pytest.mark.parametrize("seed", range(5))
def test_passkey(tokenizer, seed):
    example = probes.passkey(Text(tokenizer, seed), 700)
    context, answer = parts(tokenizer, example)
    assert len(example.ids) == 700
    assert context.count(f"The pass key is {answer.strip()}.") == 1 and len(answer.strip()) == 5
    assert context.endswith("The pass key is") and "The sky is blue." in context


@pytest.mark.parametrize("seed", range(5))
def test_multi_key(tokenizer, seed):
    example = probes.multi_key(Text(tokenizer, seed), 1000)
    context, answer = parts(tokenizer, example)
    city = context.split("The number of ")[-1].split(" is")[0]
    assert len(example.ids) == 1000 and context.count(" The number of ") == probes.NEEDLES + 1
    assert context.count(f"The number of {city} is{answer}.") == 1


@pytest.mark.parametrize("length", [64, 500, 4000])
def test_recall(tokenizer, length):
    example = probes.recall(Text(tokenizer, 0), length)
    context, answer = parts(tokenizer, example)
    asked = context.split("\n")[-1]
    assert len(example.ids) <= length or context.count("\n") == 1
    assert len(example.ids) > 0.8 * length or length == 64
    assert context.count(f"{asked}{answer}\n") == 1 and context.count(asked) == 2


def test_copy(tokenizer):
    example = probes.copy(Text(tokenizer, 0), 401)
    half = (len(example.ids) - 1) // 2
    assert len(example.ids) == 401
    assert example.ids[1 : 1 + half] == example.ids[1 + half :] and example.start == 2 + half


@pytest.mark.parametrize("seed", range(3))
def test_variables(tokenizer, seed):
    example = probes.variables(Text(tokenizer, seed), 1000)
    context, answer = parts(tokenizer, example)
    asked = context.split("The value of VAR ")[-1].split(" is")[0]
    (first,) = re.findall(rf" VAR {asked} = VAR (\w+)\.", context)
    assert len(example.ids) == 1000 and f" VAR {first} = {answer.strip()}." in context
    assert len(re.findall(r" VAR \w+ = \d+\.", context)) == probes.CHAINS and example.chance == 1 / probes.CHAINS


@pytest.mark.parametrize("length", [401, 4000])
def test_copied_tokens_are_all_different(tokenizer, length):
    text = Text(tokenizer, 0)
    example = probes.copy_tokens(text, length)
    answer = example.ids[example.start :]
    assert len(example.ids) == length and len(set(answer)) == len(answer)
    assert len(answer) == min((length - 1) // 2, len(text.ordinary)) - 1
    assert answer == example.ids[example.start - len(answer) - 1 : example.start - 1]
    assert not set(answer) & set(tokenizer.all_special_ids) and example.chance == 1 / len(answer)


def test_needles_stand_everywhere(tokenizer):
    places = []
    for seed in range(40):
        context, _ = parts(tokenizer, probes.passkey(Text(tokenizer, seed), 600))
        places.append(context.index("The pass key is") / len(context))
    assert min(places) < 0.15 and max(places) > 0.7


def test_too_short_a_probe_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"\b40 tokens\b.*--probe_lengths"):
        probes.passkey(Text(tokenizer, 0), 40)
    probes.check_lengths(tokenizer, [4000, 600])
    with pytest.raises(ValueError, match=r"\b120 tokens\b.*--probe_lengths"):
        probes.check_lengths(tokenizer, [4000, 120])
    probes.check_lengths(tokenizer, [4000, 60], kinds=["copy"])


def test_intervals():
    # Of Wilson's formula: 5 of 10, 0 of 32, 32 of 32.
    assert intervals.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert intervals.wilson(0.0, 32) == pytest.approx((0.0, 0.1072), abs=1e-4)
    assert intervals.wilson(1.0, 32) == pytest.approx((0.8928, 1.0), abs=1e-4)
    assert [probe_scores.samples_of(n, 32) for n in (512, 4096, 8192, 32768)] == [32, 32, 16, 8]
    assert probe_scores.samples_of(32768, 2) == 2


def test_text_of_a_file(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"word {i}" for i in range(300)))
    example = probes.document(Text(tokenizer, 0), 100, file)
    assert len(example.ids) == 100 and tokenizer.decode(example.ids[1:]) in file.read_text()
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} .*\b100000\b.*--probe_text"):
        probes.document(Text(tokenizer, 0), 100_000, file)


def test_a_file_is_tokenised_once_and_in_pieces(tokenizer, model, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("<|im_start|>" + "\n".join(synthetic.documents(3, 60)))
    reads, pieces = [], []
    whole, encoded = Text(tokenizer, 0).ids(file.read_text()), tokenise._encode_piece

    def encode_piece(text, begin, end, backend):
        pieces.append(end - begin)
        return encoded(text, begin, end, backend)

    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 4_000)
    monkeypatch.setattr(tokenise, "OVERLAP_CHARACTERS", 512)
    monkeypatch.setattr(tokenise, "_encode_piece", encode_piece)
    monkeypatch.setattr(probes.storage, "read_text", lambda path: reads.append(path) or path.read_text())
    monkeypatch.setattr(probe_scores, "score_rows", lambda _, __, rows, *___: [Score(np.zeros(63), None) for _ in rows])
    probe_scores.run_probes(model, lengths=[64], samples=5, text_file=file, kinds=[])
    assert len(reads) == 2, "to see whether it is long enough, and for the model"
    assert Text(tokenizer, 0).of_file(file).tolist() == whole and max(pieces) == 4_000


def test_a_file_that_is_no_text_is_said_to_be_none(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"caf\xe9 " * 1000)
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 .*expected text"):
        probes.document(Text(tokenizer, 0), 100, tmp_path / "text.txt")


def test_right_answers_are_counted(model, monkeypatch):
    """A scorer that finds the tokens at even places of an answer, and a model that says the same two things always."""

    def scored(cfg, params, rows, starts, batch_size):
        del cfg, params, batch_size
        counts = [len(row) - start for row, start in zip(rows, starts, strict=True)]
        return [Score(-np.arange(n, dtype=np.float32), np.arange(n) % 2 == 0) for n in counts]

    def continued(cfg, params, sequences, unread, answers):
        del sequences, unread
        return scored(cfg, params, answers, [0] * len(answers), 0)

    def said(model, prompts, *, max_tokens, read):
        del max_tokens, read
        yield Step([" 3"] * len(prompts), [prompt[1:2] for prompt in prompts])
        yield Step([" or"] * len(prompts), [[0] for _ in prompts])

    monkeypatch.setattr(probe_scores, "score_rows", scored)
    monkeypatch.setattr(probe_scores, "score_continuations", continued)
    monkeypatch.setattr(probe_scores, "generate", said)
    monkeypatch.setattr(probe_scores, "prefill", lambda *_: (None, None))
    kept, lines = [], []
    options = {"keep": lambda found: kept.append(list(found)), "log": lines.append}
    results = probe_scores.run_probes(model, lengths=[1024, 600], samples=40, batch_size=7, **options)
    # Each kind's as soon as it is known, for what comes later may fail.
    assert kept[0] == ["passkey"] and len(kept) == len(probes.PROBES) and lines[1].endswith(f", 2 of {2 * len(kept)}")
    assert results["passkey"]["lengths"] == [600, 1024] and results["passkey"]["samples"] == [40, 40]
    assert results["passkey"]["accuracy"] == results["passkey"]["generated"] == [0.0, 0.0]
    assert results["copy"]["accuracy"] == pytest.approx([0.5, 0.5], abs=0.01)
    # Always 3, as about one answer in ten is.
    assert results["recall"]["chance"] == pytest.approx([0.1, 0.1])
    for share, (low, high) in zip(results["recall"]["generated"], results["recall"]["interval"], strict=True):
        assert 0 < share < 0.3 and low < share < high
    losses = results["loss_by_position"]
    assert losses["positions"] == [16, 32, 64, 128, 256, 512, 1023]
    assert losses["loss"] == pytest.approx([7.5, 23.5, 47.5, 95.5, 191.5, 383.5, 767])


@pytest.mark.parametrize(
    ("text", "right"), [(" 52", 1), ("52.", 1), (" 52 is", 1), (" 523", 0), (" 5", 0), (" is 52", 0), ("", 0)]
)
def test_a_generated_answer_is_the_whole_number(model, text, right):
    assert probe_scores._begins_with(model, text, model.tokenizer(" 52")["input_ids"]) == right


def test_a_generated_copy_counts_tokens_in_their_places():
    assert probe_scores._same_tokens([4, 5, 9, 7], [4, 5, 6, 7]) == 0.75
    assert probe_scores._same_tokens([4], [4, 5]) == 0.5 and probe_scores._same_tokens([], [4, 5]) == 0


def test_a_models_probes(model):
    options = {"lengths": [1100], "samples": 1}
    lines: list[str] = []
    results = probe_scores.run_probes(model, log=lines.append, **options)
    assert set(results) == {*probes.PROBES, "loss_by_position"} and len(lines) == len(probes.PROBES)
    # An untrained model knows nothing: it finds all of the vocabulary about as likely.
    assert results["loss_by_position"]["loss"] == pytest.approx([np.log(300)] * 8, rel=0.1)
    assert results["passkey"]["accuracy"] == results["passkey"]["generated"] == [0.0]
    assert results == probe_scores.run_probes(model, **options)
    some = probe_scores.run_probes(model, kinds=["recall", "passkey"], by_position=False, **options)
    assert some == {name: results[name] for name in ("recall", "passkey")}


@pytest.fixture(scope="module")
def llama_like():
    """A tokenizer that puts a mark for a space before every text, and BOS before every prompt."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    # Made-up tales have neither digits nor the probes' filler.
    made.train_from_iterator([*synthetic.documents(0, 100), *probes._FILLER, " ".join(map(str, range(1000)))], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", [kind for kind in probes.PROBES if kind not in probes.COPYING])
def test_parts_are_tokens_of_running_text(llama_like, kind):
    """Nowhere two spaces, which no text that such a model was trained on has."""
    example = probes.PROBES[kind](Text(llama_like, 0), 900)
    pieces = llama_like.convert_ids_to_tokens(example.ids)
    assert not any("▁▁" in piece for piece in pieces)
    assert not any(piece == "▁" and after.startswith("▁") for piece, after in itertools.pairwise(pieces))
    assert re.fullmatch(r"▁\d+", "".join(pieces[example.start :]))


def test_a_prompt_begins_once(llama_like, model):
    asked = dataclasses.replace(model, cfg=dataclasses.replace(STUDENT, vocab_size=400), tokenizer=llama_like)
    assert asked.encode("<s>A king") == [1, *asked.encode("A king")[1:]] and asked.encode("A king")[0] == 1
    assert asked.encode("") == [1]


def test_rows_begin_as_prompts_do(llama_like, tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(synthetic.documents(0, 40)))
    for path in (None, file):
        rows = probes.rows_of_text(Text(llama_like, 0), 5, 60, path)
        assert rows.shape == (5, 60) and (rows[:, 0] == 1).all() and not (rows[:, 1:] == 1).any()
        whole = probes.rows_of_text(Text(tokenizer, 0), 5, 60, path).reshape(-1)
        assert whole.tolist() == probes.document(Text(tokenizer, 0), 300, path).ids
