import dataclasses
import json
import re

import hypothesis
import pytest
import transformers
from hypothesis import strategies as st

from radlads_jax.models.config import RopeScaling
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.hf_export import hf_config_from_model

DIMS = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
STUDENTS = {"rwkv6qwen2": "rad_rwkv6", "rwkv7qwen2": "rad_rwkv7"}


def config(model_type: str, **keys) -> dict:
    window = {"sliding_window": None} if model_type == "mistral" else {}
    return {"model_type": model_type, **DIMS, **window, **keys}


def transformers_config(values: dict) -> transformers.PreTrainedConfig:
    values = json.loads(json.dumps(values))
    return transformers.AutoConfig.for_model(values.pop("model_type"), **values)


def seen_by_transformers(values: dict) -> dict:
    """What transformers makes of a config.json, under our names."""
    theirs = transformers_config(values)
    rope = dict(theirs.rope_parameters)
    return {
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "rms_norm_eps": theirs.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "max_position_embeddings": theirs.max_position_embeddings,
        "tie_embeddings": theirs.tie_word_embeddings,
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "max_position_embeddings": 77, "tie_word_embeddings": True},
        {"head_dim": 48},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    ],
)
def test_reads_values_and_defaults_as_transformers_does(family, keys):
    values = config(family, **keys)
    ours = dataclasses.asdict(model_config_from_hf(values))
    expected = seen_by_transformers(values)
    assert {key: ours[key] for key in expected} == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])  # transformers' MistralConfig takes no null here
def test_null_kv_heads_are_all_heads(family):
    values = config(family, num_key_value_heads=None)
    assert model_config_from_hf(values).num_kv_heads == seen_by_transformers(values)["num_kv_heads"] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_kv_heads_are_transformers_default(family):
    values = config(family, num_attention_heads=32, head_dim=4)
    del values["num_key_value_heads"]
    assert model_config_from_hf(values).num_kv_heads == seen_by_transformers(values)["num_kv_heads"]


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_transformers_writes(family, tmp_path):
    values = config(family, rope_scaling=LLAMA3, rope_theta=5e5)
    transformers_config(values).save_pretrained(tmp_path)
    assert model_config_from_hf(read_config(tmp_path)) == model_config_from_hf(values)


@pytest.mark.parametrize(
    ("family", "keys", "biases"),
    [
        ("qwen2", {}, (True, False)),
        ("qwen3", {}, (False, False)),
        ("qwen3", {"attention_bias": True}, (True, True)),
        ("llama", {}, (False, False)),
        ("llama", {"attention_bias": True}, (True, True)),
        ("mistral", {}, (False, False)),
    ],
)
def test_biases_of_each_family(family, keys, biases):
    cfg = model_config_from_hf(config(family, **keys))
    assert (cfg.qkv_bias, cfg.o_bias, cfg.qk_norm) == (*biases, family == "qwen3")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}, RopeScaling("linear", 4.0)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 256)),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, RopeScaling("llama3", 8.0, 1.0, 4.0, 256)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}}, None),
        (
            {"rope_theta": 5e5, "rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
            RopeScaling("llama3", 8.0, 1.0, 4.0, 256),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
            RopeScaling("llama3", 8.0, 1.0, 4.0, 2048),
        ),
    ],
)
def test_rope_of_both_styles(keys, expected):
    cfg = model_config_from_hf(config("llama", **keys))
    assert (cfg.rope_theta, cfg.rope_scaling) == (5e5, expected)


REFUSED = [
    ({"model_type": "qwen2_moe"}, "qwen2_moe"),
    ({"model_type": "gemma2"}, "gemma2"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "longrope"),
    ({"num_experts": 8}, "num_experts"),
    ({"num_local_experts": 8}, "num_local_experts"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": LLAMA3}, "different things"),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "rope_theta"),
    ({"model_type": "rwkv7qwen2", "use_tokenshift": True}, "use_tokenshift"),
    ({"model_type": "rwkv7qwen2", "balance_state": True, "groupnorm_att": True}, "groupnorm_att"),
    ({"model_type": "rwkv7qwen2", "teacher_model_type": "gemma2"}, "gemma2"),
]
WRONG = [
    *({key: value} for key in DIMS for value in (0, -1, 2.0, "8", True, [8], 1 << 40)),
    {"num_key_value_heads": 3},
    {"num_attention_heads": 5, "num_key_value_heads": 5},
    {"head_dim": 7},
    {"head_dim": 0, "num_attention_heads": "4"},
    {"rms_norm_eps": "1e-6"},
    {"rms_norm_eps": float("nan")},
    {"rms_norm_eps": 0.0},
    {"rope_theta": -1.0},
    {"rope_theta": float("inf")},
    {"rope_scaling": "linear"},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
    {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
    {"rope_scaling": LLAMA3 | {"high_freq_factor": None}},
    {"tie_word_embeddings": 1},
    {"layer_types": "full_attention"},
    {"max_position_embeddings": "long"},
    *({key: None} for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "model_type")),
    {"model_type": 7},
    *({"model_type": "rwkv6qwen2"} | keys for keys in (
        {"gate_rank_type": 3},
        {"use_rope": "yes"},
        {"lora_rank_decay": -1},
        {"lora_rank_decay": 1.5},
        {"num_attention_layers": 4},
        {"attention_layers": [3]},
        {"attention_layers": [0, 0]},
        {"attention_layers": 1},
        {"attention_layers": [0], "num_attention_layers": 1},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refuses_by_name(keys, named):
    with pytest.raises(ValueError, match=named):
        model_config_from_hf(config("qwen2") | keys)


def test_an_absent_window_in_mistral_is_transformers_default():
    values = config("mistral")
    del values["sliding_window"]
    with pytest.raises(ValueError, match="sliding_window 4096"):
        model_config_from_hf(values)


@pytest.mark.parametrize("keys", WRONG, ids=str)
def test_wrong_values_name_their_key(keys):
    with pytest.raises(ValueError) as raised:
        model_config_from_hf(config("qwen2") | keys)
    assert any(key in str(raised.value) for key in keys)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "model_type"])
def test_missing_keys_are_named(key):
    values = config("llama")
    del values[key]
    with pytest.raises(ValueError, match=key):
        model_config_from_hf(values)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(FAMILIES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(LLAMA3)), inner, max_size=3),
    max_leaves=5,
)
KNOWN_KEYS = sorted({key for keys, _ in REFUSED for key in keys} | {key for keys in WRONG for key in keys})


QWEN3_5 = [
    ({"layer_types": ["linear_attention"] * 2}, "2 entries"),
    ({"layer_types": ["full_attention", "other", "linear_attention"]}, "other"),
    ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim is 3"),
    ({"linear_num_key_heads": 3, "linear_num_value_heads": 4}, "key_heads"),
    ({"partial_rotary_factor": 0.1, "head_dim": 10}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("keys", "named"), QWEN3_5)
def test_what_qwen3_5_lacks_is_named(keys, named):
    with pytest.raises(ValueError, match=named):
        model_config_from_hf(config("qwen3_5_text", **keys))


@hypothesis.given(
    st.sampled_from([*FAMILIES, "qwen3_5_text", *STUDENTS]),
    st.dictionaries(st.sampled_from(KNOWN_KEYS), ANY_JSON, max_size=4),
)
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_json_is_a_config_or_a_value_error(model_type, keys):
    values = config(model_type) | keys
    try:
        cfg = model_config_from_hf(values)
    except ValueError:
        return
    assert model_config_from_hf(hf_config_from_model(cfg, {})) == cfg


PUBLISHED = {
    "attention_bias": True,
    "attention_output_bias": False,
    "balance_state": True,
    "groupnorm_att": False,
    "lora_rank_decay": 96,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
}


def test_published_rwkv6_student():
    keys = {"gate_rank_type": 1, "lora_rank_gate": None, "lora_rank_tokenshift": 64, "use_rope": False}
    cfg = model_config_from_hf(config("rwkv6qwen2", **PUBLISHED, **keys, use_tokenshift=True))
    assert cfg.stacks == (("rad_rwkv6", 3),)
    assert (cfg.family, cfg.qkv_bias, cfg.o_bias, cfg.rope_theta) == ("qwen2", True, False, 1e6)
    mixer = cfg.mixer
    assert (mixer.gate, mixer.use_rope, mixer.token_shift, mixer.balance_state) == ("full", False, True, True)
    assert (mixer.rank_decay, mixer.rank_shift, mixer.rank_gate) == (96, 64, 32)


def test_published_rwkv7_student_with_attention_in_the_last_layers():
    keys = {"gate_rank_type": 2, "lora_rank_gate": 416, "lora_rank_iclr": 96, "lora_rank_value_residual_mix": 64}
    cfg = model_config_from_hf(config("rwkv7qwen2", **PUBLISHED, **keys, use_rope=True, num_attention_layers=2))
    assert cfg.stacks == (("rad_rwkv7", 1), ("attention", 2))
    mixer = cfg.mixer
    assert (mixer.gate, mixer.use_rope, mixer.group_norm) == ("low_rank", True, False)
    assert (mixer.rank_gate, mixer.rank_iclr, mixer.rank_value) == (416, 96, 64)


def test_round_trip(model):
    model = dataclasses.replace(model, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64))
    written = json.loads(json.dumps(hf_config_from_model(model, {})))
    assert model_config_from_hf(written) == model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope_parameters", [False, True])
def test_round_trip_over_another_base(family, rope_parameters, models):
    base = config(family, rope_theta=3.0, head_dim=None, bos_token_id=1, auto_map={"AutoModel": "evil.py"})
    if rope_parameters:
        base |= {"rope_theta": None, "rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}}
    base |= {"attention_layers": [0], "layer_types": ["full_attention"] * 9}
    for model in models.values():
        if model.family == family:
            written = hf_config_from_model(model, base)
            assert model_config_from_hf(written) == model
            assert written["bos_token_id"] == 1
            assert "auto_map" not in written


def test_a_teacher_cut_at_its_students_boundaries_is_one_model(models):
    teacher = models["qwen2"].as_teacher_of(models["hybrid, middle layer"])
    assert len(teacher.stacks) == 3
    assert model_config_from_hf(hf_config_from_model(teacher, {})) == models["qwen2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unchanged_model_keeps_its_config(family):
    base = transformers_config(config(family, rope_theta=77.0)).to_dict()
    written = hf_config_from_model(model_config_from_hf(base), base)
    changed = {key for key in base.keys() | written.keys() if base.get(key) != written.get(key)}
    assert changed <= {"architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_written_config(family, models):
    cfg = dataclasses.replace(models[family], rope_scaling=RopeScaling("linear", 2.0), tie_embeddings=True)
    written = hf_config_from_model(cfg, {})
    seen = seen_by_transformers(written)
    assert seen == {key: getattr(cfg, key) for key in seen}
    rope = transformers_config(written).rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


@pytest.mark.parametrize("name", ["rad_rwkv6", "rad_rwkv7", "hybrid, middle layer", "student of qwen3"])
def test_students_write_every_published_key(name, models):
    written = hf_config_from_model(models[name], config("qwen2"))
    flags = ["use_rope", "attention_bias", "attention_output_bias", "balance_state", "groupnorm_att", "use_tokenshift"]
    numbers = ["lora_rank_decay", "lora_rank_gate", "gate_rank_type", "num_attention_layers"]
    assert all(type(written[key]) is bool for key in flags)
    assert all(type(written[key]) is int for key in numbers)
    kind = models[name].recurrent_mixer[-1]
    own = {"6": ["lora_rank_tokenshift"], "7": ["lora_rank_iclr", "lora_rank_value_residual_mix"]}
    assert all(type(written[key]) is int for key in own[kind])
    assert written["model_type"] == f"rwkv{kind}qwen2"
    assert written["architectures"] == [f"RWKV{kind}Qwen2ForCausalLM"]


def test_refuses_to_write_what_a_family_cannot_say(models):
    with pytest.raises(ValueError, match="qkv_bias"):
        hf_config_from_model(dataclasses.replace(models["mistral"], qkv_bias=True), {})


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=["cut", "list", "binary", "deep"])
def test_a_config_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / 'config.json'))} .*\bexist\b"):
        read_config(tmp_path)
