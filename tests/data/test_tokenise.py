"""Documents' ids: begun as prompts are, text as text, long ones in pieces whose joins change nothing."""

import pathlib
import random

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, processors, trainers

from radlads_jax.config import defaults, validate
from radlads_jax.data import synthetic, tokenise
from radlads_jax.data.tokenise import Framing, prompt_beginning, tokenised
from radlads_jax.run import tokens

END = synthetic.END_OF_TEXT
BARE = Framing()


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return synthetic.train_tokenizer(400, count=100)


@pytest.fixture(scope="module")
def llama_like() -> Tokenizer:
    """BPE over whole texts, a mark for spaces that is put before every text, bytes for what is unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    made.train_from_iterator(
        synthetic.documents(0, 100), trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def wrapped(tokenizer: Tokenizer, **names: str) -> transformers.PreTrainedTokenizerBase:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def ids_of(text: str, tokenizer: Tokenizer, framing: Framing = BARE) -> list[int]:
    (ids,) = tokenised([text], tokenizer, framing)
    return ids.tolist()


LONG = {
    "tales": "\n".join(synthetic.documents(3, 60)),
    "one letter": "a" * 30_000,
    "spaces": " " * 9_000 + "word" * 6_000,
    "many bytes a letter": "é漢字🎉 " * 6_000,
    "noise": "".join(random.Random(0).choices("ab ,.\n\t0189éß漢🎉", k=30_000)),
}


@pytest.mark.parametrize("name", ["byte_level", "llama_like"])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_long_documents_are_tokenised_in_pieces_without_a_seam(name, text, request, monkeypatch):
    tokenizer = request.getfixturevalue(name)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 4_000)
    monkeypatch.setattr(tokenise, "OVERLAP_CHARACTERS", 512)
    assert ids_of(text, tokenizer) == whole


def test_no_more_than_a_piece_is_given_to_the_tokenizer(byte_level, monkeypatch):
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 4_000)
    monkeypatch.setattr(tokenise, "OVERLAP_CHARACTERS", 512)
    lengths: list[int] = []

    class Watched:
        encode_special_tokens, to_str = False, byte_level.to_str

        def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list:
            lengths.extend(map(len, input))
            return byte_level.encode_batch(input, add_special_tokens=add_special_tokens)

    list(tokenised([LONG["tales"], "short"], Watched(), Framing()))
    assert len(LONG["tales"]) > 20_000 and max(lengths) == 4_000


@pytest.mark.parametrize("text", [f"It ends. {END}", f"{END} begins", f"a{END}b{END}", "<|im_start|>user"])
def test_names_of_special_tokens_are_text_unless_asked_for(byte_level, text):
    special = {byte_level.token_to_id(name) for name in synthetic.SPECIAL_TOKENS}
    as_text = ids_of(text, byte_level, Framing(eos_id=0))
    assert as_text.count(0) == 1 and as_text[-1] == 0 and not special & set(as_text[:-1])
    assert byte_level.decode(as_text[:-1], skip_special_tokens=False) == text
    assert special & set(ids_of(text, byte_level, Framing(special_tokens=True)))
    assert byte_level.encode(END).ids == [0], "the tokenizer is as it was"


def test_no_document_begins_or_ends_twice(llama_like):
    framing = Framing((1,), 2, special_tokens=True)
    inner = ids_of("word", llama_like)
    for text in ("word", "<s>word", "word</s>", "<s>word</s>"):
        ids = ids_of(text, llama_like, framing)
        assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == ids.count(2) == 1
    assert ids_of("word", llama_like, framing) == [1, *inner, 2]


def test_documents_begin_as_the_tokenizer_begins_a_prompt(llama_like, byte_level):
    llama, qwen = wrapped(llama_like, bos_token="<s>", eos_token="</s>"), wrapped(byte_level, eos_token=END)
    assert prompt_beginning(llama) == (1,) and prompt_beginning(qwen) == ()
    # A tokenizer that has a BOS and does not use it, as GPT-2's.
    assert prompt_beginning(wrapped(byte_level, bos_token=END, eos_token=END)) == ()
    ids = ids_of("One tale.", llama_like, Framing(prompt_beginning(llama)))
    assert ids == llama("One tale.")["input_ids"]


@pytest.mark.parametrize(
    ("bos", "llama", "gpt2", "qwen"), [(None, (1,), (), ()), (True, (1,), (0,), None), (False, (), (), ())]
)
def test_the_bos_setting(llama_like, byte_level, bos, llama, gpt2, qwen):
    config = defaults()
    config.teacher.path, config.data.path, config.data.bos = "t", "p", bos
    run = validate(config)
    assert tokens.framing(run, wrapped(llama_like, bos_token="<s>", eos_token="</s>")).beginning == llama
    assert tokens.framing(run, wrapped(byte_level, bos_token=END, eos_token=END)).beginning == gpt2
    without = wrapped(byte_level, eos_token=END)
    if qwen is None:
        with pytest.raises(ValueError, match=r"config\.data\.bos"):
            tokens.framing(run, without)
    else:
        assert tokens.framing(run, without).beginning == qwen


def test_the_demos_documents_are_as_ever(tmp_path: pathlib.Path, byte_level):
    """Tokenizers without BOS: nothing changes."""
    texts = list(synthetic.documents(0, 5))
    expected = [[*byte_level.encode(text, add_special_tokens=False).ids, 0] for text in texts]
    framing = Framing(prompt_beginning(wrapped(byte_level, eos_token=END)), 0)
    assert [ids.tolist() for ids in tokenised(texts, byte_level, framing)] == expected
    assert all(ids.dtype == np.int64 for ids in tokenised(texts, byte_level, framing))
