"""linear_loss against the plain formulas in float64."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.linear_loss import linear_cross_entropy, linear_kl, linear_stats, linear_topk_kl
from pallas_kernels.measure import loss_forms
from pallas_kernels.testing import TOLERANCE, rms_ratio

TOKENS, WIDTH, TEACHER_WIDTH, VOCAB = 37, 24, 16, 203


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def data() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    arrays = {
        "hidden": rng.standard_normal((TOKENS, WIDTH)).astype(np.float32),
        "kernel": rng.standard_normal((WIDTH, VOCAB)).astype(np.float32),
        "teacher_hidden": rng.standard_normal((TOKENS, TEACHER_WIDTH)).astype(np.float32),
        "teacher_kernel": rng.standard_normal((TEACHER_WIDTH, VOCAB)).astype(np.float32),
        "targets": rng.integers(0, VOCAB, TOKENS).astype(np.int32),
        "weights": (rng.random(TOKENS) * (rng.random(TOKENS) < 0.7)).astype(np.float32),
    }
    return {name: jnp.asarray(value) for name, value in arrays.items()}


@pytest.fixture
def no_shape_annotations() -> Iterator[None]:
    """Turns the annotations' checks off, so that the function's own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def expected(data: dict[str, jax.Array], loss: str) -> dict[str, np.ndarray]:
    """Value and gradients of the plain formula, float64."""
    x = {name: np.asarray(value, np.float64) for name, value in data.items() if name != "targets"}
    log_q = log_softmax(x["hidden"] @ x["kernel"])
    if loss == "cross_entropy":
        p = np.eye(VOCAB)[data["targets"]]
        losses = -(p * log_q).sum(-1)
    else:
        log_p = log_softmax(x["teacher_hidden"] @ x["teacher_kernel"])
        p = np.exp(log_p)
        losses = (p * (log_p - log_q)).sum(-1)
    d_logits = (np.exp(log_q) - p) * x["weights"][:, None]
    return {
        "value": (losses * x["weights"]).sum(),
        "hidden": d_logits @ x["kernel"].T,
        "kernel": x["hidden"].T @ d_logits,
        "weights": losses,
    }


def lay(kernel: jax.Array, layout: str) -> jax.Array:
    return kernel if layout == "dv" else kernel.T


def loss_function(data: dict[str, jax.Array], loss: str, layout: str, teacher_layout: str, slice_tokens: int | None):
    def run(hidden, kernel, weights):
        if loss == "cross_entropy":
            return linear_cross_entropy(
                hidden, kernel, data["targets"], weights, slice_tokens=slice_tokens, kernel_layout=layout
            )
        return linear_kl(
            hidden,
            kernel,
            jnp.asarray(data["teacher_hidden"], hidden.dtype),
            lay(data["teacher_kernel"], teacher_layout).astype(hidden.dtype),
            weights,
            slice_tokens=slice_tokens,
            kernel_layout=layout,
            teacher_kernel_layout=teacher_layout,
        )

    return run


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
@pytest.mark.parametrize(
    ("layout", "teacher_layout", "slice_tokens"),
    [("dv", "dv", None), ("dv", "vd", 8), ("vd", "dv", 37), ("vd", "vd", 1), ("dv", "dv", 1000)],
)
def test_value_and_gradients(data, loss, layout, teacher_layout, slice_tokens):
    want = expected(data, loss)
    run = loss_function(data, loss, layout, teacher_layout, slice_tokens)
    args = (jnp.asarray(data["hidden"]), lay(data["kernel"], layout), jnp.asarray(data["weights"]))
    assert rms_ratio(jax.jit(run)(*args), want["value"]) < TOLERANCE["float32"]

    def scaled(*args):
        return 3.0 * run(*args)

    value, (d_hidden, d_kernel, d_weights) = jax.jit(jax.value_and_grad(scaled, argnums=(0, 1, 2)))(*args)
    assert rms_ratio(value, 3 * want["value"]) < TOLERANCE["float32"]
    assert rms_ratio(d_hidden, 3 * want["hidden"]) < TOLERANCE["float32"]
    assert rms_ratio(lay(d_kernel, layout), 3 * want["kernel"]) < TOLERANCE["float32"]
    assert rms_ratio(d_weights, 3 * want["weights"]) < TOLERANCE["float32"]
    assert not np.asarray(d_hidden)[np.asarray(data["weights"]) == 0].any()


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_bfloat16_with_float32_kernel(data, loss):
    """Products in bfloat16; a float32 kernel gets its gradient in float32."""
    rounded = dict(data)
    for name in ("hidden", "kernel", "teacher_hidden", "teacher_kernel"):
        rounded[name] = data[name].astype(jnp.bfloat16).astype(jnp.float32)
    want = expected(rounded, loss)
    run = loss_function(rounded, loss, "dv", "dv", 16)
    args = (jnp.asarray(data["hidden"], jnp.bfloat16), jnp.asarray(rounded["kernel"]), jnp.asarray(data["weights"]))
    value, (d_hidden, d_kernel) = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(*args)
    assert (value.dtype, d_hidden.dtype, d_kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert rms_ratio(value, want["value"]) < TOLERANCE["float32"]
    assert rms_ratio(d_hidden, want["hidden"]) < TOLERANCE["bfloat16"]
    assert rms_ratio(d_kernel, want["kernel"]) < TOLERANCE["bfloat16"]


def test_large_logits_stay_finite(data):
    """Logits of thousands neither overflow nor lose the loss."""
    big = dict(data, hidden=data["hidden"] * 300)
    want = expected(big, "cross_entropy")
    run = loss_function(big, "cross_entropy", "dv", "dv", 8)
    args = (jnp.asarray(big["hidden"]), jnp.asarray(big["kernel"]), jnp.asarray(big["weights"]))
    assert rms_ratio(run(*args), want["value"]) < TOLERANCE["float32"]
    assert np.isfinite(np.asarray(jax.grad(run, argnums=1)(*args))).all()


@pytest.mark.parametrize("gradients", [False, True])
def test_logits_exist_for_one_slice_only(gradients):
    """No array of the compiled program is as large as all tokens' logits."""
    tokens, width, vocab, size = 512, 8, 4096, 64
    shapes = [(tokens, width), (width, vocab), (tokens, width), (width, vocab), (tokens,)]

    def run(*args):
        return linear_kl(*args, slice_tokens=size)

    function = jax.value_and_grad(run, argnums=(0, 1)) if gradients else run
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 5 * size * vocab * 4 < tokens * vocab * 4


def test_teacher_gets_no_gradient(data):
    def run(teacher):
        return linear_kl(data["hidden"], data["kernel"], teacher, data["teacher_kernel"], data["weights"])

    assert not np.asarray(jax.grad(run)(jnp.asarray(data["teacher_hidden"]))).any()


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("slice_tokens", [None, 8])
def test_stats(data, with_teacher, slice_tokens):
    x = {name: np.asarray(value, np.float64) for name, value in data.items() if name != "targets"}
    log_q = log_softmax(x["hidden"] @ x["kernel"])
    log_p = log_softmax(x["teacher_hidden"] @ x["teacher_kernel"])
    rows = np.arange(TOKENS)
    want = {"loss": -log_q[rows, data["targets"]], "top1": log_q.argmax(-1) == data["targets"]}
    if with_teacher:
        want["kl"] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        want["agreement"] = log_q.argmax(-1) == log_p.argmax(-1)
        want["teacher_loss"] = -log_p[rows, data["targets"]]
        want["teacher_top1"] = log_p.argmax(-1) == data["targets"]
    teacher = (data["teacher_hidden"], data["teacher_kernel"]) if with_teacher else ()
    got = linear_stats(
        data["hidden"], data["kernel"], data["targets"], data["weights"], *teacher, slice_tokens=slice_tokens
    )
    assert set(got) == set(want)
    for name, per_token in want.items():
        np.testing.assert_allclose(got[name], (per_token * x["weights"]).sum(), rtol=1e-6, atol=1e-6, err_msg=name)


def test_top1_and_agreement_count(data):
    """Targets taken from the student's own argmax: every weight counts."""
    targets = (data["hidden"] @ data["kernel"]).argmax(-1)
    same = (data["hidden"], data["kernel"])
    got = linear_stats(*same, targets, data["weights"], *same)
    for name in ("top1", "agreement", "teacher_top1"):
        np.testing.assert_allclose(got[name], data["weights"].sum(), rtol=1e-6)
    assert abs(float(got["kl"])) < 1e-5


def test_bad_arguments_are_refused(data, no_shape_annotations):
    hidden, kernel, targets, weights = (data[name] for name in ("hidden", "kernel", "targets", "weights"))
    with pytest.raises(ValueError, match="layout 'vd'"):
        linear_cross_entropy(hidden, kernel, targets, weights, kernel_layout="vd")
    with pytest.raises(ValueError, match=rf"\bweights\b.*\({TOKENS},\).*\(5,\)"):
        linear_cross_entropy(hidden[:5], kernel, targets[:5], weights)
    with pytest.raises(ValueError, match=r"slice_tokens.*\b0\b"):
        linear_cross_entropy(hidden, kernel, targets, weights, slice_tokens=0)
    with pytest.raises(ValueError, match=rf"\b{VOCAB}\b.*\b{VOCAB - 1}\b"):
        linear_kl(hidden, kernel, hidden, kernel[:, :-1], weights)
    for options in ({"temperature": 0.0}, {"temperature": float("nan")}, {"top_k": VOCAB + 1}, {"top_k": -1}):
        with pytest.raises(ValueError, match=rf"temperature .*top_k .*\b{VOCAB}\b"):
            linear_kl(hidden, kernel, hidden, kernel, weights, **options)
    with pytest.raises(ValueError, match="teacher_indices"):
        linear_topk_kl(hidden, kernel, jnp.zeros((TOKENS, 3)), jnp.zeros((TOKENS, 2), jnp.int32), weights)
    with pytest.raises(ValueError, match="teacher_hidden and teacher_kernel"):
        linear_stats(hidden, kernel, targets, weights, hidden)


def stored(data: dict[str, jax.Array], k: int) -> tuple[jax.Array, jax.Array]:
    """The teacher's k likeliest tokens at each position: their log-probabilities and indices."""
    log_p = log_softmax(np.float64(data["teacher_hidden"]) @ np.float64(data["teacher_kernel"]))
    indices = np.argsort(-log_p, axis=-1)[:, :k].astype(np.int32)
    return jnp.asarray(np.take_along_axis(log_p, indices, -1), jnp.float32), jnp.asarray(indices)


def expected_topk(data: dict[str, jax.Array], log_probs: jax.Array, indices: jax.Array) -> dict[str, np.ndarray]:
    """KL of distributions over the known tokens and one for all others, row by row in float64, and its gradients."""
    x = {name: np.asarray(value, np.float64) for name, value in data.items() if name != "targets"}
    q = np.exp(log_softmax(x["hidden"] @ x["kernel"]))
    losses, d_logits = np.zeros(TOKENS), np.zeros_like(q)
    for n in range(TOKENS):
        there = np.isfinite(np.asarray(log_probs[n]))
        columns, p = np.asarray(indices[n])[there], np.exp(np.float64(log_probs[n]))[there]
        others = np.delete(np.arange(VOCAB), columns)
        losses[n] = (p * np.log(p / q[n, columns])).sum()
        d_logits[n, columns] = q[n, columns] - p
        if len(others):
            p_others, q_others = 1 - p.sum(), q[n, others].sum()
            losses[n] += p_others * np.log(p_others / q_others)
            d_logits[n, others] = q[n, others] * (1 - p_others / q_others)
    d_logits *= x["weights"][:, None]
    return {
        "value": (losses * x["weights"]).sum(),
        "hidden": d_logits @ x["kernel"].T,
        "kernel": x["hidden"].T @ d_logits,
        "weights": losses,
    }


@pytest.mark.parametrize(
    ("k", "layout", "slice_tokens"), [(1, "dv", None), (8, "vd", 8), (64, "dv", 37), (203, "dv", 8)]
)
def test_topk_value_and_gradients(data, k, layout, slice_tokens):
    log_probs, indices = stored(data, k)
    want = expected_topk(data, log_probs, indices)
    arguments = (data["hidden"], lay(data["kernel"], layout), data["weights"])

    def run(hidden, kernel, weights):
        options = {"slice_tokens": slice_tokens, "kernel_layout": layout}
        return linear_topk_kl(hidden, kernel, log_probs, indices, weights, **options)

    assert rms_ratio(jax.jit(run)(*arguments), want["value"]) < TOLERANCE["float32"]
    value, (d_hidden, d_kernel, d_weights) = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*arguments)
    assert rms_ratio(value, want["value"]) < TOLERANCE["float32"]
    assert rms_ratio(d_hidden, want["hidden"]) < TOLERANCE["float32"]
    assert rms_ratio(lay(d_kernel, layout), want["kernel"]) < TOLERANCE["float32"]
    assert rms_ratio(d_weights, want["weights"]) < TOLERANCE["float32"]
    assert not np.asarray(d_hidden)[np.asarray(data["weights"]) == 0].any()


def test_topk_grows_to_the_whole_kl(data):
    whole = linear_kl(data["hidden"], data["kernel"], data["teacher_hidden"], data["teacher_kernel"], data["weights"])
    values = [
        float(linear_topk_kl(data["hidden"], data["kernel"], *stored(data, k), data["weights"]))
        for k in (1, 4, 32, VOCAB)
    ]
    assert 0 < values[0] < values[1] < values[2] < values[3]
    np.testing.assert_allclose(values[-1], whole, rtol=1e-6)


@pytest.mark.parametrize(("temperature", "k"), [(2.0, 0), (0.5, 0), (1.0, 8), (3.0, 8)])
def test_a_softened_kl(data, temperature, k):
    """The formula at logits over the temperature, times its square; of the k likeliest tokens and all others as one."""
    softer = data | {name: data[name] / temperature for name in ("kernel", "teacher_kernel")}
    want = expected_topk(softer, *stored(softer, k)) if k else expected(softer, "kl")

    def run(hidden, kernel, weights):
        teacher = data["teacher_hidden"], data["teacher_kernel"]
        return linear_kl(hidden, kernel, *teacher, weights, temperature=temperature, top_k=k, slice_tokens=8)

    arguments = (data["hidden"], data["kernel"], data["weights"])
    value, gradients = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2)))(*arguments)
    assert rms_ratio(jax.jit(run)(*arguments), temperature**2 * want["value"]) < TOLERANCE["float32"]
    assert rms_ratio(value, temperature**2 * want["value"]) < TOLERANCE["float32"]
    # `expected` is of the kernel that was divided.
    powers = {"hidden": 2, "kernel": 1, "weights": 2}
    for (name, power), gradient in zip(powers.items(), gradients, strict=True):
        assert rms_ratio(gradient, temperature**power * want[name]) < TOLERANCE["float32"], name


def test_topk_is_least_at_the_teacher(data):
    """The teacher as its own student: no loss and no gradient, whatever k is."""
    kernel = data["teacher_kernel"]

    def run(hidden):
        return linear_topk_kl(hidden, kernel, *stored(data, 4), jnp.ones(TOKENS))

    value, d_hidden = jax.value_and_grad(run)(data["teacher_hidden"])
    assert abs(float(value)) < 1e-5
    assert np.abs(d_hidden).max() < 1e-5


def test_topk_entries_that_are_not_there(data):
    """Rows that keep fewer than k fill up with -inf, at any index; other rows' values stay."""
    log_probs, indices = stored(data, 6)
    shorter = log_probs.at[::2, 3:].set(-jnp.inf)
    indices = indices.at[::2, 3:].set(indices[::2, :1])
    want = expected_topk(data, shorter, indices)

    def run(hidden, kernel):
        return linear_topk_kl(hidden, kernel, shorter, indices, data["weights"], slice_tokens=8)

    value, (d_hidden, d_kernel) = jax.value_and_grad(run, argnums=(0, 1))(data["hidden"], data["kernel"])
    assert rms_ratio(value, want["value"]) < TOLERANCE["float32"]
    assert rms_ratio(d_hidden, want["hidden"]) < TOLERANCE["float32"]
    assert rms_ratio(d_kernel, want["kernel"]) < TOLERANCE["float32"]


def test_topk_of_a_student_that_denies_the_rest(data):
    """Where the student leaves e^-200 for all unknown tokens, float32 could not tell 1 - sum of the known from 0."""
    kernel = np.zeros((2, VOCAB), np.float32)
    kernel[0, :4] = 200.0
    hidden = jnp.ones((TOKENS, 2))
    log_probs = jnp.full((TOKENS, 4), np.log(0.2), jnp.float32)
    indices = jnp.tile(jnp.arange(4), (TOKENS, 1))
    run = functools.partial(linear_topk_kl, hidden, teacher_log_probs=log_probs, teacher_indices=indices)
    value, d_kernel = jax.value_and_grad(run)(jnp.asarray(kernel), weights=jnp.ones(TOKENS))
    log_rest = np.log((VOCAB - 4) / 4) - 200
    want = 0.8 * np.log(0.2 / 0.25) + 0.2 * (np.log(0.2) - log_rest)
    np.testing.assert_allclose(value / TOKENS, want, rtol=1e-6)
    np.testing.assert_allclose(d_kernel[0, 4:].sum() / TOKENS, -0.2, rtol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "topk"])
def test_a_vocabulary_split_over_devices(data, loss):
    """Tokens over fsdp, an uneven vocabulary over tensor: one device's numbers, and no device with all columns."""
    log_probs, indices = stored(data, 8)
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(1, 2, 4, 1),
        ("data", "fsdp", "tensor", "context"),
        axis_types=(AxisType.Auto,) * 4,
    )

    def run(hidden, kernel):
        if loss == "topk":
            return linear_topk_kl(hidden, kernel, log_probs, indices, data["weights"], slice_tokens=16)
        teacher = (data["teacher_hidden"], data["teacher_kernel"])
        return linear_kl(hidden, kernel, *teacher, data["weights"], slice_tokens=16)

    want, gradients = jax.value_and_grad(run, argnums=(0, 1))(data["hidden"], data["kernel"])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        arguments = jax.device_put((data["hidden"], data["kernel"]), NamedSharding(mesh, PartitionSpec()))
        program = jax.jit(jax.value_and_grad(run, argnums=(0, 1))).lower(*arguments).compile()
    value, split_gradients = program(*arguments)
    assert rms_ratio(value, want) < TOLERANCE["float32"]
    for got, wanted in zip(split_gradients, gradients, strict=True):
        assert rms_ratio(got, wanted) < TOLERANCE["float32"]
    assert f"f32[16,{VOCAB}]" not in program.as_text()


@pytest.mark.parametrize("loss", loss_forms.LOSSES)
def test_the_form_measured_beside_it_is_the_same_loss(loss):
    size = loss_forms.Size(tokens=24, vocab=96, width=8, stored=4)
    arguments = loss_forms.arguments(loss, size, jnp.float32)
    sliced, plain = (loss_forms.value_and_gradients(loss, form)(arguments) for form in loss_forms.FORMS)
    for got, want in zip(jax.tree.leaves(sliced), jax.tree.leaves(plain), strict=True):
        assert rms_ratio(got, want) < TOLERANCE["float32_stress"]


def test_a_masked_target_may_lie_outside_the_vocabulary():
    rng = np.random.default_rng(3)
    hidden, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 8), (8, 16)))
    weights = jnp.asarray([1.0, 0.0, 1.0, 0.0])

    def value(targets):
        return jax.value_and_grad(lambda h: linear_cross_entropy(h, kernel, jnp.asarray(targets), weights))(hidden)

    for inside, outside in zip(value([3, 0, 5, 0]), value([3, -100, 5, 10**6]), strict=True):
        np.testing.assert_array_equal(inside, outside)
