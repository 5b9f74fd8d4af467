"""A teacher with Gated DeltaNet layers of its own: they stay as they are, and its softmax layers become such layers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax.sharding import AbstractMesh, AxisType
from safetensors.numpy import load_file
from untrained import TEACHER, TEACHER_WITH_GDN, random_mixers, random_params, save_teacher, student_of

from radlads_jax.config import Mesh, RunConfig
from radlads_jax.distill.align import align_loss
from radlads_jax.distill.calibrate import calibrated
from radlads_jax.distill.program import StagePlan, abstract_student
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models import ModelConfig, bind, gdn_start, sharding
from radlads_jax.models.gdn import GdnOptions
from radlads_jax.models.spec import TeacherStatistics
from radlads_jax.models.tree import path_leaves
from radlads_jax.planning import cost, memory
from radlads_jax.planning.stage import by_arithmetic
from radlads_jax.porting.config_keys import read_config
from radlads_jax.porting.families import qwen3_5
from radlads_jax.porting.hf_config import model_config_from_hf
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.porting.student import init_mixers, transfer_table, whole_student
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.reporting.run_log import read_run
from radlads_jax.run.metrics import MetricsLogger
from radlads_jax.student import Student

OWN = TEACHER_WITH_GDN


def student(teacher: ModelConfig = OWN, **fields) -> ModelConfig:
    run = dataclasses.replace(RunConfig(), dtype="float32", student=Student(mixer="gdn", **fields))
    return make_student_config(teacher, run)


def logits(cfg: ModelConfig, params) -> np.ndarray:
    decoder, tokens = bind(cfg, params), np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24))
    return np.asarray(decoder.logits(decoder.hidden(jnp.asarray(tokens))[0]), np.float64)


def transformers_logits(directory) -> np.ndarray:
    """Of the tokens that `logits` reads."""
    torch = pytest.importorskip("torch", reason="compares with torch, which is pinned for Python 3.11 alone")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(np.random.default_rng(0).integers(0, 300, (2, 24)))).logits.double().numpy()


def relative_rms(got, expected) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def test_layers_are_kept_converted_or_copied():
    cfg = student(attention_layers=(2,))
    assert cfg.stacks == (("gdn", 1), ("gdn", 1), ("attention", 1))
    assert cfg.converted_layers == (1,) and cfg.copied == (0,) and cfg.mixer == OWN.mixer
    assert OWN.as_teacher_of(cfg).stacks == (("gdn", 1), ("attention", 1), ("attention", 1))
    assert student(attention_every=3) == cfg
    assert student().converted_layers == (1, 2) and OWN.as_teacher_of(student()) == OWN
    twice = student(dataclasses.replace(OWN, stacks=OWN.stacks * 2), attention_every=6)
    assert [n for _, n in twice.stacks] == [1, 2, 1, 1, 1] and twice.copied == (0, 2)
    assert twice.converted_layers == (1, 2, 4)
    merged = dataclasses.replace(OWN, stacks=(("gdn", 2), ("attention", 1)))
    assert OWN.as_teacher_of(merged).stacks == (("gdn", 1), ("attention", 1), ("attention", 1))


def test_with_all_softmax_layers_kept_the_student_is_the_teacher():
    cfg, params = OWN.as_student("gdn", OWN.mixer, (1, 2)), random_params(OWN)
    whole = whole_student(cfg, params, init_mixers(cfg, params, seed=0))
    assert relative_rms(logits(cfg, whole), logits(OWN, params)) < 1e-6


def test_only_what_is_converted_has_a_loss_and_trains_in_stage_1():
    cfg = student(attention_layers=(2,))
    teacher = OWN.as_teacher_of(cfg)
    params, mixers = random_params(teacher), random_mixers(cfg, seed=1)
    assert sorted(mixers["stacks"]) == [1]
    rows = jnp.ones((2, 16), jnp.int32)
    batch = {"tokens": rows * 7, "segment_ids": rows, "positions": jnp.arange(16)[None] * rows}
    sums = align_loss(cfg, teacher, mixers, params, batch, remat="none")
    assert sums.extras["layer_loss"].shape == (1,) and sums.loss > 0
    plan = StagePlan(RunConfig(), "stage1", cfg, teacher)
    trained, frozen = abstract_student(plan)
    assert sorted(trained["stacks"]) == [1] and not frozen
    assert all(dataclasses.replace(plan, name="stage2").trains(path) for path in path_leaves(params))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(teacher's directory, the run's, its summary): one step of stage 1, calibrated."""
    parent = tmp_path_factory.mktemp("further")
    teacher = save_teacher(parent, OWN)
    # As a published model has it, whose further layers are passed over.
    keys = qwen3_5.nested(read_config(teacher))
    keys["text_config"]["mtp_num_hidden_layers"] = 1
    (teacher / "config.json").write_text(json.dumps(keys))
    settings = tiny_run.settings(teacher, "gdn", {"stage1": 1}) | {"student.attention_layers": (2,)}
    summary = tiny_run.convert(parent / "run", settings | {"student.init": "calibrated", "student.conv_qk": 0.1})
    return teacher, parent / "run", summary


def test_after_stage_1_all_but_the_converted_mixer_is_the_teachers_to_the_bit(run):
    teacher, workdir, _ = run
    before, after = (load_file(path / "model.safetensors") for path in (teacher, workdir / "export"))
    new = {name for name in after if name.startswith("model.layers.1.linear_attn.")}
    assert after.keys() - before.keys() == new | {"lm_head.weight"}
    assert {name for name in before.keys() - after.keys() if not name.startswith("model.layers.1.self_attn.")} == set()
    for name in after.keys() & before.keys():
        np.testing.assert_array_equal(after[name], before[name])
    assert any(name.startswith("model.layers.0.linear_attn.") for name in after.keys() & before.keys())


def test_the_export_is_read_and_the_report_names_the_layer(run):
    _, workdir, summary = run
    keys = read_config(workdir / "export")
    assert keys["layer_types"] == ["linear_attention"] * 2 + ["full_attention"]
    assert "mtp_num_hidden_layers" not in keys
    cfg = model_config_from_hf(keys)
    assert cfg.mixer == GdnOptions(2, 4, 8, 8) and cfg.copied == () and cfg.stacks == (("gdn", 2), ("attention", 1))
    got = logits(cfg, load_params(workdir / "export", cfg))
    assert relative_rms(got, transformers_logits(workdir / "export")) < 1e-5
    assert read_run(workdir).recurrent_layers == [1]
    assert "converted, beside the teacher's own | 1 |" in (workdir / "export" / "README.md").read_text()
    assert summary["stages"][0]["first_loss"] > 0 and summary["samples"]


class Killed(Exception):
    """In the place of a machine that is taken away."""


def losses(workdir) -> list[float]:
    return [row["loss"] for row in read_metrics(workdir)]


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_over_eight_devices_as_on_one(tmp_path, monkeypatch):
    """Losses are those without the stop, bit for bit; those over a mesh are near."""
    # Adam's first update is g / (|g| + eps): of gdn's gradients some are rounding alone, which is not to be a step.
    settings = tiny_run.settings(save_teacher(tmp_path / "teacher", OWN), "gdn", {"stage1": 3, "stage2": 3})
    settings |= {"student.attention_every": 3, "optim.eps": 1e-5}
    tiny_run.convert(tmp_path / "whole", settings)
    log = MetricsLogger.log

    def log_and_die(self, name, step, values):
        log(self, name, step, values)
        if (name, step) == ("stage2", 3):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", log_and_die)
        with pytest.raises(Killed):
            tiny_run.convert(tmp_path / "parts", settings)
    tiny_run.convert(tmp_path / "parts", settings)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 6
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.context": 2}
    tiny_run.convert(tmp_path / "mesh", settings | mesh)
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "whole"), rtol=1e-4)


def by_loops(params, layer: int) -> np.ndarray:
    """qkv [D, 2 G K + H V] of one of OWN's softmax layers, head by head."""
    mixer = jax.tree.map(lambda x: np.asarray(x[layer]), params["stacks"][1]["mixer"])
    q, k, v = (mixer[name]["kernel"] for name in "qkv")
    columns = []
    for head in range(2):  # Two key heads, each for the two value heads of one softmax head; q's head has 32 columns.
        columns += [q[:, 32 * head + c] for c in range(8)]
    columns += [k[:, c] for _ in range(2) for c in range(8)]
    columns += [v[:, 8 * (value_head % 2) + c] for value_head in range(4) for c in range(8)]
    return np.stack(columns, axis=1)


def test_a_converted_layer_begins_with_its_softmax_layers_heads():
    cfg, params = student(), random_params(OWN)
    mixers = init_mixers(cfg, params, seed=0)
    got = mixers["stacks"][1]["mixer"]
    for layer in (0, 1):
        np.testing.assert_array_equal(got["qkv"]["kernel"][layer], by_loops(params, layer))
    np.testing.assert_array_equal(got["o"]["kernel"], params["stacks"][1]["mixer"]["o"]["kernel"])
    table = transfer_table(cfg, mixers, params)
    said = dict(zip(table.columns[0].cells, table.columns[2].cells, strict=True))
    assert said["stacks/1/mixer/qkv/kernel"] == "teacher" and said["stacks/1/mixer/z/kernel"] == "new"
    assert "the heads' gates" in table.caption and "q_norm/scale" in table.caption and "kernel" not in table.caption
    fresh = init_mixers(cfg, params, seed=0, fresh_qkvo=True)["stacks"][1]["mixer"]
    assert not fresh["o"]["kernel"].any() and np.abs(fresh["qkv"]["kernel"]).max() <= 0.5 * 32**-0.5


def test_a_key_head_begins_with_the_softmax_head_in_the_middle_of_those_it_serves():
    """As the 27B model has them: three value heads a key head, two a softmax head."""
    cfg = dataclasses.replace(OWN, num_heads=3, num_kv_heads=3, mixer=GdnOptions(2, 6, 8, 8))
    attention = {name: {"kernel": jnp.zeros((1, 1, 3, 16)) + jnp.arange(3.0)[:, None]} for name in "kv"}
    attention["q"] = {"kernel": jnp.zeros((1, 1, 3, 32)) + jnp.arange(3.0)[:, None]}
    attention = jax.tree.map(lambda x: x.reshape(1, 1, -1), attention) | {"o": {"kernel": jnp.zeros((1, 48, 1))}}
    heads = gdn_start.adopt(cfg, {"mixer": attention})["qkv"]["kernel"].reshape(-1, 8)[:, 0]
    np.testing.assert_array_equal(heads, [0, 2, 0, 2, 0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_export_of_ours_begins_as_its_own_teacher_would(family, tmp_path):
    """Without norms of q and k its softmax heads are padded to twice the size; o is doubled for the gate's 1/2."""
    original = dataclasses.replace(TEACHER, stacks=(("attention", 4),), family=family, qk_norm=family == "qwen3")
    original = dataclasses.replace(original, qkv_bias=family == "qwen2")
    hybrid = student_of(original, "gdn", (1, 3), kv_heads="cloned")
    params = random_params(original.as_teacher_of(hybrid), 0.05) | {"head": {"kernel": jnp.ones((32, 300))}}
    mixers = init_mixers(hybrid, params, seed=0)
    save_params(whole_student(hybrid, params, mixers), hybrid, tmp_path, base_config={"model_type": family})
    teacher = model_config_from_hf(read_config(tmp_path))
    cfg = student(teacher, attention_layers=(3,))
    assert (teacher.head_dim, cfg.mixer.value_size) == (16 if family == "qwen2" else 8, 8)
    got = init_mixers(cfg, load_params(tmp_path, teacher), seed=0)["stacks"][1]["mixer"]
    expected = init_mixers(student_of(original, "gdn", kv_heads="cloned"), {"stacks": {0: stacked(params)}}, seed=0)
    expected = jax.tree.map(lambda x: x[1:2], expected["stacks"][0]["mixer"])
    qkv = np.concatenate([expected[name]["kernel"] for name in "qkv"], axis=-1)
    np.testing.assert_allclose(got["qkv"]["kernel"], qkv, rtol=1e-6)
    np.testing.assert_allclose(got["o"]["kernel"], 2 * expected["o"]["kernel"], rtol=1e-6)
    # Of padded heads the mixer takes the first half of the channels, and its o is solved for those.
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 24)))
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(24) + 0 * tokens}
    cut = teacher.as_teacher_of(cfg)
    weights, losses = load_params(tmp_path, cut), {}
    for parts in (("gate",), ("gate", "projection")):
        begun = calibrated(cfg, cut, init_mixers(cfg, weights, seed=0), weights, batch, parts)
        losses[parts] = float(align_loss(cfg, cut, begun, weights, batch, remat="none").loss)
    assert losses["gate", "projection"] < losses["gate",]


def stacked(params):
    """The teacher's softmax layers in one stack."""
    mixers = [{"mixer": stack["mixer"]} for _, stack in sorted(params["stacks"].items())]
    return jax.tree.map(lambda *layers: jnp.concatenate(layers), *mixers)


def test_statistics_of_a_head_are_those_of_its_value_heads():
    mixer = random_mixers(student())["stacks"][1]["mixer"]
    look_back, entropy, rms = (jnp.array([pair]) for pair in ((3.0, 50.0), (1.0, 2.0), (2.0, 5.0)))
    seen = TeacherStatistics(look_back, entropy, rms, jnp.ones((1, 32)))
    half_lives = np.log(2) / np.log1p(np.exp(gdn_start.decay_of_look_back(OWN, mixer, seen)["dt_bias"]))
    np.testing.assert_allclose(half_lives, [[3, 3, 50, 50]], rtol=1e-4)
    beta = jax.nn.sigmoid(gdn_start.beta_of_entropy(OWN, mixer, seen)["b"]["kernel"][0, 0])
    np.testing.assert_allclose(beta, [0.7, 0.7, 0.3, 0.3], rtol=1e-5)
    ratio = gdn_start.output_of_rms(OWN, mixer, seen)["o"]["kernel"] / mixer["o"]["kernel"]
    np.testing.assert_allclose(ratio[0, :, 0], np.repeat([2, 5], 16), rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_layers": (0, 2)}, ["layers 0, 2", "in 1, 2 alone", "layer 0 is gdn"]),
        ({"attention_every": 1}, ["layer 0 is gdn", "attention_every"]),
        ({"attention_layers": (1, 2)}, ["names all 2 layers of softmax attention"]),
        ({"attention_layers": ("auto:1",)}, ["auto:1", "gdn itself", "attention_every"]),
        ({"mixer": "rad_rwkv7"}, ["'rad_rwkv7'", "expected 'gdn'"]),
        ({"mixer": "attention"}, ["'attention'", "expected 'gdn'"]),
        ({"kv_heads": "cloned"}, ["config.student.kv_heads is 'cloned'"]),
        ({"options": {"kv_heads": "teacher"}}, ["config.student.options has kv_heads", "config.student.kv_heads"]),
    ],
)
def test_what_can_not_be_is_refused_in_one_paragraph(fields, named):
    run = dataclasses.replace(RunConfig(), student=Student(**({"mixer": "gdn"} | fields)))
    with pytest.raises(ValueError) as caught:
        make_student_config(OWN, run)
    message = str(caught.value)
    assert all(word in message for word in named) and "\n" not in message, message


def test_softmax_layers_of_other_sizes_or_gates_are_refused():
    other = dataclasses.replace(OWN, mixer=GdnOptions(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"3 value heads of 8 channels, which 2 softmax heads of 16 .*fresh_qkvo"):
        student(other)
    assert student(other, fresh_qkvo=True).converted_layers == (1, 2)
    with pytest.raises(ValueError, match="2 value heads of 8 channels, which 2 softmax heads of 16"):
        student(dataclasses.replace(OWN, mixer=GdnOptions(2, 2, 8, 8)))
    gated = dataclasses.replace(OWN, stacks=(("attention", 2),), mixer=None)
    for mixer in ("gdn", "rad_rwkv7", "rad_rwkv6"):
        with pytest.raises(ValueError, match=rf"{mixer} .*\boutput gate\b.*config\.student\.mixer"):
            make_student_config(gated, dataclasses.replace(RunConfig(), student=Student(mixer=mixer)))


def test_a_plan_counts_what_is_converted():
    cfg = student(attention_layers=(2,))
    teacher = OWN.as_teacher_of(cfg)
    # qkv of 2 x 2 x 8 + 4 x 8 channels, z and o, beta and the decay; of the recurrence and the convolution.
    mixer, mixing = 32 * 64 + 2 * 32 * 32 + 2 * 32 * 4, 7 * 4 * 8 * 8 + 8 * 64
    assert cost.matmul_weights(cfg, mixers_of=cfg) == mixer
    assert cost.mixing_flops(cfg, 128, aligned_only=True) == mixing
    others = 2 * cost.matmul_weights(teacher) + cost.mixing_flops(teacher, 128) - 2 * 300 * 32
    unwanted = 2 * (32 * 64 + 32 * 32 + 2 * 32 * 4)
    assert cost.model_flops(cfg, teacher, "stage1", 128) == others + 3 * (2 * mixer + mixing) - unwanted
    run = dataclasses.replace(RunConfig(), mesh=Mesh(fsdp=1), stages=("stage1",))
    mesh = AbstractMesh((1, 1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    record = by_arithmetic(StagePlan(run, "stage1", cfg, teacher, mesh))
    assert record["parameter_bytes"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(random_mixers(cfg)))
    one, two = (memory.temporary_bytes(run.stage1, s, 0, mesh, whole_student=False) for s in (cfg, student()))
    assert 2 * one["layers' inputs"] == two["layers' inputs"]
