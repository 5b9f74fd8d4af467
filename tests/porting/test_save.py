import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open

from radlads_jax.models.tensors import param_shapes
from radlads_jax.porting import save
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.load import load_params
from radlads_jax.porting.safetensors_read import INDEX_FILE, open_checkpoint
from radlads_jax.porting.save import save_params


def stored_bits(directory: Path) -> dict[str, tuple[str, tuple, bytes]]:
    """Every tensor of a directory, as the official library reads it."""
    bits = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                value = file.get_tensor(name)
                bits[name] = (str(value.dtype), value.shape, value.tobytes())
    return bits


def port_and_export(source: Path, target: Path, **options) -> dict:
    config = read_config(source)
    cfg = model_config_from_hf(config)
    save_params(load_params(source, cfg), cfg, target, base_config=config, **options)
    assert model_config_from_hf(read_config(target)) == cfg
    return stored_bits(target)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_porting_then_exporting_gives_every_bit_back(model, tmp_path, random_checkpoint, dtype):
    random_checkpoint(tmp_path / "a", model, dtype)
    assert port_and_export(tmp_path / "a", tmp_path / "b", dtype=dtype) == stored_bits(tmp_path / "a")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama", "llama biases", "mistral"])
def test_models_of_transformers_make_the_round_trip(name, dtype, tied, models, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    transformers = pytest.importorskip("transformers")
    config = hf_config_from_model(dataclasses.replace(models[name], tie_embeddings=tied), {})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    ).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    bits = port_and_export(tmp_path / "a", tmp_path / "b", dtype=dtype, max_shard_size=20_000)
    assert bits == stored_bits(tmp_path / "a")
    ours, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values())
    assert ours.dtype == model.dtype
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in model.state_dict().items())


def test_every_bfloat16_survives_float32(models, tmp_path, random_checkpoint):
    cfg = dataclasses.replace(models["llama"], vocab_size=1 << 13, hidden_size=8, stacks=(("attention", 1),))
    random_checkpoint(tmp_path / "a", cfg, "bfloat16")
    tensor = open_checkpoint(tmp_path / "a")["model.embed_tokens.weight"]
    patterns = np.arange(1 << 16, dtype=np.uint16)
    is_nan = ((patterns & 0x7F80) == 0x7F80) & ((patterns & 0x7F) != 0)
    patterns[is_nan] = 0
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.start)
        file.write(patterns.tobytes())
    assert port_and_export(tmp_path / "a", tmp_path / "b", dtype="bfloat16") == stored_bits(tmp_path / "a")


def test_the_dtype_is_the_parameters_own_unless_given(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "a", models["rad_rwkv7"], "bfloat16")
    bits = port_and_export(tmp_path / "a", tmp_path / "b")
    assert {dtype for dtype, _, _ in bits.values()} == {"float32"}
    assert read_config(tmp_path / "b")["torch_dtype"] == "float32"


@pytest.mark.parametrize("name", ["qwen2", "rad_rwkv6", "rad_rwkv7"])
def test_sharded_parameters_are_gathered_tensor_by_tensor(name, models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "a", models[name])
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    params = load_params(tmp_path / "a", models[name])

    def sharded(value):
        spec = [None] * (value.ndim - 1) + ["fsdp" if value.shape[-1] % 8 == 0 else None]
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    save_params(jax.tree.map(sharded, params), models[name], tmp_path / "b", base_config={})
    assert stored_bits(tmp_path / "b") == stored_bits(tmp_path / "a")


def test_files_are_split_at_the_limit(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "a", models["rad_rwkv7"])
    bits = port_and_export(tmp_path / "a", tmp_path / "b", max_shard_size=20_000)
    assert bits == stored_bits(tmp_path / "a")
    sizes = [path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 25_000
    index = json.loads((tmp_path / "b" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(len(value) for _, _, value in bits.values())
    assert index["weight_map"].keys() == bits.keys()


def test_a_retied_model_leaves_its_head_out(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "a", models["rad_rwkv7"])
    params = load_params(tmp_path / "a", models["rad_rwkv7"])
    save_params(params, models["rad_rwkv7"], tmp_path / "b", base_config={}, retie=True)
    before = stored_bits(tmp_path / "a")
    del before["lm_head.weight"]
    assert stored_bits(tmp_path / "b") == before
    assert read_config(tmp_path / "b")["tie_word_embeddings"] is True


@pytest.fixture
def small(models, tmp_path, random_checkpoint):
    """(params, cfg, keyword arguments) to export, with a teacher directory that holds more than a tokenizer."""
    random_checkpoint(tmp_path / "teacher", models["qwen2"])
    others = ["tokenizer.json", "merges.txt", "chat_template.jinja", "evil.py", "pytorch_model.bin", "README.md"]
    for name in [*others, "generation_config.json"]:
        (tmp_path / "teacher" / name).write_text(f'{{"from": "{name}"}}')
    params = load_params(tmp_path / "teacher", models["qwen2"])
    return params, models["qwen2"], {"base_config": read_config(tmp_path / "teacher")}


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_only_the_listed_files_of_the_teacher_are_copied(small, tmp_path):
    params, cfg, options = small
    target = save_params(params, cfg, tmp_path / "b", tokenizer_from=tmp_path / "teacher", **options)
    copied = {"tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json"}
    assert names(target) == copied | {"config.json", "model.safetensors"}
    assert all((target / name).read_text() == (tmp_path / "teacher" / name).read_text() for name in copied)


def test_generation_config_from_the_base(small, tmp_path):
    params, cfg, options = small
    options["base_config"] |= {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": None}
    save_params(params, cfg, tmp_path / "c", **options)
    written = json.loads((tmp_path / "c" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": [1, 2]}


def test_an_earlier_export_is_replaced_as_a_whole(small, tmp_path):
    params, cfg, options = small
    save_params(params, cfg, tmp_path / "b", max_shard_size=10_000, **options)
    (tmp_path / "b" / "tokenizer.json").write_text("old")
    save_params(params, cfg, tmp_path / "b", **options)
    assert names(tmp_path / "b") == {"config.json", "model.safetensors"}
    assert names(tmp_path) == {"b", "teacher"}


def test_a_relative_target_and_a_link_are_followed(small, tmp_path, monkeypatch):
    params, cfg, options = small
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_params(params, cfg, tmp_path / "link", **options)
    monkeypatch.chdir(tmp_path / "real")
    save_params(params, cfg, Path("."), **options)
    assert names(tmp_path / "real") == {"config.json", "model.safetensors"}
    assert names(tmp_path) == {"real", "link", "teacher"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("fails_at", ["write_file", "_copy_files"])
def test_a_failed_export_leaves_nothing_behind(small, tmp_path, monkeypatch, earlier, fails_at):
    params, cfg, options = small
    if earlier:
        save_params(params, cfg, tmp_path / "b", **options)
    before = stored_bits(tmp_path / "b")

    def disk_full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(save, fails_at, disk_full)
    with pytest.raises(OSError, match="no space left"):
        save_params(jax.tree.map(lambda x: x + 1, params), cfg, tmp_path / "b", **options)
    assert names(tmp_path) == {"teacher"} | ({"b"} if earlier else set())
    assert stored_bits(tmp_path / "b") == before


def test_the_earlier_export_comes_back_when_the_rename_fails(small, tmp_path, monkeypatch):
    params, cfg, options = small
    save_params(params, cfg, tmp_path / "b", **options)
    before = stored_bits(tmp_path / "b")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("rename failed")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="rename failed"):
        save_params(jax.tree.map(lambda x: x + 1, params), cfg, tmp_path / "b", **options)
    assert stored_bits(tmp_path / "b") == before
    assert names(tmp_path) == {"teacher", "b"}


def test_nothing_is_seen_under_the_name_before_the_end(small, tmp_path, monkeypatch):
    params, cfg, options = small
    seen = []
    copy = save._copy_files
    monkeypatch.setattr(save, "_copy_files", lambda *args: seen.append((tmp_path / "b").exists()) or copy(*args))
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / "leftover").write_text("of a killed run")
    save_params(params, cfg, tmp_path / "b", **options)
    assert seen == [False]
    assert "leftover" not in names(tmp_path / "b")


@pytest.mark.parametrize("content", ["a file", "notes", "subdirectory"])
def test_other_peoples_directories_are_not_replaced(small, tmp_path, content):
    params, cfg, options = small
    target = tmp_path / "b"
    if content == "a file":
        target.write_text("mine")
    else:
        (target / "sub").mkdir(parents=True)
        (target / "config.json").write_text("{}")
    if content == "notes":
        os.rmdir(target / "sub")
        (target / "config.json").rename(target / "notes.txt")
    with pytest.raises(ValueError, match=rf"{re.escape(str(target))} .*config\.json"):
        save_params(params, cfg, target, **options)
    assert target.exists()


def test_the_teachers_own_directory_is_not_replaced(small, tmp_path):
    params, cfg, options = small
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'teacher'))}, .*\bteacher's own\b"):
        save_params(params, cfg, tmp_path / "teacher", tokenizer_from=tmp_path / "teacher", **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"tokenizer_from": Path("gone")}, "gone"),
    ],
)
def test_wrong_options_are_refused(small, tmp_path, options, named):
    params, cfg, usual = small
    with pytest.raises(ValueError, match=named):
        save_params(params, cfg, tmp_path / "b", **(usual | options))
    assert names(tmp_path) == {"teacher"}


def test_parameters_of_another_model_are_listed(small, models, tmp_path):
    params, cfg, options = small
    count = len(param_shapes(models["rad_rwkv7"]))
    with pytest.raises(ValueError, match=rf"missing: .*stacks/0/mixer/decay/base.*\b{count}\b"):
        save_params(params, models["rad_rwkv7"], tmp_path / "b", **options)
    with pytest.raises(ValueError, match=r"misshapen: embed/embedding \[40, 24\] \(expected \[41, 24\]\)"):
        save_params(params, dataclasses.replace(cfg, vocab_size=41), tmp_path / "b", **options)
    params["extra"] = {"kernel": np.ones(3)}
    with pytest.raises(ValueError, match="unexpected: extra/kernel"):
        save_params(params, cfg, tmp_path / "b", **options)
    assert names(tmp_path) == {"teacher"}
