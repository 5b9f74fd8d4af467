"""The student's switches: what each of them makes of a teacher, and which contradict each other."""

import dataclasses
import re

import pytest

from radlads_jax.config import RunConfig
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models.config import KeptAttention, ModelConfig
from radlads_jax.porting.names import disk_tensors
from radlads_jax.student import Student

TEACHER = ModelConfig(
    family="qwen2",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    stacks=(("attention", 4),),
    qkv_bias=True,
    tie_embeddings=True,
)
PUBLISHED = {
    "rad_rwkv6": {"use_rope": False, "token_shift": True, "gate": "full", "balance_state": True, "group_norm": False},
    "rad_rwkv7": {
        "use_rope": True,
        "gate": "low_rank",
        "balance_state": True,
        "group_norm": False,
    },
}


def student_of(teacher: ModelConfig = TEACHER, *, run: dict | None = None, **fields) -> ModelConfig:
    return make_student_config(teacher, RunConfig(student=Student(**fields), **(run or {})))


def refusal(**fields) -> str:
    with pytest.raises(ValueError) as caught:
        student_of(**fields)
    message = str(caught.value)
    assert message and "\n" not in message, "expected one paragraph"
    return message


def tensors(student: ModelConfig, layer: int = 0) -> set[str]:
    """The mixer's own tensors of a layer, as the export names them."""
    prefix = f"model.layers.{layer}.self_attn."
    names = {name.removeprefix(prefix) for name in disk_tensors(student) if name.startswith(prefix)}
    return {name for name in names if not name.startswith(("q_proj", "k_proj", "v_proj", "o_proj"))}


@pytest.mark.parametrize(
    ("mixer", "fields", "changes", "gone", "come"),
    [
        ("rad_rwkv6", {}, {}, set(), set()),
        ("rad_rwkv6", {"use_rope": True}, {"use_rope": True}, set(), set()),
        ("rad_rwkv6", {"use_rope": False}, {}, set(), set()),
        (
            "rad_rwkv6",
            {"token_shift": False},
            {"token_shift": False},
            {"time_maa_w1", "time_maa_w2", *(f"time_maa_{i}" for i in "xrkvwg")},
            set(),
        ),
        ("rad_rwkv6", {"gate": "none"}, {"gate": "none"}, {"gate.weight"}, set()),
        ("rad_rwkv6", {"gate": "low_rank"}, {"gate": "low_rank"}, {"gate.weight"}, {"g1", "g2"}),
        (
            "rad_rwkv6",
            {"group_norm": True},
            {"group_norm": True, "balance_state": False},
            set(),
            {"ln_x.weight", "ln_x.bias"},
        ),
        ("rad_rwkv6", {"balance_state": False}, {"balance_state": False}, set(), set()),
        ("rad_rwkv7", {}, {}, set(), set()),
        ("rad_rwkv7", {"use_rope": False}, {"use_rope": False}, set(), set()),
        ("rad_rwkv7", {"gate": "none"}, {"gate": "none"}, {"g1", "g2"}, set()),
        ("rad_rwkv7", {"gate": "full"}, {"gate": "full"}, {"g1", "g2"}, {"gate.weight"}),
        (
            "rad_rwkv7",
            {"group_norm": True},
            {"group_norm": True, "balance_state": False},
            set(),
            {"ln_x.weight", "ln_x.bias"},
        ),
    ],
)
def test_a_switch_does_what_it_says(mixer, fields, changes, gone, come):
    plain, student = student_of(mixer=mixer), student_of(mixer=mixer, **fields)
    switches = {name: getattr(student.mixer, name) for name in PUBLISHED[mixer]}
    assert switches == PUBLISHED[mixer] | changes
    assert student == dataclasses.replace(plain, mixer=dataclasses.replace(plain.mixer, **changes))
    assert tensors(plain) - tensors(student) == gone
    assert tensors(student) - tensors(plain) == come


@pytest.mark.parametrize(("width", "ranks"), [(3584, (96, 64, 416)), (5120, (128, 96, 544)), (8192, (160, 128, 800))])
def test_ranks_follow_the_width_unless_given(width, ranks):
    wide = dataclasses.replace(TEACHER, hidden_size=width)
    mixer = student_of(wide).mixer
    assert (mixer.rank_decay, mixer.rank_value, mixer.rank_gate) == ranks
    assert mixer.rank_iclr == ranks[0]
    own_ranks = {"rank_decay": 1, "rank_iclr": 2, "rank_value": 3, "rank_gate": 5}
    assert student_of(wide, **own_ranks).mixer == dataclasses.replace(mixer, **own_ranks)
    finch = student_of(wide, mixer="rad_rwkv6").mixer
    assert (finch.rank_decay, finch.rank_shift, finch.rank_gate) == (ranks[0], ranks[0], ranks[2])


UNUSED_RANKS = [("rad_rwkv6", "rank_iclr"), ("rad_rwkv6", "rank_value"), ("rad_rwkv7", "rank_shift")]


@pytest.mark.parametrize(("mixer", "field"), UNUSED_RANKS)
def test_a_rank_that_the_mixer_has_no_use_for_is_refused(mixer, field):
    message = refusal(mixer=mixer, **{field: 8})
    assert f"config.student.{field}" in message and mixer in message


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mixer": "rad_rwkv6", "rank_gate": 64}, ["config.student.rank_gate is 64", "'full'", "'low_rank'"]),
        ({"mixer": "rad_rwkv7", "gate": "none", "rank_gate": 64}, ["config.student.rank_gate is 64", "'none'"]),
        ({"mixer": "rad_rwkv6", "token_shift": False, "rank_shift": 64}, ["config.student.rank_shift", "token_shift"]),
    ],
)
def test_a_rank_of_a_map_that_is_left_out_is_refused(fields, named):
    message = refusal(**fields)
    assert all(word in message for word in named), message


def test_an_unknown_mixer_is_told_which_there_are():
    message = refusal(mixer="rad_rwkv8")
    assert "rad_rwkv8" in message and "rad_rwkv7" in message


def test_layers_that_stay_attention():
    assert student_of().stacks == (("rad_rwkv7", 4),)
    assert student_of(attention_layers=(1, 3)).stacks == (
        ("rad_rwkv7", 1),
        ("attention", 1),
        ("rad_rwkv7", 1),
        ("attention", 1),
    )
    assert re.search(r"\battention_layers\b.*\b4 layers\b", refusal(attention_layers=(0, 1, 2, 3)))
    assert "[4]" in refusal(attention_layers=(0, 4))


def test_the_student_trains_in_float32_with_a_head_of_its_own():
    student = student_of(run={"dtype": "bfloat16"})
    assert (student.dtype, student.param_dtype, student.tie_embeddings) == ("bfloat16", "float32", False)
    assert student_of(run={"dtype": "float32"}).dtype == "float32"


def test_no_conversion():
    student = student_of(mixer="attention", run={"stages": ("pretrain",), "dtype": "float32"})
    assert student == dataclasses.replace(TEACHER, dtype="float32", param_dtype="float32")
    message = refusal(mixer="attention")
    assert "stage1, stage2" in message and "config.student.mixer" in message


def test_rad_rwkv7_has_no_token_shift():
    assert "config.student.token_shift" in refusal(token_shift=True)
    assert student_of(token_shift=False) == student_of()


@pytest.mark.parametrize(("every", "kept"), [(4, (3,)), (3, (2,)), (2, (1, 3))])
def test_attention_every(every, kept):
    student = student_of(attention_every=every)
    assert tuple(i for i, mixer in enumerate(student.layer_mixers) if mixer == "attention") == kept


def test_an_interval_that_keeps_no_layer_is_refused():
    assert "attention_every is 5 for a teacher of 4 layers" in refusal(attention_every=5)


@pytest.mark.parametrize(
    "field", ["gate", "init", "fresh_qkvo", "attention_every", "attention_layers", "kv_heads", "options"]
)
def test_what_no_layer_is_converted_to_has_no_settings(field):
    value = {"gate": "full", "init": "calibrated", "fresh_qkvo": True, "attention_every": 2, "kv_heads": "cloned"}
    value |= {"attention_layers": (1,), "options": {"window": 3}}
    message = refusal(mixer="attention", **{field: value[field]})
    assert f"config.student.{field} is" in message and "converts no layer" in message


def test_gdns_options_are_settings():
    chosen = {"kv_heads": "cloned", "shortest_half_life": 2.0, "longest_half_life": 99.0, "conv_qk": 0.1}
    chosen |= {"conv_v": 0.3, "gate_std": 0.05}
    plain, student = student_of(mixer="gdn").mixer, student_of(mixer="gdn", **chosen).mixer
    assert student == dataclasses.replace(plain, **chosen) and plain.kv_heads == "teacher"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mixer": "rad_rwkv7", "kv_heads": "cloned"}, ["config.student.kv_heads", "rad_rwkv7"]),
        ({"options": {"conv_w": 0.1}}, ["config.student.conv_w", "conv_v"]),
        (
            {"options": {"conv_v": 1.0, "gate": "full"}},
            ["config.student.options has conv_v, gate", "student.conv_v in"],
        ),
        # A checkpoint's.
        ({"options": {"key_heads": 2}}, ["config.student.key_heads"]),
        ({"shortest_half_life": 9.0, "longest_half_life": 3.0}, ["shortest_half_life", "9", "3"]),
        ({"shortest_half_life": 0.005}, ["shortest_half_life", "0.005", "0.14 <= shortest"]),
        ({"kv_heads": "half"}, ["kv_heads", "'half'", "cloned"]),
        ({"conv_v": -1.0}, ["conv_v", "-1"]),
    ],
)
def test_an_option_that_gdn_does_not_take_is_named(fields, named):
    message = refusal(**({"mixer": "gdn"} | fields))
    assert all(word in message for word in named), message


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, None),
        ({"attention_output_gate": True}, KeptAttention(output_gate=True)),
        # The longest rows that are trained on.
        ({"attention_rope": False}, KeptAttention(rope=False, log_scale=16384.0)),
        ({"attention_rope": False, "attention_log_scale": 0.0}, KeptAttention(rope=False)),
        ({"attention_log_scale": 600.0}, KeptAttention(log_scale=600.0)),
    ],
)
def test_what_the_softmax_layers_that_stay_have(fields, kept):
    for mixer in ("rad_rwkv7", "gdn", "window"):
        assert student_of(mixer=mixer, attention_every=2, **fields).kept_attention == kept


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_rope": False}, ["attention_rope is False", "attention_layers"]),
        ({"attention_output_gate": True, "mixer": "gdn"}, ["attention_output_gate True", "attention_every"]),
        ({"attention_log_scale": 1.5, "attention_every": 2}, ["attention_log_scale is 1.5", "2"]),
        ({"attention_log_scale": float("nan"), "attention_every": 2}, ["attention_log_scale is nan"]),
        ({"attention_rope": False, "mixer": "attention", "run": {"stages": ("stage3",)}}, ["attention_rope is False"]),
        ({"qk_norm": True, "mixer": "gdn"}, ["config.student.qk_norm", "gdn"]),
        ({"qk_norm": True, "mixer": "window"}, ["config.student.qk_norm", "window"]),
        ({"qk_norm": False, "teacher": dataclasses.replace(TEACHER, qk_norm=True)}, ["student.qk_norm is false"]),
        (
            {"attention_output_gate": True, "attention_every": 2, "fresh_qkvo": True}
            | {"teacher": dataclasses.replace(TEACHER, qk_norm=True, output_gate=True)},
            ["attention_output_gate is true", "gate each"],
        ),
    ],
)
def test_what_they_can_not_have_is_refused_by_name(fields, named):
    message = refusal(**fields)
    assert all(part in message for part in named), message


def test_norms_of_q_and_k_are_the_teachers_or_chosen():
    normed = dataclasses.replace(TEACHER, qk_norm=True)
    assert {"q_norm.weight", "k_norm.weight"} <= tensors(student_of(qk_norm=True))
    assert not {"q_norm.weight"} & tensors(student_of(qk_norm=True, attention_every=2), layer=1)
    assert student_of(normed, qk_norm=True) == student_of(normed)
