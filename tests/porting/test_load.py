import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import flatten, nest
from radlads_jax.porting import load
from radlads_jax.porting.load import load_params
from radlads_jax.porting.names import disk_tensors


def expected_params(cfg, tensors: dict[str, np.ndarray]) -> dict:
    """The parameter tree, put together in numpy with names written out here."""
    stacks = {}
    for stack, ((_, count), start) in enumerate(zip(cfg.stacks, cfg.stack_starts, strict=True)):
        layers = [f"model.layers.{start + i}." for i in range(count)]
        stacks[stack] = {
            "stacks/input_norm/scale": [tensors[f"{p}input_layernorm.weight"] for p in layers],
            "stacks/post_norm/scale": [tensors[f"{p}post_attention_layernorm.weight"] for p in layers],
            "stacks/mlp/gate/kernel": [tensors[f"{p}mlp.gate_proj.weight"].T for p in layers],
            "stacks/mlp/up/kernel": [tensors[f"{p}mlp.up_proj.weight"].T for p in layers],
            "stacks/mlp/down/kernel": [tensors[f"{p}mlp.down_proj.weight"].T for p in layers],
            "stacks/mixer/q/kernel": [tensors[f"{p}self_attn.q_proj.weight"].T for p in layers],
            "stacks/mixer/o/kernel": [tensors[f"{p}self_attn.o_proj.weight"].T for p in layers],
        }
    whole = {"embed/embedding": tensors["model.embed_tokens.weight"], "norm/scale": tensors["model.norm.weight"]}
    if not cfg.tie_embeddings:
        whole["head/kernel"] = tensors["lm_head.weight"].T
    flat = {tuple(path.split("/")): value for path, value in whole.items()}
    for stack, arrays in stacks.items():
        for path, layers in arrays.items():
            flat["stacks", stack, *path.split("/")[1:]] = np.stack(layers)
    return flat


def test_values_land_in_their_layers(model, tmp_path, random_checkpoint):
    check_values(model, tmp_path, random_checkpoint(tmp_path / "m", model))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_and_layout_of_files(models, tmp_path, random_checkpoint, dtype, files):
    model = models["qwen2"]
    check_values(model, tmp_path, random_checkpoint(tmp_path / "m", model, dtype, files))


def check_values(model, tmp_path, tensors):
    params = flatten(load_params(tmp_path / "m", model))
    assert {path: value.shape for path, value in params.items()} == param_shapes(model)
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
    for path, value in expected_params(model, tensors).items():
        np.testing.assert_array_equal(np.asarray(params[path]), value.astype(np.float32), err_msg=str(path))


def test_student_tensors_land_in_their_places(models, tmp_path, random_checkpoint):
    tensors = random_checkpoint(tmp_path / "m", models["rad_rwkv6"])
    mixer = load_params(tmp_path / "m", models["rad_rwkv6"])["stacks"][0]["mixer"]
    for layer in range(3):
        disk = {k.removeprefix(f"model.layers.{layer}.self_attn."): v for k, v in tensors.items()}
        for row, stream in enumerate("rkvwg"):
            np.testing.assert_array_equal(mixer["shift"]["mu"][layer, row], disk[f"time_maa_{stream}"][0, 0])
        np.testing.assert_array_equal(mixer["shift"]["mu_x"][layer], disk["time_maa_x"][0, 0])
        np.testing.assert_array_equal(mixer["shift"]["a"][layer], disk["time_maa_w1"])
        np.testing.assert_array_equal(mixer["shift"]["b"][layer], disk["time_maa_w2"])
        np.testing.assert_array_equal(mixer["decay"]["base"][layer], disk["time_decay"][0, 0])
        np.testing.assert_array_equal(mixer["decay"]["a"][layer], disk["time_decay_w1"])
        np.testing.assert_array_equal(mixer["gate"]["kernel"][layer], disk["gate.weight"].T)
        np.testing.assert_array_equal(mixer["v"]["bias"][layer], disk["v_proj.bias"])


def test_rwkv7_tensors_land_in_their_places(models, tmp_path, random_checkpoint):
    tensors = random_checkpoint(tmp_path / "m", models["rad_rwkv7 group norm"])
    mixer = load_params(tmp_path / "m", models["rad_rwkv7 group norm"])["stacks"][0]["mixer"]
    for layer in range(3):
        disk = {k.removeprefix(f"model.layers.{layer}.self_attn."): v for k, v in tensors.items()}
        for name, letter in (("decay", "w"), ("iclr", "a"), ("value", "v")):
            np.testing.assert_array_equal(mixer[name]["base"][layer], disk[f"{letter}0"][0, 0])
            np.testing.assert_array_equal(mixer[name]["a"][layer], disk[f"{letter}1"])
            np.testing.assert_array_equal(mixer[name]["b"][layer], disk[f"{letter}2"])
        np.testing.assert_array_equal(mixer["gate"]["b"][layer], disk["g2"])
        np.testing.assert_array_equal(mixer["k_k"][layer], disk["k_k"][0, 0])
        np.testing.assert_array_equal(mixer["k_a"][layer], disk["k_a"][0, 0])
        np.testing.assert_array_equal(mixer["r_k"][layer], disk["r_k"])
        np.testing.assert_array_equal(mixer["ln_x"]["bias"][layer], disk["ln_x.bias"])


def test_dtype_is_the_configs_unless_given(models, tmp_path, random_checkpoint):
    tensors = random_checkpoint(tmp_path / "m", models["llama"])
    params = flatten(load_params(tmp_path / "m", models["llama"], dtype="bfloat16"))
    assert {value.dtype for value in params.values()} == {jnp.dtype("bfloat16")}
    rounded = tensors["lm_head.weight"].T.astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["head", "kernel"]), rounded)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto, AxisType.Auto))


def shardings_for(cfg, mesh) -> dict:
    specs = {2: ("fsdp", "tensor"), 1: ("tensor",)}
    flat = {}
    for path, shape in param_shapes(cfg).items():
        rank = len(shape) - (path[0] == "stacks")
        sharded = all(size % 2 == 0 for size in shape[-rank:])
        spec = (*[None] * (len(shape) - rank), *specs.get(rank, ())) if sharded else ()
        flat[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return nest(flat)


@pytest.mark.parametrize("name", ["qwen2", "rad_rwkv6", "rad_rwkv7", "hybrid, middle layer"])
def test_shards_hold_the_same_values(name, models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models[name])
    whole = flatten(load_params(tmp_path / "m", models[name]))
    shardings = shardings_for(models[name], mesh_of(2, 2))
    placed = flatten(load_params(tmp_path / "m", models[name], shardings=shardings))
    for path, sharding in flatten(shardings).items():
        assert placed[path].sharding.is_equivalent_to(sharding, placed[path].ndim), path
        np.testing.assert_array_equal(np.asarray(placed[path]), np.asarray(whole[path]))
    assert len({shard.device for shard in placed["stacks", 0, "mlp", "up", "kernel"].addressable_shards}) == 4
    shard = placed["stacks", 0, "mlp", "up", "kernel"].addressable_shards[0].data
    assert shard.shape == (whole["stacks", 0, "mlp", "up", "kernel"].shape[0], 12, 16)


def test_one_sharding_for_all_replicates(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["rad_rwkv6"])
    replicated = NamedSharding(mesh_of(4, 2), PartitionSpec())
    params = flatten(load_params(tmp_path / "m", models["rad_rwkv6"], shardings=replicated))
    assert all(value.sharding.is_equivalent_to(replicated, value.ndim) for value in params.values())


def test_shardings_of_another_tree_are_refused(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"])
    shardings = shardings_for(models["rad_rwkv6"], mesh_of(2, 2))
    with pytest.raises(ValueError, match=r"have in excess.*decay/base"):
        load_params(tmp_path / "m", models["qwen2"], shardings=shardings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["same", "transposed"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_layer_is_written_into_the_same_memory(dtype, layout, sharded):
    sharding = NamedSharding(mesh_of(2, 2), PartitionSpec(None, "fsdp", "tensor")) if sharded else None
    param = jax.jit(lambda: jnp.zeros((6, 128, 128), dtype), out_shardings=sharding)()
    before = [shard.data.unsafe_buffer_pointer() for shard in param.addressable_shards]
    writer = load._writer(sharding)
    value, index = jnp.ones((128, 128), "bfloat16"), jnp.array([4], jnp.int32)
    compiled = writer.lower(param, value, index, layout=layout).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= value.nbytes
    after = writer(param, value, index, layout=layout)
    assert [shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards] == before
    assert param.is_deleted()
    assert np.asarray(after, np.float32).sum(axis=(1, 2)).tolist() == [0, 0, 0, 0, 128 * 128, 0]


def resave(directory, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_all_wrong_tensors_are_listed_in_one_error(models, tmp_path, random_checkpoint, monkeypatch):
    random_checkpoint(tmp_path / "m", models["qwen2"])

    def damage(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = np.ones(3, np.float32)
        tensors["model.layers.1.self_attn.q_proj.bias"] = np.ones(3, np.float32)
        tensors["model.layers.2.self_attn.q_proj.weight"] = np.ascontiguousarray(
            tensors["model.layers.2.self_attn.q_proj.weight"].astype(np.int8)
        )

    resave(tmp_path / "m", damage)
    monkeypatch.setattr(load.StoredTensor, "open", lambda self: pytest.fail("read before all were checked"))
    with pytest.raises(ValueError) as raised:
        load_params(tmp_path / "m", models["qwen2"])
    message = str(raised.value)
    assert re.search(r"2 missing.*model\.norm\.weight.*layers\.0\.mlp\.up_proj\.weight", message)
    assert re.search(r"1 unexpected.*layers\.9\.mlp\.up_proj\.weight", message)
    assert re.search(r"1 misshapen.*layers\.1\.self_attn\.q_proj\.bias.*\[3\].*\[24\]", message)
    assert "model.layers.2.self_attn.q_proj.weight int8" in message


def test_frequency_buffers_are_passed_over(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["llama"])
    resave(tmp_path / "m", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}))
    load_params(tmp_path / "m", models["llama"])


def test_a_truncated_shard_is_named(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"], files=3)
    shard = tmp_path / "m" / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    with pytest.raises(ValueError, match=r"model-00002-of-00003.*truncated"):
        load_params(tmp_path / "m", models["qwen2"])


def test_a_missing_shard_is_named(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"], files=3)
    os.remove(tmp_path / "m" / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"lacks model-00003-of-00003\.safetensors"):
        load_params(tmp_path / "m", models["qwen2"])


def test_a_teacher_can_be_cut_at_its_students_boundaries(models, tmp_path, random_checkpoint):
    random_checkpoint(tmp_path / "m", models["qwen2"])
    whole = load_params(tmp_path / "m", models["qwen2"])
    cut = load_params(tmp_path / "m", models["qwen2"].as_teacher_of(models["hybrid, middle layer"]))
    parts = [cut["stacks"][i]["mixer"]["q"]["kernel"] for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole["stacks"][0]["mixer"]["q"]["kernel"])


def test_every_name_on_disk_is_read_once(models, tmp_path, random_checkpoint, monkeypatch):
    random_checkpoint(tmp_path / "m", models["rad_rwkv7"], files=2)
    opened = []
    original = load.StoredTensor.open
    monkeypatch.setattr(
        load.StoredTensor, "open", lambda self: opened.append((self.file, self.start)) or original(self)
    )
    load_params(tmp_path / "m", models["rad_rwkv7"])
    assert len(opened) == len(disk_tensors(models["rad_rwkv7"]))
    assert opened == sorted(opened)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "rwkv7qwen2"
