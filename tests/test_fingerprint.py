"""A continuation by contents: other ones are refused by name, the same ones go on wherever they lie."""

import json
import os
import pathlib
import re
import shutil
import types

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from untrained import random_mixers, save_teacher

from radlads_jax import config
from radlads_jax import prepare as prepare_door
from radlads_jax.data import binidx, prepare, sources, synthetic
from radlads_jax.data.tokenise import Framing
from radlads_jax.run import fingerprint, preflight, tokens, train
from radlads_jax.run.job import Job, make_job
from radlads_jax.run.settings import check_same_config, remember_config

TEXTS = list(synthetic.documents(0, 40))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def place(saved, tmp_path) -> pathlib.Path:
    """A directory with teacher/, corpus/ and a run that has begun with both."""
    shutil.copytree(saved, tmp_path / "teacher")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("\n\n\n".join(TEXTS[:20]))
    (tmp_path / "corpus" / "b.txt").write_text("\n\n\n".join(TEXTS[20:]))
    begin(tmp_path)
    return tmp_path


def chosen(place: pathlib.Path, **more):
    settings = config.defaults()
    named = tiny_run.settings(place / "teacher")
    del named["data.documents"]
    named |= {"data.source": "text", "data.path": str(place / "corpus"), "data.eval_rows": 4}
    settings.update_from_flattened_dict(named | {key.replace("__", "."): value for key, value in more.items()})
    return settings


def job_of(place: pathlib.Path, workdir: str = "run", **more) -> Job:
    return make_job(config.validate(chosen(place, **more)), place / workdir)


def begin(place: pathlib.Path, **more) -> Job:
    job = job_of(place, **more)
    remember_config(place / "run", chosen(place, **more).to_dict())
    fingerprint.begin(place / "run", job.depends)
    return job


def change_tensor(place: pathlib.Path) -> str:
    path = place / "teacher" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + np.float32(0.01)
    save_file(tensors, path)
    return f"the teacher of .*tensors {name}"


def change_teacher_config(place: pathlib.Path) -> str:
    path = place / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 77.0}))
    return "config rope_theta was .* and is 77.0"


def change_tokenizer(place: pathlib.Path) -> str:
    path = place / "teacher" / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"] = None
    path.write_text(json.dumps(document))
    return "the tokenizer of the run"


def change_end_of_text(place: pathlib.Path) -> str:
    path = place / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "a"}))
    return "the tokenizer of the run .*eos_token"


def append_text(place: pathlib.Path) -> str:
    with open(place / "corpus" / "b.txt", "a") as file:
        file.write("\n\n\nOne more.")
    return "files b.txt was .* bytes"


def change_a_letter(place: pathlib.Path) -> str:
    path = place / "corpus" / "a.txt"
    path.write_text(path.read_text().replace("a", "o", 1))
    return "files a.txt was"


def add_a_file(place: pathlib.Path) -> str:
    shutil.copy(place / "corpus" / "a.txt", place / "corpus" / "c.txt")
    return "files c.txt is new"


CHANGES = [
    change_tensor,
    change_teacher_config,
    change_tokenizer,
    change_end_of_text,
    append_text,
    change_a_letter,
    add_a_file,
]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_other_contents_under_the_same_names_are_refused(place, change):
    differs = change(place)
    with pytest.raises(ValueError, match=rf"{differs}.*[Ee]xpected the same") as error:
        job_of(place)
    assert "another --workdir" in str(error.value) and "\n" not in str(error.value)


def test_the_same_contents_elsewhere_go_on(place, monkeypatch):
    before = job_of(place)
    monkeypatch.setattr(prepare, "tokenised", lambda *_: pytest.fail("tokenised again"))
    for path in place.rglob("*"):
        os.utime(path, (1, 1))
    (place / "teacher").rename(place / "moved teacher")
    (place / "teacher").symlink_to(place / "moved teacher")
    (place / "corpus").rename(place / "moved corpus")
    (place / "run").rename(place / "moved run")
    elsewhere = {"teacher__path": str(place / "moved teacher"), "data__path": str(place / "moved corpus")}
    check_same_config(place / "moved run", chosen(place, **elsewhere).to_dict())
    after = job_of(place, "moved run", **elsewhere)
    assert after.token_file.tokens.tolist() == before.token_file.tokens.tolist()
    assert after.depends == before.depends


def test_a_finished_run_is_not_that_of_other_data(place):
    """Where it is asked for by the names that it has, its results are shown whatever has become of them."""
    (place / "run" / "export").mkdir()
    stages = [{"name": name} for name in chosen(place).stages]
    (place / "run" / "summary.json").write_text(json.dumps({"stages": stages}))
    copy = shutil.copytree(place / "corpus", place / "copy")
    append_text(place)
    assert job_of(place).depends["data"] == job_of(place, data__path=str(copy)).depends["data"]
    (copy / "a.txt").write_text((copy / "a.txt").read_text().replace("a", "o", 1))
    with pytest.raises(ValueError, match=r"files a\.txt was"):
        job_of(place, data__path=str(copy))


def test_tokens_outlive_their_text(place):
    before = job_of(place)
    shutil.rmtree(place / "corpus")
    after = job_of(place)
    assert after.token_file.tokens.tolist() == before.token_file.tokens.tolist() and after.depends == before.depends


def test_lost_tokens_are_made_again_of_the_same_text_alone(place):
    before = job_of(place)
    shutil.rmtree(place / "run" / "data")
    assert job_of(place).token_file.tokens.tolist() == before.token_file.tokens.tolist()
    shutil.rmtree(place / "run" / "data")
    append_text(place)
    with pytest.raises(ValueError, match=r"files b\.txt was"):
        job_of(place)


def test_a_run_of_an_older_version_goes_on_with_its_tokens(place):
    """Which had no fingerprint, and named its token file after its text's path and time."""
    before = job_of(place)
    (place / "run" / "fingerprint.json").unlink()
    for path in (place / "run" / "data").iterdir():
        if path.suffix == ".json":
            path.unlink()
        else:
            path.rename(path.with_name(f"corpus-0123456789abcdef{path.suffix}"))
    (place / "run" / "checkpoints" / "stage1" / "5").mkdir(parents=True)
    job = job_of(place)
    assert job.token_file.prefix.name == "corpus-0123456789abcdef"
    assert job.token_file.tokens.tolist() == before.token_file.tokens.tolist()
    fingerprint.begin(place / "run", job.depends)
    assert job_of(place).depends == job.depends
    append_text(place)
    with pytest.raises(ValueError, match=r"files b\.txt was"):
        job_of(place)


def test_a_run_that_has_not_begun_decides_nothing_of_the_next_one(place):
    """As where the first step does not fit into memory: Orbax has made its directory by then."""
    shutil.rmtree(place / "run")
    first = job_of(place, data__max_tokens=600, data__bos=False)
    fingerprint.begin(place / "run", first.depends)
    fingerprint.remember(place / "run", {"frozen": {"a": [1.0]}})
    (place / "run" / "checkpoints" / "stage1").mkdir(parents=True)
    assert first.token_file.num_tokens == 600
    change_tensor(place)
    second = job_of(place)
    assert second.token_file.num_tokens > 600
    fingerprint.begin(place / "run", second.depends)
    remember_config(place / "run", chosen(place).to_dict())
    assert fingerprint.read(place / "run") == json.loads(json.dumps(second.depends))


def test_what_a_later_stage_freezes_is_remembered_too(place):
    fingerprint.remember(place / "run", {"frozen": {"a": [1.0]}})
    fingerprint.remember(place / "run", {"frozen": {"a": [7.0], "b": [2.0]}})
    assert json.loads((place / "run" / fingerprint.FILE).read_text())["frozen"] == {"a": [1.0], "b": [2.0]}


def test_a_streamed_text_is_read_for_whole_steps_and_held_out_rows(place):
    """Short of tokens, a stage in long rows would read text twice, in a run that says another --workdir helps."""
    run = config.validate(chosen(place, data__streaming=True, data__eval_rows=32, stage1__seq_len=2**18))
    limits = []

    def note(*_, max_tokens, **__):
        limits.append(max_tokens)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokens.prepare, "prepare", note)
        tokens._tokenise(run, place / "run", types.SimpleNamespace(backend_tokenizer=None), 300, Framing((), 0, False))
    recipe = run.stage1
    assert limits[0] >= recipe.steps * recipe.batch_size * recipe.seq_len + 32 * 2**18 > 10**6


def test_a_separator_is_read_as_it_was_typed(place):
    """A shell passes a backslash and an n on as they are."""
    assert job_of(place, "typed", data__separator=r"\n\n\n").token_file.num_documents == len(TEXTS)


def test_new_weights_that_a_stage_freezes_are_looked_at_at_every_start(place, monkeypatch):
    monkeypatch.setattr(train, "init_mixers", lambda cfg, *_, **__: random_mixers(cfg))
    frozen = {"stage2__freeze": ("mixer/decay",)}
    shutil.rmtree(place / "run")
    job = begin(place, **frozen)
    train.student_after(job, (), {}, whole=False)
    document = fingerprint.read(place / "run")
    changed = {path: [x + 1 for x in values] for path, values in document["frozen"].items()}
    assert changed and all("mixer/decay" in path for path in changed)
    (place / "run" / fingerprint.FILE).write_text(json.dumps(document | {"frozen": changed}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(place / 'run'))} .*mixer/decay.*--workdir"):
        train.student_after(job, (), {}, whole=False)


def test_a_dataset_of_another_commit_on_the_hub_is_refused(place, monkeypatch):
    shutil.rmtree(place / "run")
    monkeypatch.setattr(sources, "_load_hf", lambda _: datasets.Dataset.from_dict({"text": TEXTS}))
    hub = {"data__source": "hf", "data__path": "owner/set"}
    for commit in ("c1", None, "c1"):
        monkeypatch.setattr(sources, "_hub_commit", lambda source, commit=commit: source.revision or commit)
        assert begin(place, **hub).token_file.num_documents == 40
    monkeypatch.setattr(sources, "_hub_commit", lambda source: source.revision or "c2")
    with pytest.raises(ValueError, match=r"commit was 'c1' and is 'c2'"):
        job_of(place, **hub)
    back = hub | {"data__revision": "c1"}
    check_same_config(place / "run", chosen(place, **back).to_dict())
    assert job_of(place, **back).token_file.num_documents == 40


def test_without_the_hub_no_commit_is_known():
    assert sources.fingerprint(sources.Source("owner/set", kind="hf"))["commit"] is None


def test_a_given_token_file_is_told_by_contents(place):
    shutil.rmtree(place / "run")
    made = job_of(place, "first").token_file
    token_file = {"data__source": "binidx", "data__path": str(made.prefix)}
    begin(place, **token_file)
    with pytest.raises(ValueError, match=r"special_tokens False, not True.*config\.data\.special_tokens as"):
        job_of(place, "other", **token_file, data__special_tokens=True)
    moved = shutil.copytree(made.prefix.parent, place / "moved")
    assert job_of(place, **token_file | {"data__path": str(moved)}).token_file.num_tokens == made.num_tokens
    with open(moved / f"{made.prefix.name}.bin", "r+b") as file:
        file.write(b"\x05")
    with pytest.raises(ValueError, match=rf"\btokens\b.*{re.escape(str(place / 'run'))} .*--workdir"):
        job_of(place, **token_file | {"data__path": str(moved)})


def test_other_documents_of_the_same_tokens_are_refused(place):
    shutil.rmtree(place / "run")
    made = job_of(place, "first").token_file
    with binidx.TokenFileWriter(place / "given", 300) as writer:
        writer.add(made.tokens)
    given = {"data__source": "binidx", "data__path": str(place / "given")}
    begin(place, **given)
    (place / "given.idx").write_bytes(made.prefix.with_name(f"{made.prefix.name}.idx").read_bytes())
    with pytest.raises(ValueError, match=rf"\bdocuments\b.*{re.escape(str(place / 'run'))} .*--workdir"):
        job_of(place, **given)


def test_paths_are_settings_like_others_where_no_contents_are_known(place):
    (place / "run" / "fingerprint.json").unlink()
    with pytest.raises(ValueError, match=r"config.data.path was .* and is now 'else'"):
        check_same_config(place / "run", chosen(place, data__path="else").to_dict())


def test_new_weights_that_are_drawn_otherwise_are_refused():
    values = fingerprint.of_values({"a/b": jnp.arange(12.0).reshape(3, 4), "c": jnp.zeros((2,))})
    rounded = {path: [x * (1 + 1e-4) for x in row] for path, row in values.items()}
    fingerprint.require_same_values(values, rounded, pathlib.Path("run"))
    with pytest.raises(ValueError, match=r"\brun\b.*\ba/b\b"):
        fingerprint.require_same_values(values, values | {"a/b": values["a/b"][::-1]}, pathlib.Path("run"))


def test_a_corpus_that_is_prepared_before_is_the_same_run(place, capsys):
    text = job_of(place)
    made = tokens.prepare_tokens(config.validate(chosen(place)), place / "tokens")
    assert {path.suffix for path in (place / "tokens").iterdir()} == {".bin", ".idx", ".json"}
    token_file = {"data__source": "binidx", "data__path": str(place / "tokens")}
    run = job_of(place, "other run", **token_file)
    assert run.token_file.tokens.tolist() == text.token_file.tokens.tolist() == made.file.tokens.tolist()
    assert (run.run.eval_tokens, run.beginning) == (text.run.eval_tokens, text.beginning)
    assert "2 files with 40 documents" in preflight.data(run).result
    assert not (place / "other run" / "data").exists()
    # Again is quick, another text in the same directory is not taken in, tokens are no text.
    assert tokens.prepare_tokens(config.validate(chosen(place)), place / "tokens").file.prefix == made.file.prefix
    append_text(place)
    there = sorted((place / "tokens").iterdir())
    with pytest.raises(ValueError, match=rf"{re.escape(str(place / 'tokens'))} .*--output"):
        tokens.prepare_tokens(config.validate(chosen(place)), place / "tokens")
    assert sorted((place / "tokens").iterdir()) == there
    assert job_of(place, "other run", **token_file).token_file.prefix == made.file.prefix
    with pytest.raises(ValueError, match=r"config\.data\.source .*'binidx'.*config\.data\.path"):
        tokens.prepare_tokens(config.validate(chosen(place, **token_file)), place / "tokens")


@pytest.mark.parametrize("change", [change_tokenizer, lambda place: None], ids=["tokenizer", "bos"])
def test_prepared_tokens_of_another_tokenizer_or_beginning_are_refused(place, change):
    tokens.prepare_tokens(config.validate(chosen(place)), place / "tokens")
    bos = change(place) is None
    if bos:
        path = place / "teacher" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": synthetic.END_OF_TEXT}))
    token_file = {"data__source": "binidx", "data__path": str(place / "tokens")} | ({"data__bos": True} if bos else {})
    with pytest.raises(ValueError, match=rf"\.bin .*[( ]{'beginning' if bos else 'tokenizer'} .*config\.data\.bos"):
        job_of(place, "other run", **token_file)


@pytest.mark.parametrize("setting", ["special_tokens", "bos"])
def test_what_tokens_made_elsewhere_do_not_follow_is_refused(place, setting):
    made = tokens.prepare_tokens(config.validate(chosen(place)), place / "tokens").file.prefix
    made.with_name(f"{made.name}.json").unlink()
    path = place / "teacher" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": synthetic.END_OF_TEXT}))
    token_file = {"data__source": "binidx", "data__path": str(made)}
    assert job_of(place, "plain", **token_file).beginning == ()
    with pytest.raises(ValueError, match=rf"config\.data\.{setting} is true, and .*made elsewhere.*Leave it out"):
        job_of(place, "other run", **token_file | {f"data__{setting}": True})


def test_the_door_says_what_a_run_is_to_be_told(place, capsys):
    def door(output: pathlib.Path | None, **more) -> None:
        prepare_door.main(types.SimpleNamespace(config=chosen(place, **more), output=output))

    door(place / "tokens")
    said = capsys.readouterr().out
    assert "of 2 files with 40 documents" in said and f"--config.data.path={place / 'tokens'}." in said
    of_text = {"data__max_tokens": 500, "data__separator": "\n\n\n\n"}
    door(place / "few", **of_text)
    said = capsys.readouterr().out
    assert f"{place / 'few'}, and without --config.data.separator, --config.data.max_tokens." in said
    token_file = {"data__source": "binidx", "data__path": str(place / "few")}
    assert job_of(place, "of few", **token_file).token_file.num_tokens == 500
    for name, value in of_text.items():
        with pytest.raises(ValueError, match=name.split("__")[1]):
            job_of(place, "refused", **token_file | {name: value})
    with pytest.raises(ValueError, match="expected --config FILE and --output DIR"):
        door(None)
