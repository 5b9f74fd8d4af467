"""The stages' losses against plain float64 formulas, and what they may and may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from untrained import random_mixers, random_params, student_of

from radlads_jax.config import Optim, RunConfig, StageConfig
from radlads_jax.distill.align import align_loss
from radlads_jax.distill.losses import cross_entropy_loss, kl_loss
from radlads_jax.distill.optim import learning_rates, make_optimizer
from radlads_jax.distill.stages import STAGES
from radlads_jax.distill.step import make_train_step
from radlads_jax.distill.train_state import TrainState
from radlads_jax.models import MIXERS, ModelConfig, abstract_params, bind
from radlads_jax.models.decoder import make_context
from radlads_jax.models.tree import merge_params, overlay_params, path_leaves, split_params
from radlads_jax.porting.student import init_mixers, whole_student

TEACHER = ModelConfig("qwen2", 61, 32, 64, 4, 2, 8, (("attention", 4),), qkv_bias=True, tie_embeddings=True)
STUDENTS = {
    "rwkv6": TEACHER.as_student("rad_rwkv6", MIXERS["rad_rwkv6"].choose(32)),
    "rwkv7": TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32)),
    "hybrid": TEACHER.as_student("rad_rwkv7", MIXERS["rad_rwkv7"].choose(32), (1,)),
}


@functools.cache
def make_pair(name: str):
    student = STUDENTS[name]
    teacher = TEACHER.as_teacher_of(student)
    return student, teacher, random_params(teacher, 0.1), random_mixers(student, 0.1, seed=1)


@pytest.fixture(params=STUDENTS)
def pair(request):
    """(student cfg, teacher cfg, teacher params, mixers)."""
    return make_pair(request.param)


@pytest.fixture(params=["rwkv6", "rwkv7"])
def plain_pair(request):
    """Without the hybrid, where its three stacks would only cost compile time."""
    return make_pair(request.param)


def make_batch(rows: int = 4, length: int = 20, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, length), np.int32)
    segments[1, 12:], segments[2, 15:] = 2, 0
    mask = np.zeros((rows, length), np.float32)
    mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    positions = np.tile(np.arange(length), (rows, 1))
    positions[1, 12:] -= 12
    tokens = np.where(segments > 0, rng.integers(1, 61, (rows, length)), 0)
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask}
    return {k: jnp.asarray(v, jnp.float32 if k == "loss_mask" else jnp.int32) for k, v in arrays.items()}


def layer(params, i):
    return jax.tree.map(lambda x: x[i], params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gaps_by_hand(student_cfg, teacher_cfg, mixers, teacher, batch) -> list[jax.Array]:
    """(attention output - mixer output) of every recurrent layer, layer by layer without a scan."""
    decoder = bind(teacher_cfg, teacher)
    context, _ = make_context(teacher_cfg, batch["tokens"], batch["segment_ids"], batch["positions"], None)
    x = decoder.embed(batch["tokens"])
    whole = bind(student_cfg, whole_student(student_cfg, teacher, mixers))
    gaps, number = [], 0
    for i, (mixer, n) in enumerate(student_cfg.stacks):
        for j in range(n):
            block = layer(decoder.stacks[i], j)
            h = block.input_norm(x)
            target, _ = block.mixer(h, context, None, None)
            if mixer != "attention":
                mixer_of_layer = layer(whole.stacks[i], j).mixer
                if not gaps and MIXERS[mixer].shares_values:
                    context = context._replace(v_first=mixer_of_layer.first_values(h))
                out, _ = mixer_of_layer(h, context, jnp.asarray(number), None)
                gaps.append(target - out)
            x = x + target
            x = x + block.mlp(block.post_norm(x))
            number += 1
    return gaps


def test_alignment_is_the_mean_of_per_token_norms(pair):
    student_cfg, teacher_cfg, teacher, mixers = pair
    batch = make_batch()
    sums = jax.jit(loss_of("stage1", student_cfg, teacher_cfg))(mixers, teacher, batch)
    counted = np.asarray(batch["segment_ids"]) > 0
    gaps = [np.asarray(gap, np.float64) for gap in gaps_by_hand(student_cfg, teacher_cfg, mixers, teacher, batch)]
    per_layer = [(np.sqrt((gap**2).sum(-1)) * 32**-0.5)[counted].mean() for gap in gaps]
    np.testing.assert_allclose(sums.loss / sums.weight, np.mean(per_layer), rtol=1e-5)
    np.testing.assert_allclose(sums.extras["layer_loss"] / sums.weight, per_layer, rtol=1e-5)


def test_kl_and_cross_entropy_equal_their_formulas(plain_pair):
    student_cfg, teacher_cfg, teacher, mixers = plain_pair
    batch = make_batch()
    student = whole_student(student_cfg, teacher, mixers)

    @functools.partial(jax.jit, static_argnums=0)
    def logits_of(cfg, params):
        options = {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}
        return bind(cfg, params).logits(bind(cfg, params).hidden(batch["tokens"], **options)[0])

    def log_probs(cfg, params):
        logits = np.asarray(logits_of(cfg, params), np.float64)
        top = logits.max(-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

    p, q = log_probs(teacher_cfg, teacher), log_probs(student_cfg, student)
    counted = np.asarray(batch["segment_ids"]) > 0
    kl = (np.exp(p) * (p - q)).sum(-1)[counted].mean()
    sums = kl_loss(student_cfg, teacher_cfg, student, teacher, batch, remat="none", slice_tokens=16)
    np.testing.assert_allclose(sums.loss / sums.weight, kl, rtol=2e-5)

    targets, mask = np.roll(batch["tokens"], -1, axis=1), np.asarray(batch["loss_mask"]) > 0
    cross_entropy = -np.take_along_axis(q, targets[..., None], -1)[..., 0][mask].mean()
    sums = cross_entropy_loss(student_cfg, None, student, None, batch, remat="none", slice_tokens=16)
    np.testing.assert_allclose(sums.loss / sums.weight, cross_entropy, rtol=1e-5)


def loss_of(name, student_cfg, teacher_cfg):
    def loss_fn(student, teacher, batch):
        return STAGES[name].loss_fn(student_cfg, teacher_cfg, student, teacher, batch, remat="full", slice_tokens=None)

    return loss_fn


def optimizer_of(student_cfg):
    return make_optimizer(StageConfig(tokens=10**6, lr=1e-3, mixer_lr=1e-2, warmup_steps=0), Optim(), student_cfg)


@functools.cache
def step_of(name, student_cfg, teacher_cfg, accumulate=1):
    optimizer = optimizer_of(student_cfg)
    return jax.jit(make_train_step(loss_of(name, student_cfg, teacher_cfg), optimizer, accumulate=accumulate))


def start_of(name, pair):
    """(state, frozen, teacher) at the stage's start."""
    student_cfg, _, teacher, mixers = pair
    student = whole_student(student_cfg, teacher, mixers) if STAGES[name].whole_student else mixers
    params, frozen = split_params(student, lambda path: STAGES[name].trainable(path, student_cfg))
    return TrainState.create(params, optimizer_of(student_cfg)), frozen, teacher


@pytest.mark.parametrize("name", ["stage1", "stage2", pytest.param("stage3", marks=pytest.mark.slow)])
def test_accumulated_parts_equal_the_whole_batch(name):
    pair = make_pair("rwkv7")
    start, batch = start_of(name, pair), make_batch()
    whole, whole_metrics = step_of(name, *pair[:2])(*start, batch)
    parts, parts_metrics = step_of(name, *pair[:2], accumulate=2)(*start, batch)
    for key in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(parts_metrics[key], whole_metrics[key], rtol=2e-5)
    moments = whole.opt_state, parts.opt_state
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), *moments)
    assert whole_metrics["loss"] > 0 and int(whole.step) == 1


def test_stage_1_trains_the_recurrent_mixers_alone(pair):
    student_cfg = pair[0]
    state, frozen, _ = start_of("stage1", pair)
    assert frozen == {}
    recurrent = [i for i, (mixer, _) in enumerate(student_cfg.stacks) if mixer != "attention"]
    assert sorted(state.params["stacks"]) == recurrent
    assert all(set(stack) == {"mixer"} for stack in state.params["stacks"].values())


def test_stage_1_never_differentiates_the_frozen_stack(pair):
    """The MLPs' matrices take part in two products a layer (gate, up) forward and in none backward."""
    student_cfg, teacher_cfg, teacher, mixers = pair

    def loss(mixers, teacher):
        return align_loss(student_cfg, teacher_cfg, mixers, teacher, make_batch(), remat="full").loss

    def mlp_products(fn) -> int:
        return str(jax.make_jaxpr(fn)(mixers, teacher)).count("f32[4,20,64] = dot_general")

    assert mlp_products(loss) > 0
    assert mlp_products(jax.grad(loss)) == mlp_products(loss)


@pytest.mark.parametrize("name", ["stage1", "stage2", "stage3"])
def test_training_reduces_the_loss(plain_pair, name):
    state, frozen, teacher = start_of(name, plain_pair)
    losses = []
    for _ in range(8):
        state, metrics = step_of(name, *plain_pair[:2])(state, frozen, teacher, make_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_non_finite_steps_are_skipped_and_counted():
    pair = make_pair("rwkv7")
    state, frozen, teacher = start_of("stage2", pair)
    step = step_of("stage2", *pair[:2])
    good, _ = step(state, frozen, teacher, make_batch())
    broken = overlay_params(teacher, {"norm": {"scale": teacher["norm"]["scale"].at[0].set(jnp.nan)}})
    bad, metrics = step(good, frozen, broken, make_batch())
    assert metrics["finite"] == 0 and int(bad.skipped) == int(bad.skipped_in_a_row) == 1 and int(bad.step) == 2
    before, after = (good.params, good.opt_state), (bad.params, bad.opt_state)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), before, after)))
    recovered, _ = step(bad, frozen, teacher, make_batch())
    assert int(recovered.skipped) == 1 and int(recovered.skipped_in_a_row) == 0


def test_moments_kept_in_bfloat16():
    """Half the bytes; after gradients of one size and then of another, moments as float64 has them to 2%."""
    stage = StageConfig(tokens=10**6, lr=1e-3, lr_final=1e-3, mixer_lr=1e-3, mixer_lr_final=1e-3, warmup_steps=0)
    optimizer = make_optimizer(stage, Optim(clip=0.0, moment_dtype="bfloat16"), STUDENTS["rwkv6"])
    grads = np.random.default_rng(0).normal(size=(120, 4000)) * np.repeat([1.0, 3.0], 60)[:, None]
    params = {"head": jnp.zeros(4000)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    first, second = np.zeros(4000), np.zeros(4000)
    for gradient in grads:
        updates, state = update({"head": jnp.asarray(gradient, jnp.float32)}, state, params)
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
    steps = len(grads)
    wanted = -1e-3 * first / (1 - 0.9**steps) / (np.sqrt(second / (1 - 0.95**steps)) + 1e-8)
    kept = path_leaves(state)
    moments = {path.split("/")[-2]: leaf for path, leaf in kept.items() if path.endswith("head")}
    assert moments.keys() == {"mu", "nu"} and all(leaf.dtype == jnp.bfloat16 for leaf in moments.values())
    for got, expected in ((moments["mu"], first), (moments["nu"], second), (updates["head"], wanted)):
        error = np.asarray(got, np.float64) - expected
        assert np.sqrt(np.mean(error**2) / np.mean(expected**2)) < 0.02


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("adam", "rwkv6"),
        ("adafactor", "rwkv7"),
        pytest.param("adam", "rwkv7", marks=pytest.mark.slow),
        pytest.param("adafactor", "rwkv6", marks=pytest.mark.slow),
    ],
)
def test_weight_decay_is_of_matrices_alone(name, mixer):
    """By what a parameter is in one layer: with gradients of zero, decay alone moves anything."""
    stage = StageConfig(tokens=10**6, lr=1e-2, mixer_lr=1e-2, warmup_steps=0)
    parts = start_parts(mixer)
    params = jax.tree.map(jnp.ones_like, whole_student(*parts))
    optimizer = make_optimizer(stage, Optim(name=name, weight_decay=0.5), parts[0])
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    moved = {path for path, update in path_leaves(updates).items() if np.any(update)}
    matrices = ("kernel", "embedding", "/a", "/b")
    assert moved == {path for path in path_leaves(params) if path.endswith(matrices)}
    assert {"stacks/0/mlp/up/kernel", "stacks/0/mixer/decay/b", "head/kernel"} <= moved
    # Several vectors in one, as a token shift's mixes, multiply channel by channel too.
    several = {"rwkv6": "mixer/shift/mu", "rwkv7": "mixer/r_k"}[mixer]
    for vector in ("input_norm/scale", "mixer/q/bias", "mixer/decay/base", several):
        assert f"stacks/0/{vector}" in path_leaves(params).keys() - moved
    np.testing.assert_allclose(path_leaves(updates)["head/kernel"], -1e-2 * 0.5, rtol=1e-5)


def start_parts(mixer: str):
    student_cfg, _, teacher, mixers = make_pair(mixer)
    return student_cfg, teacher, mixers


def test_adafactor_scales_every_layer_by_itself():
    """A step as the paper has it in float64, layer by layer, although the layers are one array."""
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(2, 130, 150)) * np.array([1.0, 100.0])[:, None, None] * rng.lognormal(size=(2, 130, 1))
    params = {"stacks": [{"mlp": {"up": {"kernel": jnp.zeros((2, 130, 150))}}}]}
    stage = StageConfig(tokens=10**6, lr=1e-2, lr_final=1e-2, mixer_lr=1.0, warmup_steps=0)
    optimizer = make_optimizer(stage, Optim(name="adafactor", clip=0.0, beta1=0.0), STUDENTS["rwkv6"])
    state = optimizer.init(params)
    assert sum(leaf.size for path, leaf in path_leaves(state).items() if "/v" in path) == 2 * (130 + 150) + 1
    updates, _ = optimizer.update(jax.tree.map(lambda _: jnp.asarray(grads, jnp.float32), params), state, params)
    for gradient, update in zip(grads, updates["stacks"][0]["mlp"]["up"]["kernel"], strict=True):
        squares = gradient**2
        second = squares.mean(1, keepdims=True) * squares.mean(0, keepdims=True) / squares.mean()
        wanted = gradient / np.sqrt(second)
        wanted /= max(1.0, np.sqrt(np.mean(wanted**2)))
        np.testing.assert_allclose(update, -1e-2 * wanted, rtol=1e-4, atol=1e-7)


def test_frozen_paths_are_not_in_the_optimizer():
    student_cfg, _, teacher, mixers = make_pair("rwkv7")
    student = whole_student(student_cfg, teacher, mixers)
    params, frozen = split_params(student, lambda path: "mlp" not in path)
    assert all("mlp" in path for path in path_leaves(frozen))
    assert not any("mlp" in path for path in path_leaves(TrainState.create(params, optimizer_of(student_cfg))))
    merged = merge_params(params, frozen)
    assert path_leaves(merged).keys() == path_leaves(student).keys()
    with pytest.raises(ValueError, match=r"parameter '\w+' .*\bboth\b"):
        merge_params(student, frozen)


def test_a_tied_teacher_is_untied(pair):
    student_cfg, _, teacher, mixers = pair
    student = whole_student(student_cfg, teacher, mixers)
    assert "head" not in teacher
    np.testing.assert_array_equal(student["head"]["kernel"], teacher["embed"]["embedding"].T)
    assert path_leaves(student).keys() == path_leaves(abstract_params(student_cfg)).keys()


def test_fresh_projections():
    student = STUDENTS["rwkv6"]
    teacher = random_params(TEACHER)
    copied, fresh = (init_mixers(student, teacher, 1, fresh_qkvo=f)["stacks"][0]["mixer"] for f in (False, True))
    np.testing.assert_array_equal(copied["q"]["kernel"], teacher["stacks"][0]["mixer"]["q"]["kernel"])
    bound = 0.5 * 32**-0.5
    assert not np.any(fresh["o"]["kernel"]) and 0.9 * bound < np.abs(fresh["q"]["kernel"]).max() <= bound


def test_a_query_head_may_begin_with_its_kv_heads_copy():
    """Heads are cloned, not their rows."""
    student, teacher = student_of(TEACHER, "gdn", kv_heads="cloned"), random_params(TEACHER)
    mixer = init_mixers(student, teacher, 1)["stacks"][0]["mixer"]
    own = teacher["stacks"][0]["mixer"]["v"]["kernel"].reshape(4, 32, TEACHER.num_kv_heads, TEACHER.head_dim)
    cloned = mixer["v"]["kernel"].reshape(4, 32, TEACHER.num_heads, TEACHER.head_dim)
    for head in range(TEACHER.num_heads):
        np.testing.assert_array_equal(cloned[:, :, head], own[:, :, head * TEACHER.num_kv_heads // TEACHER.num_heads])


def test_quarter_cosine_schedule():
    stage = dataclasses.replace(RunConfig().stage1, tokens=32 * 512 * 1050)
    rate = learning_rates(stage)["rest"]
    assert stage.steps == 1050
    np.testing.assert_allclose(rate(0), 1e-5, rtol=1e-5)
    np.testing.assert_allclose(rate(25), 1e-3 * 0.505, rtol=1e-5)
    np.testing.assert_allclose(rate(50), 1e-3, rtol=1e-5)
    middle = 1e-5 + (1e-3 - 1e-5) * np.cos(np.pi / 4)  # half-way through the decay: 71%, where a half cosine has 50%
    np.testing.assert_allclose(rate(550), middle, rtol=1e-5)
    np.testing.assert_allclose(rate(1050), 1e-5, rtol=1e-3)


def test_stage_2a_decays_the_mixers_late():
    stage = dataclasses.replace(RunConfig().stage2a, tokens=32 * 4096 * 1000)
    rates = learning_rates(stage)
    np.testing.assert_allclose([rates["mixer"](s) for s in (100, 832, 876, 999)], [1e-4, 1e-4, 1e-5, 1e-5], rtol=1e-4)
    np.testing.assert_allclose([rates["rest"](s) for s in (100, 832, 876, 999)], 1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "steps"), [("stage1", 6104), ("stage2", 10173), ("stage2a", 4578), ("stage3", 64)])
def test_published_step_counts(name, steps):
    assert abs(RunConfig().stage(name).steps - steps) <= 1


def test_mixers_have_their_own_learning_rate():
    pair = make_pair("rwkv7")
    start = start_of("stage2", pair)
    after, _ = step_of("stage2", *pair[:2])(*start, make_batch())
    change = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), start[0].params, after.params)
    assert 0.8e-2 < change["stacks"][0]["mixer"]["q"]["kernel"] < 1.01e-2
    assert 0.8e-3 < change["stacks"][0]["mlp"]["up"]["kernel"] < 1.01e-3
