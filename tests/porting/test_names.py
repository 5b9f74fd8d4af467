import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from untrained import student_of

from radlads_jax.models import ModelConfig
from radlads_jax.models.tensors import param_shapes
from radlads_jax.models.tree import flatten, nest, shown
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.names import disk_tensors

GOLDEN = Path(__file__).parents[1] / "data"

RWKV6_NAMES = """
    time_maa_x time_maa_r time_maa_k time_maa_v time_maa_w time_maa_g time_maa_w1 time_maa_w2
    time_decay time_decay_w1 time_decay_w2 gate.weight
"""
RWKV7_NAMES = "w0 w1 w2 a0 a1 a2 v0 v1 v2 g1 g2 k_k k_a r_k"


def disk_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: location.disk_shape for name, location in disk_tensors(cfg).items()}


@pytest.mark.parametrize("name", ["qwen2", "qwen2 tied", "qwen3", "llama", "llama biases", "mistral"])
def test_softmax_models_have_the_tensors_of_transformers(name, models):
    torch = pytest.importorskip("torch", reason="transformers' models need torch")
    transformers = pytest.importorskip("transformers")
    config = hf_config_from_model(models[name], {})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(config.pop("model_type"), **config)
        )
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    if models[name].tie_embeddings:
        del shapes["lm_head.weight"]
    assert disk_shapes(models[name]) == shapes


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("rad_rwkv6", RWKV6_NAMES),
        ("rad_rwkv6 bare", "time_decay time_decay_w1 time_decay_w2"),
        ("rad_rwkv6 low-rank gate, group norm", RWKV6_NAMES.replace("gate.weight", "g1 g2 ln_x.weight ln_x.bias")),
        ("rad_rwkv7", RWKV7_NAMES),
        ("rad_rwkv7 full gate", RWKV7_NAMES.replace("g1 g2", "gate.weight")),
        ("rad_rwkv7 group norm", RWKV7_NAMES + " ln_x.weight ln_x.bias"),
    ],
)
def test_students_add_the_published_names_in_every_layer(name, added, models):
    names = set(disk_tensors(models[name])) - set(disk_tensors(models["qwen2"]))
    assert names == {f"model.layers.{layer}.self_attn.{key}" for layer in range(3) for key in added.split()}
    assert set(disk_tensors(models["qwen2"])) <= set(disk_tensors(models[name]))


def test_hybrids_have_plain_names_in_their_attention_layers(models):
    names = {name for name in disk_tensors(models["hybrid, middle layer"]) if name.startswith("model.layers.1.")}
    assert names == {name for name in disk_tensors(models["qwen2"]) if name.startswith("model.layers.1.")}


@pytest.mark.parametrize("file", ["rad_rwkv6", "rad_rwkv7_balanced", "rad_rwkv7_groupnorm"])
def test_mixers_have_the_names_and_shapes_of_the_golden_files(file):
    with np.load(GOLDEN / f"{file}.npz") as golden:
        shapes = {name: golden[name].shape for name in golden.files if name.startswith("self_attn.")}
        heads, kv_heads = int(golden["heads"]), int(golden["kv_heads"])
    width = shapes["self_attn.o_proj.weight"][0]
    ranks = {
        "rank_decay": shapes.get("self_attn.w1", shapes.get("self_attn.time_decay_w1", (0, 0)))[1],
        "rank_iclr": shapes.get("self_attn.a1", (0, 1))[1],
        "rank_value": shapes.get("self_attn.v1", (0, 1))[1],
        "rank_gate": shapes.get("self_attn.g1", (0, 1))[1],
        "rank_shift": shapes.get("self_attn.time_maa_w2", (0, 1))[1],
    }
    group_norm = file.endswith("groupnorm")
    mixer = file[: len("rad_rwkv7")]
    switches = {"balance_state": not group_norm, "group_norm": group_norm} | ranks
    head_dim = shapes["self_attn.q_proj.weight"][0] // heads
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "intermediate_size": 1}
    teacher = ModelConfig("qwen2", 1, width, stacks=(("attention", 1),), qkv_bias=True, **sizes)
    prefix = "model.layers.0."
    ours = disk_shapes(student_of(teacher, mixer, **switches))
    assert {n.removeprefix(prefix): s for n, s in ours.items() if n.startswith(f"{prefix}self_attn.")} == shapes


def test_every_parameter_is_filled_exactly_once(model):
    shapes = param_shapes(model)
    filled = Counter()
    for location in disk_tensors(model).values():
        mask_shape = shapes[location.path][: len(location.index)]
        assert all(0 <= i < n for i, n in zip(location.index, mask_shape, strict=True))
        assert location.shape == shapes[location.path][len(location.index) :]
        filled[location.path, location.index] += math.prod(location.shape)
    assert all(count == math.prod(shapes[path][len(index) :]) for (path, index), count in filled.items())
    total = Counter()
    for (path, _), count in filled.items():
        total[path] += count
    assert total == {path: math.prod(shape) for path, shape in shapes.items()}


def test_token_shift_rows_are_in_the_published_order(models):
    tensors = disk_tensors(models["rad_rwkv6"])
    rows = [tensors[f"model.layers.2.self_attn.time_maa_{stream}"].index for stream in "rkvwg"]
    assert rows == [(2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]


def test_stacks_of_a_hybrid_count_layers_from_their_start(models):
    tensors = disk_tensors(models["hybrid, middle layer"])
    where = {layer: tensors[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)}
    assert {layer: (shown(w.path), w.index) for layer, w in where.items()} == {
        0: ("stacks/0/mlp/up/kernel", (0,)),
        1: ("stacks/1/mlp/up/kernel", (0,)),
        2: ("stacks/2/mlp/up/kernel", (0,)),
    }


def test_nest_and_flatten_are_inverse(model):
    shapes = param_shapes(model)
    assert flatten(nest(shapes)) == shapes
    assert json.dumps(sorted(map(shown, shapes)))
