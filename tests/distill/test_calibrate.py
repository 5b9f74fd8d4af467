"""A calibrated start: statistics are of the attention that one sees, and each part makes of them what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untrained import random_mixers, random_params, student_of

from radlads_jax.config import Mesh, RunConfig
from radlads_jax.distill.calibrate import calibrated, has_queries, statistics
from radlads_jax.distill.mesh import make_mesh
from radlads_jax.distill.student_config import make_student_config
from radlads_jax.models import ModelConfig, bind, sharding
from radlads_jax.models.decoder import make_context
from radlads_jax.models.placement import shardings
from radlads_jax.student import Student

TEACHER = ModelConfig("qwen2", 61, 32, 64, 4, 2, 8, (("attention", 2),), qkv_bias=True, tie_embeddings=True)
GDN = student_of(TEACHER, "gdn", (1,))


@pytest.fixture(scope="module")
def weights():
    return random_params(TEACHER.as_teacher_of(GDN), 0.3)


@pytest.fixture(scope="module")
def batch():
    """A row of one segment, and one of two and padding."""
    segments = np.ones((2, 40), np.int32)
    segments[1, 18:], segments[1, 37:] = 2, 0
    positions = np.tile(np.arange(40), (2, 1))
    positions[1, 18:] -= 18
    tokens = np.random.default_rng(0).integers(1, 61, (2, 40))
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}


@pytest.fixture(scope="module")
def seen(weights, batch):
    return jax.jit(lambda w, b: statistics(GDN, TEACHER.as_teacher_of(GDN), w, b))(weights, batch)


def first_layer(weights, batch):
    """q, k, v and what the mixer reads, float64."""
    teacher = TEACHER.as_teacher_of(GDN)
    decoder = bind(teacher, weights)
    context, _ = make_context(teacher, batch["tokens"], batch["segment_ids"], batch["positions"], None)
    layer = jax.tree.map(lambda x: x[0], decoder.stacks[0])
    h = layer.mixer_input(decoder.embed(batch["tokens"]))
    q, k, v, _ = layer.mixer.projected(h, context)
    return [np.asarray(x, np.float64) for x in (q, k, v, h)]


def test_statistics_are_those_of_a_loop_over_queries(seen, weights, batch):
    q, k, v, h = first_layer(weights, batch)
    ids, positions = np.asarray(batch["segment_ids"]), np.asarray(batch["positions"])
    far, spread, squares = [], [], []
    for row in range(2):
        for t in range(40):
            keys = [s for s in range(t + 1) if ids[row, s] == ids[row, t]]
            late = [s for s in keys if positions[row, s] >= 4]
            for head in range(4):
                scores = {s: q[row, t, head] @ k[row, s, head // 2] / 8**0.5 for s in keys}
                every = np.exp([scores[s] for s in keys])
                out = (every / every.sum()) @ v[row, keys, head // 2]
                squares.append((head, np.mean(out**2)) if ids[row, t] else None)
                if ids[row, t] and positions[row, t] >= 8:
                    p = np.exp([scores[s] for s in late])
                    p /= p.sum()
                    far.append((head, p @ np.maximum(t - np.array(late), 0.5)))
                    spread.append((head, -p @ np.log(p)))
    for statistic, pairs in ((seen[0].look_back, far), (seen[0].entropy, spread), (seen[0].output_rms ** 2, squares)):
        expected = [np.mean([x for h_, x in filter(None, pairs) if h_ == head]) for head in range(4)]
        np.testing.assert_allclose(statistic[0], expected, rtol=1e-4)
    x = h[ids > 0]
    normal = x.T @ x + 1e-2 * np.mean(np.square(x).sum(0)) * np.eye(32)
    np.testing.assert_allclose(seen[0].constant[0], np.linalg.solve(normal, x.sum(0)), rtol=1e-3, atol=1e-4)
    assert set(seen) == {0}


def test_parts_make_of_statistics_what_they_say(seen, weights, batch):
    before = random_mixers(GDN)
    after = calibrated(GDN, TEACHER.as_teacher_of(GDN), jax.tree.map(jnp.copy, before), weights, batch)
    old, new = before["stacks"][0]["mixer"], after["stacks"][0]["mixer"]
    half_lives = np.log(2) / np.log1p(np.exp(np.asarray(new["dt_bias"], np.float64)))
    np.testing.assert_allclose(half_lives, seen[0].look_back, rtol=1e-4)
    np.testing.assert_allclose(new["z"]["kernel"][0, :, 5], 1.278465 * seen[0].constant[0], rtol=1e-4, atol=1e-6)
    for name in ("q", "k", "v", "conv_q", "a"):
        jax.tree.map(np.testing.assert_array_equal, new[name], old[name])
    ratio = np.asarray(new["o"]["kernel"] / old["o"]["kernel"]).reshape(1, 4, 8, 32)
    np.testing.assert_allclose(ratio, np.broadcast_to(seen[0].output_rms[..., None, None], ratio.shape), rtol=1e-4)
    alone = calibrated(GDN, TEACHER.as_teacher_of(GDN), before, weights, batch, ("decay",))["stacks"][0]["mixer"]
    np.testing.assert_array_equal(alone["o"]["kernel"], old["o"]["kernel"])


@pytest.mark.parametrize("mixer", ["gdn", "rad_rwkv7", "rad_rwkv6"])
def test_documents_that_are_all_short_leave_a_start_to_train_from(weights, batch, mixer):
    """Of 8 tokens each, where no query tells how far back it looks; a run refuses them."""
    place = np.arange(40)
    short = dict(batch) | {"segment_ids": np.tile(1 + place // 8, (2, 1)), "positions": np.tile(place % 8, (2, 1))}
    assert not has_queries(short) and has_queries(jax.tree.map(np.asarray, dict(batch)))
    student = student_of(TEACHER, mixer, (1,))
    found = calibrated(student, TEACHER.as_teacher_of(student), random_mixers(student), weights, short)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gdn", "rad_rwkv7", "rad_rwkv6"])
def test_eight_devices_calibrate_as_one_does(weights, batch, mixer):
    run = dataclasses.replace(RunConfig(), mesh=Mesh(fsdp=2, tensor=2, context=2), stages=())
    student = student_of(TEACHER, mixer, (1,))
    mesh, teacher, mixers = make_mesh(run), TEACHER.as_teacher_of(student), random_mixers(student)
    expected = calibrated(student, teacher, jax.tree.map(jnp.copy, mixers), weights, batch)
    placed = jax.device_put(mixers, shardings(mesh, mixers, student))
    rows = sharding.place_rows(mesh, jax.tree.map(np.asarray, batch), 2)
    got = calibrated(
        student, teacher, placed, jax.device_put(weights, shardings(mesh, weights, teacher)), rows, (), mesh
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), got, expected)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mixer": "window", "init": "calibrated"}, ["config.student.init", "window"]),
        ({"mixer": "rad_rwkv7", "init": "calibrated", "calibrate": ("gate",)}, ["'gate'", "output or projection"]),
        ({"mixer": "rad_rwkv7", "init": "calibrated", "calibrate": ("projection",)}, ["'projection'", "without gate"]),
        (
            {"mixer": "gdn", "init": "calibrated", "calibrate": ("decay", "projection")},
            ["'projection'", "without gate"],
        ),
        (
            {"mixer": "rad_rwkv6", "init": "calibrated", "calibrate": ("gate", "output")},
            ["config.student.calibrate", "gate='full'", "decay, output, projection"],
        ),
        ({"mixer": "gdn", "init": "calibrated", "fresh_qkvo": True}, ["config.student.init", "fresh_qkvo"]),
        ({"mixer": "gdn", "calibrate": ("decay",)}, ["config.student.calibrate", "'published'"]),
        ({"mixer": "gdn", "init": "calibrated", "calibrate": ("decays",)}, ["decays", "decay, beta"]),
        (
            {"mixer": "gdn", "init": "calibrated", "shortest_half_life": 9.0},
            ["config.student.shortest_half_life", "'decay'", "without 'decay'"],
        ),
        (
            {"mixer": "gdn", "init": "calibrated", "calibrate": ("gate",), "gate_std": 0.5},
            ["config.student.gate_std", "'gate'"],
        ),
    ],
)
def test_what_can_not_be_calibrated_is_named(fields, named):
    run = dataclasses.replace(RunConfig(), student=Student(**fields))
    with pytest.raises(ValueError) as caught:
        make_student_config(TEACHER, run)
    assert all(word in str(caught.value) for word in named), caught.value
