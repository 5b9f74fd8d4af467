import json

import pytest
import tokenizers
import transformers

from radlads_jax.porting import hub
from radlads_jax.porting.safetensors_read import SINGLE_FILE


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


def test_a_directory_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="pickles are never loaded"):
        hub.resolve_model_dir(tmp_path)


@pytest.mark.parametrize("name", ["no/such/directory", "gone", "/gone", "../gone", "org/", "~/model"])
def test_neither_a_directory_nor_an_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="expected a model directory"):
        hub.resolve_model_dir(name)


def test_an_id_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'no-organisation/no-model'.*could not be downloaded") as raised:
        hub.resolve_model_dir("no-organisation/no-model")
    assert "\n" not in str(raised.value)


def test_only_weights_configs_and_tokenizers_are_downloaded(model_dir, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        hub.huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: asked.update(kwargs, id=args[0]) or str(model_dir),
    )
    assert hub.resolve_model_dir("organisation/model-1.5", revision="abc") == model_dir
    assert (asked["id"], asked["revision"]) == ("organisation/model-1.5", "abc")
    files = ["a.safetensors", "config.json", "tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja"]
    others = ["pytorch_model.bin", "model.pt", "modeling_x.py", "model.pth", "README.md", "model.gguf", "weights.pkl"]
    filtered = hub.huggingface_hub.utils.filter_repo_objects(files + others, allow_patterns=asked["allow_patterns"])
    assert list(filtered) == files


def test_the_tokenizer_is_the_files_own(tokenizer_dir):
    tokenizer = hub.load_tokenizer(tokenizer_dir)
    assert tokenizer.encode("12 34 5") == [0, 1, 6]
    assert tokenizer.eos_token == "<eos>"


def test_a_missing_tokenizer_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer that can be read"):
        hub.load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_tokenizer_is_a_value_error(tokenizer_dir, content):
    (tokenizer_dir / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        hub.load_tokenizer(tokenizer_dir)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer_dir, models):
    tokenizer = hub.load_tokenizer(tokenizer_dir)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    hub.check_tokenizer(tokenizer, models["qwen2"])
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    with pytest.raises(ValueError, match="vocab_size is 40"):
        hub.check_tokenizer(tokenizer, models["qwen2"])
