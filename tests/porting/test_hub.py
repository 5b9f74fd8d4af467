import json
import re
import sys

import pytest
import tokenizers
import transformers
from huggingface_hub import errors

from radlads_jax.data import prepare, sources
from radlads_jax.data.tokenise import Framing
from radlads_jax.decoding import loaded
from radlads_jax.porting import hub
from radlads_jax.porting.safetensors_read import INDEX_FILE, SINGLE_FILE


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / SINGLE_FILE).write_bytes(b"")
    return tmp_path


@pytest.fixture
def tokenizer_dir(tmp_path):
    """A qwen2 directory whose tokenizer splits at spaces only, unlike Qwen's own, which takes digits one by one."""
    words = {"12": 0, "34": 1, "1": 2, "2": 3, "3": 4, "4": 5, "<unk>": 6}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<eos>", "added_tokens_decoder": {}})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return tmp_path


def test_an_existing_directory_is_itself(model_dir):
    assert hub.resolve_model_dir(model_dir) == model_dir
    assert hub.resolve_model_dir(str(model_dir)) == model_dir


def test_a_revision_of_a_directory_is_refused(model_dir):
    with pytest.raises(ValueError, match=r"the revision v2 for .*a directory, which has none"):
        hub.resolve_model_dir(model_dir, "v2")


def test_a_runs_directory_is_no_model_but_holds_one(tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match=rf"as a run's directory does not.*{re.escape(str(tmp_path / 'export'))}"):
        hub.resolve_model_dir(tmp_path)


def test_a_directory_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*\bpickles\b.*save_pretrained"):
        hub.resolve_model_dir(tmp_path)


@pytest.mark.parametrize("name", ["no/such/directory", "gone", "/gone", "../gone", "org/", "~/model"])
def test_neither_a_directory_nor_an_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=rf"{re.escape(repr(name))}.*'organisation/name'"):
        hub.resolve_model_dir(name)


def test_an_id_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'no-organisation/no-model'.*download") as raised:
        hub.resolve_model_dir("no-organisation/no-model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("token", "said"), [("", "there is no token"), ("hf_secret", "there is a token")])
@pytest.mark.parametrize(("kind", "status"), [("GatedRepoError", 403), ("RepositoryNotFoundError", 401)])
def test_a_refused_download_names_the_token(monkeypatch, kind, status, token, said):
    """The variable, and never its value."""
    http = sys.modules[errors.Response.__module__.partition(".")[0]]
    answer = http.Response(status, request=http.Request("GET", "https://hub.test/api/models/organisation/gated"))

    def refuse(*args, **kwargs):
        raise getattr(errors, kind)(f"{status} Client Error.\nCannot access it.", response=answer)

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_TOKEN_PATH", "/none")
    with pytest.raises(ValueError, match=r"HF_TOKEN") as raised:
        hub.resolve_model_dir("organisation/gated")
    assert "organisation/gated" in str(raised.value) and str(status) in str(raised.value)
    assert said in str(raised.value) and "secret" not in str(raised.value)


SMALL = ["config.json", "tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja"]
NEVER = [
    *("pytorch_model.bin", "model.pt", "modeling_x.py", "model.pth", "README.md", "model.gguf", "weights.pkl"),
    *("original/consolidated.00.pth", "original/model.safetensors", "original/params.json", "consolidated.safetensors"),
    *("checkpoint-500/model.safetensors", "checkpoint-500/config.json", "onnx/tokenizer.json"),
    "consolidated-00001-of-00002.safetensors",
]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}})


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function that puts files by name (their text) on a hub; it returns what is asked of it and the snapshot."""
    commit, asked, snapshot = "0123456789" * 4, [], tmp_path / "snapshots" / ("0123456789" * 4)

    def put(files: dict[str, str]):
        def download(model_id, *, revision, allow_patterns, ignore_patterns):
            asked.append((model_id, revision))
            patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
            for name in hub.huggingface_hub.utils.filter_repo_objects(files, **patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / name).write_text(files[name])
            snapshot.mkdir(parents=True, exist_ok=True)
            return str(snapshot)

        monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
        return asked, snapshot, commit

    return put


@pytest.mark.parametrize(
    ("weights", "read"),
    [
        ({SINGLE_FILE: ""}, [SINGLE_FILE]),
        ({SINGLE_FILE: "", "adapted.safetensors": "", SHARDS[0]: ""}, [SINGLE_FILE]),
        ({INDEX_FILE: INDEX, **dict.fromkeys(SHARDS, ""), "model-of-ema.safetensors": ""}, [INDEX_FILE, *SHARDS]),
        ({"weights.safetensors": ""}, ["weights.safetensors"]),
    ],
)
def test_only_what_is_read_is_downloaded(repository, weights, read):
    asked, snapshot, commit = repository(dict.fromkeys([*SMALL, *NEVER], "") | weights)
    assert hub.resolve_model_dir("organisation/model-1.5", revision="abc") == snapshot
    there = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()}
    assert there == {*SMALL, *read}
    # What is fetched second is of the same commit.
    assert asked[0] == ("organisation/model-1.5", "abc") and {revision for _, revision in asked[1:]} <= {commit}


def test_an_adapter_on_the_hub_is_refused(repository):
    repository({"adapter_config.json": "{}", "adapter_model.safetensors": "", "tokenizer.json": "{}"})
    with pytest.raises(ValueError, match=r"adapter_config\.json.*merge_and_unload"):
        hub.resolve_model_dir("organisation/adapter")


def test_the_tokenizer_is_the_files_own(tokenizer_dir):
    tokenizer = hub.load_tokenizer(tokenizer_dir)
    assert tokenizer.encode("12 34 5") == [0, 1, 6]
    assert tokenizer.eos_token == "<eos>"


def test_a_missing_tokenizer_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} .*tokenizer\.json"):
        hub.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_tokenizer_is_a_value_error(tokenizer_dir, content):
    (tokenizer_dir / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        hub.load_tokenizer(tokenizer_dir)


def words_tokenizer(directory, count: int, **special: str) -> transformers.PreTrainedTokenizerBase:
    words = {f"w{i}": i for i in range(count)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return hub.load_tokenizer(directory)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, models):
    assert models["qwen2"].vocab_size == 40
    hub.check_tokenizer(words_tokenizer(tmp_path, 40), models["qwen2"])
    with pytest.raises(ValueError, match=r"ids up to 40 .*vocab_size is 40.*w40"):
        hub.check_tokenizer(words_tokenizer(tmp_path, 41), models["qwen2"])


@pytest.mark.parametrize("role", ["pad_token", "cls_token", "mask_token"])
def test_an_added_token_beyond_the_model_is_refused_in_text_alone(tmp_path, models, role, caplog):
    tokenizer = words_tokenizer(tmp_path, 40, **{role: "<added>"})
    assert tokenizer.convert_tokens_to_ids("<added>") == 40
    with caplog.at_level("WARNING", logger="absl"):
        hub.check_tokenizer(tokenizer, models["qwen2"])
    assert "<added> (40)" in caplog.text and "embedding of 40" in caplog.text
    model = loaded.Model(tmp_path, models["qwen2"], {}, tokenizer, ())
    assert model.encode("w1 w39") == [1, 39]
    with pytest.raises(ValueError, match=r"'<added>'.*40"):
        model.encode("w1 <added>")
    (tmp_path / "text.txt").write_text("w1 w2\n\n\nw3 <added> w4")
    source, backend = sources.Source(str(tmp_path / "text.txt")), tokenizer.backend_tokenizer
    with pytest.raises(ValueError, match="expected 0 to 39"):
        prepare.prepare(source, backend, tmp_path / "data", vocab_size=40, framing=Framing(special_tokens=True))


def test_an_added_end_of_text_beyond_the_model_is_refused(tmp_path, models):
    with pytest.raises(ValueError, match=r"<end>"):
        hub.check_tokenizer(words_tokenizer(tmp_path, 40, eos_token="<end>"), models["qwen2"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_git_lfs_pointer(tokenizer_dir, name):
    (tokenizer_dir / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 11421896\n")
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer.*11421896.*lfs pull"):
        hub.load_tokenizer(tokenizer_dir)
