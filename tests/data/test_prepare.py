"""Preparing a source: the right tokens, found again while nothing has changed, and nothing left when it fails."""

import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from radlads_jax.data import synthetic
from radlads_jax.data.binidx import TokenFileWriter
from radlads_jax.data.prepare import made_from, prepare
from radlads_jax.data.sources import Source
from radlads_jax.data.tokenise import Framing

EOS = 0
ENDED = Framing(eos_id=EOS)


class CountingTokenizer:
    """Hands on to a tokenizer and counts the documents it was given."""

    encode_special_tokens = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.documents = tokenizer, 0

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list:
        self.documents += len(input)
        return self.tokenizer.encode_batch(input, add_special_tokens=add_special_tokens)

    def to_str(self) -> str:
        return self.tokenizer.to_str()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return synthetic.train_tokenizer(400, count=100)


@pytest.fixture
def tokenizer(trained: Tokenizer) -> CountingTokenizer:
    return CountingTokenizer(trained)


def text_source(directory: Path, texts: list[str]) -> Source:
    (directory / "tales.txt").write_text("\n\n\n".join(texts), encoding="utf-8")
    return Source(str(directory / "tales.txt"))


def test_tokens_of_every_document_and_its_end(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    texts = list(synthetic.documents(0, 5))
    file = prepare(text_source(tmp_path, texts), tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED)
    expected = [[*tokenizer.tokenizer.encode(text).ids, EOS] for text in texts]
    assert [file.document(i).tolist() for i in range(file.num_documents)] == expected
    bare = prepare(
        Source(str(tmp_path / "tales.txt")), tokenizer, tmp_path / "cache", vocab_size=400, framing=Framing()
    )
    assert bare.document(4).tolist() == expected[4][:-1]


def test_a_second_time_reads_the_cache(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    source = text_source(tmp_path, list(synthetic.documents(0, 5)))
    first = prepare(source, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED)
    second = prepare(source, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED)
    assert tokenizer.documents == 5
    assert first.prefix == second.prefix
    assert first.tokens.tolist() == second.tokens.tolist()


def test_any_change_prepares_anew(tmp_path: Path, trained: Tokenizer) -> None:
    source = text_source(tmp_path, list(synthetic.documents(0, 5)))
    other = synthetic.train_tokenizer(300, count=100)

    def prefix(tokenizer: Tokenizer = trained, framing: Framing = ENDED, max_tokens: int | None = None) -> Path:
        return prepare(source, tokenizer, tmp_path / "c", vocab_size=400, framing=framing, max_tokens=max_tokens).prefix

    prefixes = [prefix(), prefix(other), prefix(framing=Framing()), prefix(max_tokens=50)]
    prefixes += [prefix(framing=Framing((1,), EOS)), prefix(framing=Framing((), EOS, special_tokens=True))]
    with open(source.path, "a") as file:
        file.write("!")
    prefixes.append(prefix())
    assert len(set(prefixes)) == 7


def test_the_same_text_elsewhere_and_at_another_time_is_found(tmp_path: Path, tokenizer: CountingTokenizer) -> None:
    source = text_source(tmp_path, list(synthetic.documents(0, 5)))
    first = prepare(source, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED)
    os.utime(source.path, (1, 1))
    assert prepare(source, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED).prefix == first.prefix
    moved = Source(str(Path(source.path).rename(tmp_path / "moved.txt")))
    assert prepare(moved, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED).prefix == first.prefix
    assert tokenizer.documents == 5


@pytest.mark.parametrize("lost", [0, 1, 3, 1000])
def test_what_was_interrupted_goes_on(
    tmp_path: Path, tokenizer: CountingTokenizer, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """The process ends in the middle, and the disk has lost the last bytes of what it wrote."""
    monkeypatch.setattr("radlads_jax.data.tokenise.BATCH_CHARACTERS", 1000)
    monkeypatch.setattr("radlads_jax.data.binidx.SAFE_TOKENS", 100)
    source = Source("tales", "synthetic", num_documents=20)
    whole = prepare(source, tokenizer, tmp_path / "whole", vocab_size=400, framing=ENDED)
    add = TokenFileWriter.add

    def stopped(self: TokenFileWriter, document: np.ndarray) -> None:
        add(self, document)
        if self.num_documents == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenFileWriter, "add", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED)
    monkeypatch.setattr(TokenFileWriter, "add", add)
    (left,) = (tmp_path / "cache").glob("*.unfinished.bin")
    os.truncate(left, max(0, left.stat().st_size - lost))
    before = tokenizer.documents
    made = prepare(source, tokenizer, tmp_path / "cache", vocab_size=400, framing=ENDED)
    assert made.tokens.tolist() == whole.tokens.tolist()
    assert made.document_starts.tolist() == whole.document_starts.tolist()
    assert tokenizer.documents - before <= (8 if lost == 0 else 9 if lost < 10 else 20)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".bin", ".idx", ".json"]


def test_what_tokens_were_made_from_is_said_beside_them_in_any_case(
    tmp_path: Path, tokenizer: CountingTokenizer
) -> None:
    """The process may end when they are whole and this is not."""
    source = Source("tales", "synthetic", num_documents=3)
    made = prepare(source, tokenizer, tmp_path, vocab_size=400, framing=ENDED)
    said = made_from(made)
    (tmp_path / f"{made.prefix.name}.json").unlink()
    before = tokenizer.documents
    assert made_from(prepare(source, tokenizer, tmp_path, vocab_size=400, framing=ENDED)) == said != {}
    assert tokenizer.documents == before


@pytest.mark.parametrize("max_tokens", [1, 100, 30_000])
def test_max_tokens_stops_reading(
    tmp_path: Path, tokenizer: CountingTokenizer, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    monkeypatch.setattr("radlads_jax.data.tokenise.BATCH_CHARACTERS", 10_000)
    source = Source("tales", "synthetic", seed=3)
    file = prepare(source, tokenizer, tmp_path, vocab_size=400, framing=ENDED, max_tokens=max_tokens)
    assert file.num_tokens == max_tokens
    # A tale has at least 70 tokens, and a batch at most some 40 tales.
    assert tokenizer.documents < max_tokens / 70 + 40


def test_batches_keep_the_order(tmp_path: Path, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("tales", "synthetic", num_documents=20)
    whole = prepare(source, trained, tmp_path / "a", vocab_size=400, framing=ENDED)
    monkeypatch.setattr("radlads_jax.data.tokenise.BATCH_CHARACTERS", 1000)
    in_pieces = prepare(source, trained, tmp_path / "b", vocab_size=400, framing=ENDED)
    assert whole.num_documents == 20
    assert whole.tokens.tolist() == in_pieces.tokens.tolist()


def test_a_failure_leaves_nothing(tmp_path: Path, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radlads_jax.data.tokenise.BATCH_CHARACTERS", 5)
    (tmp_path / "a.jsonl").write_text('{"text": "whole line"}\n{"text": "half')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 .*\bcolumn \d"):
        prepare(Source(str(tmp_path / "a.jsonl"), "jsonl"), trained, tmp_path / "cache", vocab_size=400, framing=ENDED)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_model_with_a_smaller_vocabulary(tmp_path: Path, trained: Tokenizer) -> None:
    with pytest.raises(ValueError, match="expected 0 to 299"):
        prepare(Source("tales", "synthetic", num_documents=3), trained, tmp_path, vocab_size=300, framing=ENDED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "\n\n\n\n\n\n  \n"])
def test_empty_text(tmp_path: Path, trained: Tokenizer, text: str) -> None:
    with pytest.raises(ValueError, match=r"tales\.txt"):
        prepare(text_source(tmp_path, [text]), trained, tmp_path / "cache", vocab_size=400, framing=ENDED)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_progress_bar_is_shown_on_a_terminal(
    tmp_path: Path, trained: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda is_terminal=is_terminal: is_terminal)
        source = Source("tales", "synthetic", num_documents=5 + is_terminal)
        prepare(source, trained, tmp_path, vocab_size=400, framing=ENDED)
        assert ("tokenising tales" in capsys.readouterr().err) == is_terminal
