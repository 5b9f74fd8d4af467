"""The tokenizer of an export: AutoTokenizer gives the ids that training had."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from radlads_jax.porting import hub, tokenizer_files
from radlads_jax.porting.tokenizer_files import SAMPLES, check_exportable, write_tokenizer

TEXT = "it's 12345 o'clock,  IT'LL do\n\n 2 + 2"


def byte_level_bpe(pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """Byte-level BPE whose merges go over digits, spaces, letters and apostrophes wherever they are not split."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("1", "2"), ("12", "3"), ("4", "5"), ("Ġ", "Ġ"), ("'", "s"), ("t", "'s"), ("Ġ", "2"), ("o", "'")]
    for first, second in merges:
        vocab[first + second] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    return tokenizer


WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def save(directory, tokenizer: tokenizers.Tokenizer, **config) -> None:
    directory.mkdir()
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"} | config))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))


def exported_ids(source, target, config=None, texts=(TEXT, *SAMPLES)) -> tuple[list[list[int]], list[list[int]]]:
    """The ids that training has, and those of the written tokenizer through AutoTokenizer, as a student's export."""
    target.mkdir()
    classes = {"AutoConfig": "configuration_rwkv7qwen2.RWKV7Qwen2Config"}
    config = config or {"model_type": "rwkv7qwen2", "auto_map": classes}
    write_tokenizer(source, target, config)
    (target / "config.json").write_text(json.dumps(config))
    written, own = transformers.AutoTokenizer.from_pretrained(target), hub.load_tokenizer(source)
    assert written.eos_token == "<|endoftext|>"
    return [own(text)["input_ids"] for text in texts], [written(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("rule", [WHOLE, DIGITS], ids=["whole", "digits"])
@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TheirTokenizer", None]
)
def test_ids_are_those_of_training_whatever_class_the_teacher_names(tmp_path, name, rule):
    save(tmp_path / "teacher", byte_level_bpe(rule), **({"tokenizer_class": name} if name else {}))
    wanted, got = exported_ids(tmp_path / "teacher", tmp_path / "export")
    assert wanted == got == [byte_level_bpe(rule).encode(text).ids for text in (TEXT, *SAMPLES)]


@pytest.mark.parametrize("rule", [WHOLE, DIGITS], ids=["whole", "digits"])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5", "qwen2", "qwen3", "llama", "mistral"])
def test_ids_are_those_of_training_whatever_the_models_type(tmp_path, kind, rule):
    """transformers has classes of its own for some of them, whatever the tokenizer says."""
    save(tmp_path / "teacher", byte_level_bpe(rule))
    wanted, got = exported_ids(tmp_path / "teacher", tmp_path / "export", {"model_type": kind})
    assert wanted == got == [byte_level_bpe(rule).encode(text).ids for text in (TEXT, *SAMPLES)]
    own = (tmp_path / "export" / "tokenization_file.py").is_file()
    assert own == (kind in ("qwen3_5", "qwen2"))
    if own:
        read = transformers.AutoTokenizer.from_pretrained(tmp_path / "export", trust_remote_code=True)
        assert [read(text)["input_ids"] for text in (TEXT, *SAMPLES)] == wanted


def test_other_settings_are_kept_and_code_is_not_named(tmp_path):
    kept = {"model_max_length": 77, "chat_template": "{{ messages }}", "clean_up_tokenization_spaces": False}
    code = {"auto_map": {"AutoTokenizer": ["tokenization_theirs.TheirTokenizer", None]}}
    save(tmp_path / "teacher", byte_level_bpe(WHOLE), tokenizer_class="TheirTokenizer", **kept, **code)
    wanted, got = exported_ids(tmp_path / "teacher", tmp_path / "export")
    assert wanted == got
    written = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    expected = kept | {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    assert written == expected
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (
        tmp_path / "teacher" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}])
def test_a_teacher_of_vocabulary_and_merges_gets_a_tokenizer_file(tmp_path, config):
    save(tmp_path / "teacher", byte_level_bpe(WHOLE))
    told = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "teacher" / name).unlink()
    (tmp_path / "teacher" / "vocab.json").write_text(json.dumps(told["vocab"]))
    (tmp_path / "teacher" / "merges.txt").write_text("\n".join(" ".join(pair) for pair in told["merges"]))
    if config:
        (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(config))
    wanted, got = exported_ids(tmp_path / "teacher", tmp_path / "export")
    assert wanted == got and len(wanted[0]) > 5
    assert hub.load_tokenizer(tmp_path / "export")(TEXT)["input_ids"] == wanted[0]


def test_a_teacher_of_words_gets_a_tokenizer_file(tmp_path):
    (tmp_path / "teacher").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "do", "##ll"]
    (tmp_path / "teacher" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (tmp_path / "export").mkdir()
    write_tokenizer(tmp_path / "teacher", tmp_path / "export", {"model_type": "rwkv7qwen2"})
    wanted = hub.load_tokenizer(tmp_path / "teacher")("it doll")["input_ids"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "export")("it doll")["input_ids"] == wanted
    assert 7 in wanted


def test_other_ids_are_refused_before_the_training(tmp_path, monkeypatch):
    save(tmp_path / "teacher", byte_level_bpe(WHOLE))
    other = byte_level_bpe(DIGITS)
    other.normalizer = normalizers.Lowercase()
    monkeypatch.setattr(
        tokenizer_files.transformers.AutoTokenizer,
        "from_pretrained",
        lambda *args, **kwargs: transformers.PreTrainedTokenizerFast(tokenizer_object=other),
    )
    with pytest.raises(ValueError, match=r"teacher.*AutoTokenizer.*gives.*as in training"):
        check_exportable(tmp_path / "teacher", {"model_type": "qwen3"})
