"""Checkpoints as other programs leave them: read as transformers reads them, or refused with cause and command."""

import json
import shlex
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from untrained import random_params, student_of

from radlads_jax.models import ModelConfig
from radlads_jax.models.tree import flatten
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.safetensors_read import INDEX_FILE, SINGLE_FILE, open_checkpoint
from radlads_jax.porting.save import save_params

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def resave(directory, change, file: str = SINGLE_FILE) -> None:
    tensors = load_file(directory / file)
    change(tensors)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / file)


def loaded(directory) -> dict:
    return flatten(load_params(directory, model_config_from_hf(read_config(directory))))


def same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(value))


def run_advice(message: str) -> None:
    """Runs the command that a message ends with."""
    subprocess.run(shlex.split(message[message.index("python -c ") :]), check=True)


@pytest.mark.parametrize("change", ["one value", "all values", "a longer matrix"])
def test_a_head_of_its_own_in_a_tied_model_is_refused(models, tmp_path, random_checkpoint, change):
    random_checkpoint(tmp_path / "a model", models["qwen2 tied"])

    def add_head(tensors):
        tensors[HEAD] = tensors[EMBEDDING].copy()
        if change == "one value":
            tensors[HEAD][39, 23] += 1
        elif change == "all values":
            tensors[HEAD] += 1
        else:
            tensors[HEAD] = np.concatenate([tensors[HEAD], tensors[HEAD][:2]])

    resave(tmp_path / "a model", add_head)
    with pytest.raises(ValueError, match=rf"tie_word_embeddings.*{HEAD}.*{EMBEDDING}") as raised:
        loaded(tmp_path / "a model")
    if change != "a longer matrix":
        run_advice(str(raised.value))
        tensors = load_file(tmp_path / "a model" / SINGLE_FILE)
        np.testing.assert_array_equal(loaded(tmp_path / "a model")["head", "kernel"], tensors[HEAD].T)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_equal_head_in_a_tied_model_is_passed_over(models, tmp_path, random_checkpoint, dtype):
    random_checkpoint(tmp_path / "m", models["qwen2 tied"], "float16")
    expected = loaded(tmp_path / "m")
    resave(tmp_path / "m", lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].astype(dtype)}))
    same(loaded(tmp_path / "m"), expected)


def test_a_tied_model_stored_under_its_heads_name(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2 tied"])
    expected = loaded(tmp_path / "m")
    resave(tmp_path / "m", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    same(loaded(tmp_path / "m"), expected)


def test_a_tied_model_whose_config_does_not_say_so(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2 tied"])
    expected = loaded(tmp_path / "m")
    config = read_config(tmp_path / "m")
    del config["tie_word_embeddings"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"missing.*{HEAD}.*tie_word_embeddings") as raised:
        loaded(tmp_path / "m")
    run_advice(str(raised.value))
    same(loaded(tmp_path / "m"), expected)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.model.", "module.model.", "base_model.model.model."])
@pytest.mark.parametrize("name", ["qwen2 tied", "llama", "rad_rwkv7"])
def test_other_prefixes(models, tmp_path, random_checkpoint, name, prefix):
    tensors = random_checkpoint(tmp_path / "m", models[name])
    expected = loaded(tmp_path / "m")
    whole = prefix.removesuffix("model.")
    renamed = {
        whole + n if n == HEAD else prefix + n.removeprefix("model."): np.ascontiguousarray(t)
        for n, t in tensors.items()
    }
    save_file(renamed, tmp_path / "m" / SINGLE_FILE)
    same(loaded(tmp_path / "m"), expected)


def test_without_a_prefix_and_without_a_head_only_the_head_is_missing(models, tmp_path, random_checkpoint):
    tensors = random_checkpoint(tmp_path / "m", models["qwen2"])
    kept = {n.removeprefix("model."): np.ascontiguousarray(t) for n, t in tensors.items() if n != HEAD}
    save_file(kept, tmp_path / "m" / SINGLE_FILE)
    with pytest.raises(ValueError, match=r"got 1 missing: lm_head\.weight; expected"):
        loaded(tmp_path / "m")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_refused_with_how_to_merge_it(models, tmp_path, random_checkpoint, name, alone):
    if not alone:
        random_checkpoint(tmp_path / "m", models["qwen2"])
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"adapter \({name}\).*merge_and_unload") as raised:
        open_checkpoint(tmp_path / "m")
    assert "\n" not in str(raised.value)


def test_weights_saved_around_an_adapter_say_so(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"])
    name = "model.layers.0.self_attn.q_proj"

    def wrap(tensors):
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        tensors[f"{name}.lora_A.default.weight"] = np.ones((2, 24), np.float32)

    resave(tmp_path / "m", wrap)
    with pytest.raises(ValueError, match=r"lora_A.*not merged.*merge_and_unload"):
        loaded(tmp_path / "m")


BUFFERS = ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "masked_bias"]


@pytest.mark.parametrize("buffer", BUFFERS)
def test_a_shard_may_hold_more_than_the_index_lists(models, tmp_path, random_checkpoint, buffer):
    random_checkpoint(tmp_path / "m", models["llama"], files=3)
    expected = loaded(tmp_path / "m")
    more = {f"model.layers.0.self_attn.{buffer}": np.ones(3, np.float32), "step": np.ones(1, np.int64)}
    resave(tmp_path / "m", lambda tensors: tensors.update(more), "model-00002-of-00003.safetensors")
    same(loaded(tmp_path / "m"), expected)


@pytest.mark.parametrize("listed", [HEAD, *(f"model.layers.1.self_attn.{buffer}" for buffer in BUFFERS)])
def test_an_index_may_list_what_is_not_needed_and_not_there(models, tmp_path, random_checkpoint, listed):
    random_checkpoint(tmp_path / "m", models["qwen2 tied"], files=3)
    expected = loaded(tmp_path / "m")
    index = json.loads((tmp_path / "m" / INDEX_FILE).read_text())
    index["weight_map"][listed] = "model-00003-of-00003.safetensors"
    (tmp_path / "m" / INDEX_FILE).write_text(json.dumps(index))
    same(loaded(tmp_path / "m"), expected)


def test_of_two_files_with_a_tensor_the_index_says_which(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"], files=2)
    expected = loaded(tmp_path / "m")
    first = load_file(tmp_path / "m" / "model-00001-of-00002.safetensors")
    stale = {name: value + 1 for name, value in first.items()}
    resave(tmp_path / "m", lambda tensors: tensors.update(stale), "model-00002-of-00002.safetensors")
    same(loaded(tmp_path / "m"), expected)


def test_a_needed_tensor_that_its_shard_lacks_is_named_with_the_shard(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"], files=2)
    resave(tmp_path / "m", lambda t: t.pop("model.norm.weight"), "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"missing.*model\.norm\.weight.*00002-of-00002"):
        loaded(tmp_path / "m")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 3087467144\n".format("0" * 64)


@pytest.mark.parametrize("name", [SINGLE_FILE, "config.json"])
def test_a_git_lfs_pointer_is_called_one(models, tmp_path, random_checkpoint, name):
    random_checkpoint(tmp_path / "m", models["qwen2"])
    (tmp_path / "m" / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}.*git-lfs.*3087467144.*git -C \S*/m lfs pull"):
        loaded(tmp_path / "m")


def test_weights_that_are_a_servers_page_are_called_text(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"])
    (tmp_path / "m" / SINGLE_FILE).write_text("<!DOCTYPE html><title>403 Forbidden</title>")
    with pytest.raises(ValueError, match=r"begins with '<!DOCTYP', as text does"):
        loaded(tmp_path / "m")


def test_a_shard_that_is_a_git_lfs_pointer(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"], files=2)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").write_text(POINTER)
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is a git-lfs pointer"):
        open_checkpoint(tmp_path / "m")


def test_a_model_with_images_gives_its_language_model(tmp_path):
    """As Qwen3.5 is published: names below language_model, beside what sees and what predicts further tokens."""
    teacher = ModelConfig("qwen3", 61, 16, 24, 2, 1, 8, (("attention", 2),), qk_norm=True, max_position_embeddings=64)
    cfg = student_of(teacher, "gdn", (1,))
    source = save_params(random_params(cfg), cfg, tmp_path / "text", base_config={}, dtype="float32")
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: array
        for name, array in load_file(source / "model.safetensors").items()
    }
    others = ("model.visual.patch_embed.proj.weight", "mtp.layers.0.mlp.up_proj.weight", "mtp.norm.weight")
    (tmp_path / "whole").mkdir()
    extra = {name: np.zeros((3, 3), np.float32) for name in others}
    save_file(tensors | extra, tmp_path / "whole" / "model.safetensors")
    text = read_config(source)
    config = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 1}, "tie_word_embeddings": False}
    read = model_config_from_hf(config)
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    assert read == model_config_from_hf(text)
    same(loaded(tmp_path / "whole"), loaded(source))
