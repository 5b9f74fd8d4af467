"""Softmax layers that a hybrid keeps with other things than its teacher's, and norms of q and k in its mixers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from untrained import TEACHER, random_mixers, random_params, student_of

from radlads_jax.config import RunConfig
from radlads_jax.distill.align import align_loss
from radlads_jax.distill.losses import LossSums
from radlads_jax.distill.program import StagePlan, abstract_state, abstract_student, make_step
from radlads_jax.distill.stages import STAGES
from radlads_jax.models import abstract_params, bind, init_state, sharding
from radlads_jax.models.config import KeptAttention
from radlads_jax.models.decoder import make_context
from radlads_jax.porting.student import init_mixers, transfer_table, whole_student

# One layer alone, for the formula; T = 16 divides into shards.
KEPT = KeptAttention(rope=False, log_scale=5.0, output_gate=True)
LAYER = dataclasses.replace(TEACHER, stacks=(("attention", 1),), kept_attention=KEPT)
LENGTH = 16
SEGMENTS = np.asarray([[1] * LENGTH, [1] * 6 + [2] * 7 + [0] * 3])


def hybrid(kept: KeptAttention | None, mixer: str = "rad_rwkv7", **options):
    """Layer 1 of 2 is softmax."""
    return dataclasses.replace(student_of(TEACHER, mixer, (1,), **options), kept_attention=kept)


@functools.cache
def parameters():
    return random_params(LAYER, 0.3)


def inputs() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, LENGTH, TEACHER.hidden_size)).astype(np.float32)


def by_formula(segments: np.ndarray) -> np.ndarray:
    """The layer's output, token by token, float64."""
    mixer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), parameters()["stacks"][0]["mixer"])
    heads, size, groups = LAYER.num_heads, LAYER.head_dim, LAYER.num_kv_heads
    out = np.zeros((2, LENGTH, LAYER.hidden_size))
    for row, x in enumerate(inputs().astype(np.float64)):
        q, k, v = (x @ mixer[name]["kernel"] + mixer[name]["bias"] for name in "qkv")
        q = q.reshape(LENGTH, heads, 2 * size)
        k, v = (y.reshape(LENGTH, groups, size).repeat(heads // groups, 1) for y in (k, v))
        for at in range(LENGTH):
            seen = [s for s in range(at + 1) if segments[row, s] == segments[row, at]]
            scale = np.log(len(seen) - 1 + KEPT.log_scale) / np.log(KEPT.log_scale)
            for head in range(heads):
                scores = np.asarray([q[at, head, :size] @ k[s, head] for s in seen]) * scale / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                mixed = (weights / weights.sum()) @ v[seen, head]
                gate = 1 / (1 + np.exp(-q[at, head, size:]))
                out[row, at] += (mixed * gate) @ mixer["o"]["kernel"][head * size : (head + 1) * size]
    return out


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, params, x, segments, positions, state):
    context, advanced = make_context(cfg, jnp.zeros(x.shape[:2], jnp.int32), segments, positions, state)
    mixer = next(iter(bind(cfg, params).walk())).first().mixer
    own = None if advanced is None else jax.tree.map(lambda leaf: leaf[0], advanced["stacks"][0])
    out, own = mixer(x, context, 0, own)
    return out, None if advanced is None else advanced | {"stacks": [jax.tree.map(lambda leaf: leaf[None], own)]}


def relative(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def test_the_layer_is_its_formula_whole_and_in_segments():
    x, whole = inputs(), np.ones_like(SEGMENTS)
    assert relative(run(LAYER, parameters(), x, None, None, None)[0], by_formula(whole)) < 1e-6
    # With the places that data gives, and without them.
    places = np.asarray([[*range(LENGTH)], [*range(6), *range(7), 0, 1, 2]])
    for positions in (places, None):
        out, _ = run(LAYER, parameters(), x, SEGMENTS, positions, None)
        assert relative(out, by_formula(SEGMENTS)) < 1e-6


def test_the_layer_is_its_formula_token_by_token():
    x, state, got = inputs(), init_state(LAYER, 2, LENGTH), []
    for begin, end in [(0, 5), *((i, i + 1) for i in range(5, LENGTH))]:
        out, state = run(LAYER, parameters(), x[:, begin:end], None, None, state)
        got.append(out)
    assert relative(np.concatenate(got, 1), by_formula(np.ones_like(SEGMENTS))) < 1e-6


def test_the_layer_is_its_formula_over_shards_of_rows():
    mesh = jax.make_mesh((1, 2, 2, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    arguments = jax.device_put((parameters(), inputs(), SEGMENTS), NamedSharding(mesh, PartitionSpec()))
    with sharding.traced_over(mesh):
        out, _ = run(LAYER, *arguments, None, None)
    assert relative(out, by_formula(SEGMENTS)) < 1e-6


@functools.partial(jax.jit, static_argnums=0)
def _hidden(cfg, params):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 24)))
    return bind(cfg, params).hidden(tokens)[0]


def test_a_gate_begins_as_none_and_then_does_something():
    teacher, mixers = random_params(TEACHER.as_teacher_of(hybrid(None))), random_mixers(hybrid(None))
    gated = hybrid(KeptAttention(output_gate=True))
    mixers_and_gates = init_mixers(gated, teacher, 0)
    table = transfer_table(gated, whole_student(gated, teacher, mixers_and_gates), teacher)
    paths, sources = (list(table.columns[i].cells) for i in (0, 2))
    assert sources[paths.index("stacks/1/mixer/q/kernel")] == "teacher"
    mixers_and_gates["stacks"][0] = mixers["stacks"][0]
    expected = _hidden(hybrid(None), whole_student(hybrid(None), teacher, mixers))
    assert relative(_hidden(gated, whole_student(gated, teacher, mixers_and_gates)), expected) < 1e-6
    q = mixers_and_gates["stacks"][1]["mixer"]["q"]
    q["kernel"] = q["kernel"].reshape(1, 32, 4, 2, 8).at[:, :, :, 1].set(0.2).reshape(1, 32, 64)
    assert relative(_hidden(gated, whole_student(gated, teacher, mixers_and_gates)), expected) > 1e-3


@pytest.mark.parametrize(
    ("kept", "aligned"),
    [(KeptAttention(output_gate=True), (0,)), (KeptAttention(rope=False), (0, 1))],
    ids=["gate", "no RoPE"],
)
def test_stage_1_aligns_what_does_not_begin_as_the_teacher(kept, aligned):
    student = hybrid(kept)
    teacher_cfg = TEACHER.as_teacher_of(student)
    assert student.aligned_layers == aligned and student.converted_layers == (0,)
    trained, frozen = abstract_student(StagePlan(RunConfig(), "stage1", student, teacher_cfg))
    assert set(trained["stacks"]) == set(aligned) and not frozen
    rows = jax.ShapeDtypeStruct((1, 12), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), rows)
    loss = functools.partial(align_loss, student, teacher_cfg, remat="none")
    sums = jax.eval_shape(loss, trained, abstract_params(teacher_cfg), batch)
    assert sums.extras["layer_loss"].shape == (len(aligned),)


def test_logits_are_scaled_at_inference_alone(monkeypatch):
    scaled, seen = hybrid(KeptAttention(log_scale=9.0, output_gate=True)), []

    def loss(student_cfg, teacher_cfg, student, *_, **__):
        seen.append(student_cfg)
        return LossSums(jax.tree.leaves(student)[0].sum(), jnp.ones(()), {})

    monkeypatch.setitem(STAGES, "stage2", STAGES["stage2"]._replace(loss_fn=loss))
    plan = StagePlan(RunConfig(), "stage2", scaled, TEACHER.as_teacher_of(scaled))
    jax.eval_shape(make_step(plan), abstract_state(plan), {}, {}, {"tokens": jnp.ones((32, 8))})
    assert {cfg.kept_attention for cfg in seen} == {KeptAttention(output_gate=True)}


def test_norms_begin_with_the_teachers_directions_and_about_its_lengths():
    cfg = hybrid(None, "rad_rwkv6", qk_norm=True)
    teacher = random_params(TEACHER.as_teacher_of(cfg))
    own, layer = init_mixers(cfg, teacher, 0)["stacks"][0]["mixer"], teacher["stacks"][0]
    x = np.random.default_rng(1).standard_normal((500, 32))
    x *= np.asarray(layer["input_norm"]["scale"][0]) / np.sqrt((x**2).mean(1, keepdims=True))
    for name in "qk":
        kernel, bias = (np.asarray(layer["mixer"][name][leaf][0]) for leaf in ("kernel", "bias"))
        scale = np.asarray(own[f"{name}_norm"]["scale"][0])
        assert np.ptp(scale) == 0  # no channel is preferred
        assert scale[0] == pytest.approx(np.sqrt(((x @ kernel + bias) ** 2).mean()), rel=0.05)
