"""Which files are text, and of which kind: what a directory holds, links, hidden names, files given as other kinds."""

import codecs
import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from radlads_jax.data import synthetic
from radlads_jax.data.binidx import TokenFileWriter
from radlads_jax.data.files import data_files, identity
from radlads_jax.data.prepare import made_from, prepare
from radlads_jax.data.sources import Source, documents, files_left_out, unescaped
from radlads_jax.data.tokenise import Framing
from radlads_jax.run.tokens import described

LINES = '{"text": "one"}\n{"text": "two"}\n'


def text(path: Path, content: str = "some text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """With a linked shard, a loop, a hidden copy, and files of other kinds."""
    text(tmp_path / "elsewhere" / "b.txt", "linked")
    text(tmp_path / "corpus" / "a.txt", "here")
    text(tmp_path / "corpus" / ".ipynb_checkpoints" / "a-checkpoint.txt", "hidden")
    text(tmp_path / "corpus" / "deep" / ".c.txt", "hidden")
    (tmp_path / "corpus" / "shard").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "shard again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "deep" / "loop").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus" / "d.txt").symlink_to(text(tmp_path / "elsewhere" / "file", "a linked file"))
    for name, target in (("a again.txt", "a.txt"), ("d again.txt", "../elsewhere/file"), ("gone.txt", "nothing")):
        (tmp_path / "corpus" / name).symlink_to(target)
    text(tmp_path / "corpus" / "more.jsonl", LINES)
    text(tmp_path / "corpus" / "packed.txt.gz")
    text(tmp_path / "corpus" / "LICENSE")
    return tmp_path / "corpus"


def test_a_directory_is_read_with_its_links_once_and_without_hidden_names(corpus: Path) -> None:
    assert sorted(documents(Source(str(corpus), kind="text"))) == ["a linked file", "here", "linked"]
    assert corpus / ".ipynb_checkpoints" / "a-checkpoint.txt" not in data_files(corpus)
    assert files_left_out(Source(str(corpus), kind="text")) == ["more.jsonl", "packed.txt.gz"]
    assert list(documents(Source(str(corpus), kind="jsonl"))) == ["one", "two"]


def make_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), path)
    return path


def make_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(LINES.encode()))
    return path


def make_token_file(path: Path) -> Path:
    with TokenFileWriter(path.with_name("t"), 10) as writer:
        writer.add([1])
    return path.with_name("t.idx").rename(path)


OTHERS = {
    "jsonl as text": (lambda p: text(p / "a.jsonl", LINES), "text", "source=jsonl"),
    "jsonl called txt": (lambda p: text(p / "a.txt", LINES * 5000), "text", "source=jsonl"),
    "one long line of jsonl": (lambda p: text(p / "a.txt", json.dumps({"text": "x" * 90_000})), "text", "source=jsonl"),
    "one among texts": (lambda p: text(p / "a" / "a.txt", LINES) and text(p / "a" / "b.txt").parent, "text", "jsonl"),
    "parquet as text": (lambda p: make_parquet(p / "a.txt"), "text", "source=parquet"),
    "parquet as jsonl": (lambda p: make_parquet(p / "a.jsonl"), "jsonl", "source=parquet"),
    "text as parquet": (lambda p: text(p / "a.parquet"), "parquet", "source=text"),
    "jsonl as parquet": (lambda p: text(p / "a.parquet", LINES), "parquet", "source=jsonl"),
    "gzip as text": (lambda p: make_gzip(p / "a.txt"), "text", "jsonl.gz"),
    "a list in JSON as text": (lambda p: text(p / "a.txt", json.dumps([{"text": "one"}], indent=1)), "text", "jsonl"),
    "jsonl behind a mark": (lambda p: text(p / "a.txt", f"\ufeff{LINES}"), "text", "source=jsonl"),
    "tokens as text": (lambda p: make_token_file(p / "a.txt"), "text", "source=binidx"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_another_kind_is_refused_with_the_flag(case: str, tmp_path: Path) -> None:
    make, kind, advice = OTHERS[case]
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*\b{kind} .*config\.data\.source .*{advice}"):
        list(documents(Source(str(make(tmp_path)), kind=kind)))


@pytest.mark.parametrize("content", ["{curly} beginnings\nand more", "[1, 2]", '{"a": 1}\nand then text', "1\n2\n", ""])
def test_text_that_only_looks_like_another_kind_is_text(content: str, tmp_path: Path) -> None:
    assert (
        list(documents(Source(str(text(tmp_path / "a.txt", content)), kind="text")))
        == [content.strip()][: len(content)]
    )


@pytest.mark.parametrize("kind", ["text", "jsonl", "jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_text(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / f"a.{kind.replace('text', 'txt')}", b"one" if kind == "text" else LINES.encode()
    content = codecs.BOM_UTF8 + content
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    assert next(documents(Source(str(path), kind.removesuffix(".gz")))) == "one"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n\n", "\n\n"),
        (r"\t#\r", "\t#\r"),
        ("\n\n\n", "\n\n\n"),
        (r"\\n", r"\n"),
        ("<|end|>", "<|end|>"),
        ("é\\n", "é\n"),
    ],
)
def test_escapes_in_separators_are_read(typed: str, meant: str) -> None:
    assert unescaped(typed) == meant


def test_what_was_found_is_said(corpus: Path, tmp_path: Path) -> None:
    def said(name: str, **options: str) -> str:
        source = Source(str(tmp_path / name), kind="text", **options)
        made = prepare(source, tokenizer, tmp_path / "data", vocab_size=300, framing=Framing())
        return described(made, made_from(made))

    tokenizer = synthetic.train_tokenizer(300, count=50)
    assert "3 files with 3 documents of" in said("corpus") and "without more.jsonl, packed.txt.gz" in said("corpus")
    text(tmp_path / "plain.txt", "one\n\ntwo two\n\nthree")
    assert "1 file with 1 document of" in said("plain.txt") and "holds the separator" in said("plain.txt")
    assert "1 file with 3 documents of" in said("plain.txt", separator="\n\n")
    assert "holds the separator" not in said("plain.txt", separator="\n\n")


def test_files_are_told_apart_by_samples_that_reach_both_ends(tmp_path: Path) -> None:
    content = bytearray(300_000)
    path = tmp_path / "a"
    prints = set()
    for place in (None, 0, 100_000, len(content) - 1):
        changed = content.copy()
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        prints.add(str(identity(path, of_many=True)))
    path.write_bytes(content + b"\0")
    prints.add(str(identity(path, of_many=True)))
    assert len(prints) == 5
