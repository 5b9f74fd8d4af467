"""Documents from every kind of source, and what is said about a source that is not right."""

import dataclasses
import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from radlads_jax.data import sources, synthetic
from radlads_jax.data.sources import Source, documents, fingerprint

TEXTS = ["One tale.\nTwo lines.", "Größe, 日本語.", "The last."]


def make_text(directory: Path) -> Path:
    (directory / "a.txt").write_text("\n\n\n".join(TEXTS[:2]) + "\n", encoding="utf-8")
    (directory / "b.txt").write_text(TEXTS[2], encoding="utf-8")
    return directory


def make_jsonl(directory: Path) -> Path:
    lines = [json.dumps({"id": 1, "text": text}) for text in ("", *TEXTS)]
    (directory / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return directory / "a.jsonl"


def make_gzip(directory: Path) -> Path:
    path = make_jsonl(directory)
    (directory / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return directory / "a.jsonl.gz"


def make_parquet(directory: Path) -> Path:
    table = pyarrow.table({"id": [1, 2, 3, 4], "text": [TEXTS[0], None, *TEXTS[1:]]})
    pyarrow.parquet.write_table(table, directory / "a.parquet", row_group_size=2)
    return directory


def make_saved_dataset(directory: Path) -> Path:
    datasets.Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3]}).save_to_disk(directory / "d")
    return directory / "d"


def make_saved_splits(directory: Path) -> Path:
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(directory / "d")
    return directory / "d"


MAKERS = {
    "text": (make_text, "text"),
    "jsonl": (make_jsonl, "jsonl"),
    "gzip": (make_gzip, "jsonl"),
    "parquet": (make_parquet, "parquet"),
    "saved": (make_saved_dataset, "hf"),
    "splits": (make_saved_splits, "hf"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_documents(tmp_path: Path, name: str) -> None:
    make, kind = MAKERS[name]
    source = Source(str(make(tmp_path)), kind)
    assert list(documents(source)) == TEXTS
    assert list(documents(dataclasses.replace(source, num_documents=2))) == TEXTS[:2]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    assert list(documents(Source(str(make_parquet(data)), "hf", streaming=streaming))) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("second", "said"), [('{"other": 1}\n', "column names"), ('{"text": "a"\n{', "JSON parse")])
def test_a_dataset_whose_files_disagree_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool, second: str, said: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    make_jsonl(tmp_path / "data")
    write(tmp_path / "data" / "b.jsonl", second)
    where = re.escape(str(tmp_path / "data"))
    refuse(Source(str(tmp_path / "data"), "hf", streaming=streaming), rf"{where} .*{said}.*; expected")


def test_any_error_of_datasets_own_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_, **__) -> None:
        raise datasets.exceptions.NonMatchingSplitsSizesError([{"expected": 3, "recorded": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    refuse(Source("owner/name", "hf"), r"owner/name .*\brecorded\b.*; expected")


def test_another_split(tmp_path: Path) -> None:
    assert list(documents(Source(str(make_saved_splits(tmp_path)), "hf", split="test"))) == TEXTS[:1]


def test_synthetic_documents() -> None:
    assert list(documents(Source("tales", "synthetic", seed=7, num_documents=3))) == list(synthetic.documents(7, 3))


@pytest.mark.parametrize("separator", ["\n\n\n", "<|end|>", "#"])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_separators_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, block: int) -> None:
    monkeypatch.setattr(sources, "READ_CHARACTERS", block)
    texts = ["one", "two\n\ntwo <|en", "", "three"]
    source = Source(write(tmp_path / "a.txt", separator.join(texts)), separator=separator)
    assert list(documents(source)) == ["one", "two\n\ntwo <|en", "three"]


def test_text_without_a_separator_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line\n\nline\r\nline\n")
    assert list(documents(Source(str(tmp_path / "a.txt")))) == ["line\n\nline\nline"]


def test_the_fingerprint_changes_with_the_source(tmp_path: Path) -> None:
    source = Source(str(make_text(tmp_path)))
    prints = [fingerprint(source), fingerprint(dataclasses.replace(source, separator="x"))]
    (tmp_path / "b.txt").write_text("The last!")
    prints.append(fingerprint(source))
    (tmp_path / "c.txt").write_text("More.")
    prints.append(fingerprint(source))
    prints += [fingerprint(Source("tales", "synthetic", seed=seed)) for seed in (0, 1)]
    assert len({json.dumps(each) for each in prints}) == 6
    assert fingerprint(source) == fingerprint(source)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def refuse(source: Source, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        list(documents(source))
    assert "\n" not in str(error.value)


def test_missing_paths(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    refuse(Source(missing), rf"{re.escape(missing)} .*; check the path, or set config\.data\.source=hf")
    for kind in ("text", "jsonl", "parquet"):
        refuse(Source(missing, kind), rf"{re.escape(missing)} .*\b{kind} file\b")
    refuse(Source(missing, "hf"), rf"{re.escape(missing)} .*HF_TOKEN")
    refuse(Source("nobody/nothing", "hf"), "nobody/nothing .*HF_TOKEN")


def test_a_directory_without_files_of_the_kind(tmp_path: Path) -> None:
    refuse(Source(str(tmp_path)), rf"{re.escape(str(tmp_path))} has no file ending in \.txt; .*config\.data\.source")
    make_text(tmp_path)
    refuse(Source(str(tmp_path), "parquet"), r"\.parquet \(it has a\.txt, b\.txt\); .*config\.data\.source")
    make_jsonl(tmp_path)
    assert list(documents(Source(str(tmp_path), "jsonl"))) == TEXTS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"a\.jsonl, line 2 .*\bcolumn \d"),
        ("[1]", r"line 2 .*\blist\b.*JSON object"),
        ("[" * 100_000, r"line 2 .*\bnested too deeply\b"),
        (f'{{"text": {"9" * 5_000}}}', r"line 2 .*\bnot JSON\b.*digits"),
        ('{"body": "b", "id": 1}', r"line 2 .*'text'.*: body, id\b.*text_field"),
        ('{"text": 3}', r"line 2 .*\bint in 'text'.*text_field"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    refuse(Source(write(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{line}\n'), "jsonl"), message)


def test_missing_columns(tmp_path: Path) -> None:
    refuse(Source(str(make_parquet(tmp_path)), "parquet", text_field="body"), r"'body'.*: id, text\b.*text_field")
    refuse(Source(str(tmp_path), "hf", text_field="body", streaming=True), "no column 'body'")
    refuse(Source(str(make_saved_dataset(tmp_path)), "hf", text_field="body"), r"'body'.*: text, id\b.*text_field")
    refuse(Source(str(make_parquet(tmp_path)), "parquet", text_field="id"), r"\bint in 'id'.*text_field")


def test_missing_split(tmp_path: Path) -> None:
    refuse(Source(str(make_saved_splits(tmp_path)), "hf", split="dev"), r"'dev'.*\btrain, test\b")


def test_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refuse(Source(str(tmp_path / "a.txt")), r"a\.txt .*UTF-8")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    refuse(Source(str(tmp_path / "a.jsonl"), "jsonl"), r"a\.jsonl .*UTF-8")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    refuse(Source(str(tmp_path / "a.parquet"), "parquet"), r"a\.parquet .*\bwhole parquet\b")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-12])
    refuse(Source(str(tmp_path / "a.jsonl.gz"), "jsonl"), r"a\.jsonl\.gz .*\bgzip\b")
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain")
    refuse(Source(str(tmp_path / "b.jsonl.gz"), "jsonl"), r"b\.jsonl\.gz .*\bgzip\b")
    refuse(Source(write(tmp_path / "c.txt", "a"), separator=""), "separator")
