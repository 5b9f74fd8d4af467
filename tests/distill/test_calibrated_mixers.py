"""RAD-RWKV mixers, and an o that is solved for, begun by their teacher: what each part promises, in float64 numbers, in
a hybrid with GQA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from untrained import random_params, student_of

from radlads_jax.distill.align import align_loss, mixer_structure
from radlads_jax.distill.calibrate import calibrated, statistics
from radlads_jax.models import MIXERS, ModelConfig, bind
from radlads_jax.models.decoder import make_context
from radlads_jax.porting.student import init_mixers

TEACHER = ModelConfig("qwen2", 61, 32, 64, 4, 2, 8, (("attention", 3),), qkv_bias=True, tie_embeddings=True)
STUDENTS = {
    "rwkv7": student_of(TEACHER, "rad_rwkv7", (1,)),
    "rwkv7 with GroupNorm": student_of(TEACHER, "rad_rwkv7", (1,), group_norm=True, balance_state=False, gate="full"),
    "rwkv6": student_of(TEACHER, "rad_rwkv6", (1,), gate="low_rank"),
    "gdn": student_of(TEACHER, "gdn", (1,)),
}
# Behind the softmax layer; the mixer reads the first stack's values.
LATER_STACK, LATER_LAYER = 2, 2


class Start:
    """A student's mixers begun afresh, and as its teacher says."""

    def __init__(self, student: ModelConfig):
        self.student, self.teacher = student, TEACHER.as_teacher_of(student)
        self.weights = random_params(self.teacher, 0.3)
        segments = np.ones((2, 40), np.int32)
        segments[1, 18:], segments[1, 37:] = 2, 0
        positions = np.tile(np.arange(40), (2, 1))
        positions[1, 18:] -= 18
        tokens = np.random.default_rng(0).integers(1, 61, (2, 40))
        self.batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments)}
        self.batch["positions"] = jnp.asarray(positions)
        self.fresh = init_mixers(student, self.weights, 0)
        self.known = MIXERS[student.recurrent_mixer].calibrations(student)
        self.scaled = self.begun(*(name for name in self.known if name != "projection"))

    def begun(self, *parts: str):
        fresh = jax.tree.map(jnp.copy, self.fresh)
        return calibrated(self.student, self.teacher, fresh, self.weights, self.batch, parts)

    @functools.cached_property
    def solved(self):
        """With all parts but gdn's output, which is of the teacher alone."""
        return self.begun(*(name for name in self.known if name != "output" or self.student.recurrent_mixer != "gdn"))

    @functools.cached_property
    def loss(self):
        """Stage 1's, of mixers."""
        run = jax.jit(lambda *trees: align_loss(self.student, self.teacher, *trees, remat="none"))

        def mean(mixers) -> float:
            sums = run(mixers, self.weights, self.batch)
            return float(sums.loss / sums.weight)

        return mean

    def later_layer(self, mixers):
        """(attention's heads, the mixer's [tokens, H, K], attention's result without a bias [tokens, D]), float64."""
        tokens, segment_ids, positions = (self.batch[name] for name in ("tokens", "segment_ids", "positions"))
        decoder = bind(self.teacher, self.weights)
        context, _ = make_context(self.teacher, tokens, segment_ids, positions, None)
        x, layers = (
            decoder.embed(tokens),
            [s.layer(jnp.asarray(i)) for s in decoder.walk() for i in range(s.num_layers)],
        )
        first = layers[0].mixer.v(layers[0].mixer_input(x)).reshape(2, 40, 2, 8)
        context = context._replace(v_first=jnp.repeat(first, 2, axis=2).reshape(*first.shape[:2], -1))
        for layer in layers[:LATER_LAYER]:
            x = layer(x, context, None, None)[0]
        h, attention = layers[LATER_LAYER].mixer_input(x), layers[LATER_LAYER].mixer
        mixer = nnx.merge(mixer_structure(self.student, self.student.recurrent_mixer), of_layer(mixers))
        target = attention(h, context, None, None)[0]
        for module in (attention, mixer):
            # An o that does nothing.
            module.o.kernel = nnx.Param(jnp.eye(32))
        both = [
            module(h, context, jnp.asarray(LATER_LAYER), None)[0].reshape(2, 40, 4, 8) for module in (attention, mixer)
        ]
        return [np.asarray(y, np.float64)[np.asarray(segment_ids) > 0] for y in (*both, target)]


@functools.cache
def start_of(name: str) -> Start:
    return Start(STUDENTS[name])


@functools.cache
def seen():
    """Of the later stack's one layer, in every student the same."""
    start = start_of("rwkv7")
    run = jax.jit(lambda weights, batch: statistics(start.student, start.teacher, weights, batch))
    return jax.tree.map(lambda x: np.asarray(x[0], np.float64), run(start.weights, start.batch)[LATER_STACK])


def of_layer(mixers):
    return jax.tree.map(lambda x: x[0], mixers["stacks"][LATER_STACK]["mixer"])


def wide(x):
    return np.asarray(x, np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-wide(x)))


def best_scales(attention, outputs):
    """Of every head: by what its outputs are nearest to attention's; at least as for a correlation of 0.1."""
    both, own, theirs = ((x * y).sum((0, 2)) for x, y in ((attention, outputs), (outputs,) * 2, (attention,) * 2))
    assert (both > 0.1 * np.sqrt(own * theirs)).any()
    return np.maximum(both, 0.1 * np.sqrt(own * theirs)) / own


@pytest.mark.parametrize("name", ["rwkv7", "rwkv6"])
def test_what_a_state_holds_is_as_old_as_what_attention_looks_at(name):
    start = start_of(name)
    base = wide(of_layer(start.scaled)["decay"]["base"])
    bounded = start.student.recurrent_mixer == "rad_rwkv7"
    w = np.exp(-np.exp(-0.5) * sigmoid(base)) if bounded else np.exp(-np.exp(base))
    ages = np.arange(2000)
    kept = np.power.outer(w, ages)
    assert seen().look_back.std() > 0.1
    np.testing.assert_allclose(kept @ ages / kept.sum(-1), np.repeat(seen().look_back, 8), rtol=1e-3)


@pytest.mark.parametrize("name", ["rwkv7", "rwkv6"])
def test_a_gate_of_low_rank_is_1_for_whatever_is_read_and_not_the_same_in_its_ranks(name):
    gate = jax.tree.map(wide, of_layer(start_of(name).scaled)["gate"])
    x = np.random.default_rng(0).normal(size=(7, 32))
    np.testing.assert_allclose(sigmoid(x @ gate["a"]) @ gate["b"], 1, atol=1e-5)
    assert gate["b"].std() > 0.01


def test_heads_that_look_everywhere_take_little_away_and_values_are_a_layers_own():
    rwkv7 = start_of("rwkv7")
    mixer = of_layer(rwkv7.scaled)
    iclr = sigmoid(mixer["iclr"]["base"])[::8]
    assert np.argsort(iclr).tolist() == np.argsort(-seen().entropy).tolist()
    np.testing.assert_allclose([iclr.min(), iclr.max()], [0.3, 0.7], rtol=1e-5)
    assert (sigmoid(mixer["value"]["base"]) < 0.003).all()


@pytest.mark.parametrize("name", ["rwkv7", "rwkv7 with GroupNorm"])
def test_a_heads_scale_is_the_one_that_brings_it_nearest(name):
    start = start_of(name)
    attention, outputs, _ = start.later_layer(start.scaled)
    ratio = wide(of_layer(start.scaled)["o"]["kernel"]) / wide(of_layer(start.fresh)["o"]["kernel"])
    expected = np.repeat(best_scales(attention, outputs), 8)[:, None]
    np.testing.assert_allclose(ratio, np.broadcast_to(expected, (32, 32)), rtol=1e-3)


@pytest.mark.parametrize("name", ["rwkv7", "gdn"])
def test_the_projection_is_the_ridge_regression_that_goes_on_from_the_scales(name):
    start = start_of(name)
    attention, outputs, target = start.later_layer(start.solved)
    scales = np.repeat(best_scales(attention, outputs), 8)
    y, fresh = outputs.reshape(-1, 32) * scales, wide(of_layer(start.fresh)["o"]["kernel"])
    ridge = 1e-2 * np.square(y).sum() / 32
    change = np.linalg.solve(y.T @ y + ridge * np.eye(32), y.T @ (target - y @ fresh))
    solved = wide(of_layer(start.solved)["o"]["kernel"]) / scales[:, None]
    assert np.abs(solved - fresh - change).max() < 1e-3 * np.abs(change).max()


@pytest.mark.parametrize("name", ["rwkv7", "rwkv6"])
def test_a_begun_students_first_loss_is_lower(name):
    start = start_of(name)
    assert start.loss(start.scaled) < start.loss(start.fresh)


@pytest.mark.parametrize("name", ["rwkv7", "gdn"])
def test_a_solved_projections_first_loss_is_lower_still(name):
    start = start_of(name)
    assert start.loss(start.solved) < min(0.9 * start.loss(start.scaled), start.loss(start.fresh))
