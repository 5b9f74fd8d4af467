"""The format of dense Qwen3.5: what is written in it is what transformers computes without our code."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from untrained import random_params, student_of

from radlads_jax.models import ModelConfig, bind
from radlads_jax.models.config import KeptAttention
from radlads_jax.models.window import WindowOptions
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.porting.writers import default_format, padded_heads, writer_for, zero_centred
from radlads_jax.run.exporting import export_again

torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
transformers = pytest.importorskip("transformers")

QWEN3 = ModelConfig("qwen3", 97, 32, 48, 4, 2, 16, (("attention", 4),), qk_norm=True, max_position_embeddings=128)
TEACHERS = {
    "qwen3": QWEN3,
    "qwen2": dataclasses.replace(QWEN3, family="qwen2", qk_norm=False, qkv_bias=True, head_dim=8),
    "llama": dataclasses.replace(QWEN3, family="llama", qk_norm=False, head_dim=8),
}


def other_softmax(teacher: ModelConfig, kept: KeptAttention) -> ModelConfig:
    return dataclasses.replace(student_of(teacher, "gdn", (1, 3)), kept_attention=kept)


TOKENS = np.random.default_rng(0).integers(0, 97, (2, 24))


def written(directory, cfg: ModelConfig, params, **options):
    return save_params(params, cfg, directory, base_config={"model_type": cfg.family}, dtype="float32", **options)


def torch_logits(directory) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.double().numpy()


def our_logits(cfg: ModelConfig, params) -> np.ndarray:
    decoder = bind(cfg, params)
    return np.asarray(decoder.logits(decoder.hidden(jnp.asarray(TOKENS))[0]), np.float64)


def relative_rms(got, expected) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", TEACHERS)
def test_softmax_layers_alone_are_the_teacher(family, tied, tmp_path):
    cfg = dataclasses.replace(TEACHERS[family], tie_embeddings=tied)
    params = random_params(cfg)
    teacher = written(tmp_path / "teacher", cfg, params)
    served = written(tmp_path / "served", cfg, params, writer="qwen3_5")
    assert relative_rms(torch_logits(served), torch_logits(teacher)) < 2e-6
    # Written once more, whatever lay around the first one's config.
    keys = read_config(served)
    nested = {"model_type": "qwen3_5", "text_config": keys | {"eos_token_id": 3}}
    back = model_config_from_hf(keys)
    again = save_params(load_params(served, back), back, tmp_path / "again", base_config=nested, dtype="float32")
    assert relative_rms(torch_logits(again), torch_logits(teacher)) < 2e-6
    assert json.loads((again / "generation_config.json").read_text()) == {"eos_token_id": 3}


def test_what_a_teachers_own_attention_is_told_stays_with_it(tmp_path):
    told = {"dual_chunk_attention_config": {"chunk_size": 8}, "use_sliding_window": False, "max_window_layers": 2}
    cfg = student_of(TEACHERS["qwen2"], "gdn", (1, 3))
    served = save_params(random_params(cfg), cfg, tmp_path / "served", base_config=told, dtype="float32")
    assert not read_config(served).keys() & told.keys()


@pytest.mark.parametrize("family", TEACHERS)
def test_a_hybrid_is_what_transformers_reads_and_what_comes_back(family, tmp_path):
    kv_heads = "cloned" if family == "llama" else "teacher"
    cfg = student_of(TEACHERS[family], "gdn", (1, 3), kv_heads=kv_heads)
    params = random_params(cfg)
    assert default_format(cfg) == "qwen3_5"
    served = written(tmp_path / "served", cfg, params)
    expected = our_logits(cfg, params)
    assert relative_rms(torch_logits(served), expected) < 1e-5
    keys = read_config(served)
    assert "auto_map" not in keys and keys["full_attention_interval"] == 2
    back = model_config_from_hf(keys)
    again = load_params(served, back)
    assert relative_rms(our_logits(back, again), expected) < 1e-5
    assert default_format(back) == "qwen3_5"
    twice = save_params(again, back, tmp_path / "twice", base_config=keys, dtype="float32")
    assert (twice / "model.safetensors").read_bytes() == (served / "model.safetensors").read_bytes()
    assert read_config(twice) == keys
    nested = read_config(written(tmp_path / "nested", cfg, params, writer="mlx"))
    assert nested["text_config"] | {"torch_dtype": "float32"} == keys and model_config_from_hf(nested) == back


@pytest.mark.parametrize(
    ("family", "kept"),
    [("qwen3", KeptAttention(output_gate=True)), ("qwen2", KeptAttention(rope=False, output_gate=True))],
)
def test_gates_of_softmax_layers_and_their_lack_of_rope_have_a_place(family, kept, tmp_path):
    cfg = other_softmax(TEACHERS[family], kept)
    params = random_params(cfg)
    served = written(tmp_path / "served", cfg, params)
    expected = our_logits(cfg, params)
    assert relative_rms(torch_logits(served), expected) < 1e-5
    back = model_config_from_hf(read_config(served))
    again = load_params(served, back)
    twice = save_params(again, back, tmp_path / "twice", base_config=read_config(served), dtype="float32")
    assert (twice / "model.safetensors").read_bytes() == (served / "model.safetensors").read_bytes()


def test_a_head_that_took_the_norms_powers_is_left_out_later(tmp_path):
    """The last norm's powers of two stand in a head of its own; with the embedding for head they are the norm's."""
    cfg = dataclasses.replace(student_of(QWEN3, "gdn", (1, 3)), tie_embeddings=False)
    params = random_params(cfg, 0.3)
    scale = np.full(cfg.hidden_size, 3.0, np.float32)
    scale[:6] = [0.3, 0.2, -1.5, 300, -2.125, 0.0]
    params["norm"]["scale"] = jnp.asarray(scale)
    # That of a tied teacher's student, which training moved a little.
    noise = np.random.default_rng(1).normal(size=params["head"]["kernel"].shape)
    params["head"]["kernel"] = params["embed"]["embedding"].T * (1 + 0.01 * noise)
    written(tmp_path / "untied", cfg, params)
    written(tmp_path / "at_once", cfg, params, retie=True)
    export_again(tmp_path / "untied", tmp_path / "later", retie=True)
    at_once, later = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("at_once", "later"))
    assert later == at_once


def test_norms_are_exact_in_bfloat16():
    """Small, negative, zero and large ones."""
    scale = np.asarray([1, 0.5, 0.4980, 0.01, 3e-5, -0.7, -3, 0, 255, 300, 1.0078], np.float32)
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    stored = zero_centred.stored(scale, split=True)
    np.testing.assert_array_equal(stored.astype(ml_dtypes.bfloat16).astype(np.float32), stored)
    np.testing.assert_array_equal((1 + stored) * zero_centred.powers(scale), scale)


def test_the_constant_is_held_by_bfloat16():
    real, constant = padded_heads.norm(1).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert constant == -1
    assert float(ml_dtypes.bfloat16(padded_heads.CONSTANT)) == padded_heads.CONSTANT
    assert abs((1 + real) / (padded_heads.CONSTANT * 2**-0.25) - 1) < 1e-4


@pytest.mark.parametrize(
    ("cfg", "named"),
    [
        (student_of(QWEN3, "rad_rwkv7"), "rad_rwkv7"),
        (dataclasses.replace(QWEN3, qkv_bias=True), "biases of q, k or v"),
        (dataclasses.replace(QWEN3, rotary_size=8), "RoPE of a part of a head"),
        (dataclasses.replace(QWEN3, output_gate=True, zero_centred_norms=True), r"1 \+ w.* an output gate"),
        (other_softmax(QWEN3, KeptAttention(rope=False)), "softmax layers without RoPE"),
        (other_softmax(TEACHERS["llama"], KeptAttention(rope=False, log_scale=64.0)), "attention_log_scale"),
    ],
)
def test_what_has_no_place_is_named(cfg, named):
    with pytest.raises(ValueError, match=named):
        writer_for(cfg, "qwen3_5").require(cfg, None)


def test_a_student_of_another_mixer_is_refused_by_name():
    """Before anything is trained: its settings are made to a config.json then."""
    teacher = dataclasses.replace(student_of(QWEN3, "gdn", (3,)), family="qwen3_5_text")
    student = dataclasses.replace(teacher, stacks=(("window", 3), ("attention", 1)), mixer=WindowOptions())
    with pytest.raises(ValueError, match=r"\bwindow whose teacher is of the family qwen3_5_text\b.*student\.mixer=gdn"):
        hf_config_from_model(student, {})
