"""Sharding: every parameter has its place, and eight devices compute what one does."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from untrained import random_mixers, random_params, save_teacher, student_of

from pallas_kernels.linear_loss import linear_kl
from pallas_kernels.sharded import fitting_spec, per_shard
from radlads_jax.config import Mesh, Optim, RunConfig, StageConfig, Teacher, defaults, validate
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.program import StagePlan, abstract_state, create_state, make_step
from radlads_jax.distill.stages import STAGES
from radlads_jax.models import ModelConfig, abstract_params, sharding
from radlads_jax.models.attention import Context, softmax_attention
from radlads_jax.models.placement import param_axes, shardings
from radlads_jax.models.tensors import tensor_of
from radlads_jax.models.tree import path_leaves, split_params
from radlads_jax.porting.load import load_params
from radlads_jax.porting.save import save_params
from radlads_jax.porting.student import init_mixers, whole_student
from radlads_jax.reporting.metrics_file import read_metrics
from radlads_jax.run import train
from radlads_jax.run.checkpoint import Checkpoints
from radlads_jax.run.job import make_job
from radlads_jax.run.metrics import MetricsLogger

TEACHER = ModelConfig("qwen2", 64, 32, 64, 4, 2, 8, (("attention", 2),), qkv_bias=True, tie_embeddings=True)
LARGE = ModelConfig("qwen2", 152064, 8192, 29568, 64, 8, 128, (("attention", 80),), qkv_bias=True)
# Every parameter kind of every family: biases, per-head norms, tied and own heads.
TEACHERS = {
    "qwen2": TEACHER,
    "qwen3": dataclasses.replace(TEACHER, family="qwen3", qkv_bias=False, qk_norm=True, tie_embeddings=False),
    "llama": dataclasses.replace(TEACHER, family="llama", qkv_bias=True, o_bias=True),
    "mistral": dataclasses.replace(TEACHER, family="mistral", qkv_bias=False, tie_embeddings=False),
}
SWITCHES = (
    {},
    {"gate": "full", "group_norm": True, "balance_state": False},
    {"gate": "low_rank", "token_shift": False},
    {"gate": "none"},
)
ROUND_MESHES = [Mesh(fsdp=8), Mesh(data=2, fsdp=2, tensor=2), Mesh(data=2, fsdp=1, context=4)]


def every_model() -> list[ModelConfig]:
    students = [
        student_of(teacher, mixer, layers, **switches)
        for mixer in ("rad_rwkv6", "rad_rwkv7")
        for teacher, layers, switches in zip(TEACHERS.values(), ((), (1,), (0,), ()), SWITCHES, strict=True)
    ]
    return [*TEACHERS.values(), *students]


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4)


def test_every_parameter_is_a_tensor_of_its_rank():
    for cfg in every_model():
        for path, leaf in path_leaves(abstract_params(cfg)).items():
            tensor = tensor_of(cfg, path)
            assert tensor is not None, path
            assert len(param_axes(cfg, path, leaf.ndim)) <= leaf.ndim, path
            assert param_axes(cfg, f"1/0/mu/{path}", leaf.ndim) == param_axes(cfg, path, leaf.ndim)
            # An optimizer's factored moment has a parameter's path and not its rank: it is nobody's.
            assert param_axes(cfg, path, leaf.ndim + 1) == ()


@pytest.mark.parametrize("path", ["step", "opt_state/0/count", "stacks/0/mixer/none/kernel"])
def test_what_is_no_parameter_lies_whole(path):
    assert tensor_of(TEACHER, path) is None
    assert param_axes(TEACHER, path, 1) == ()


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7", "gdn"])
def test_what_is_large_is_split_over_every_device(mixer):
    mesh = abstract_mesh(fsdp=32, tensor=4)
    for cfg in (LARGE, student_of(LARGE, mixer)):
        params = abstract_params(cfg)
        placed = path_leaves(shardings(mesh, params, cfg))
        total = 0
        for path, leaf in path_leaves(params).items():
            part = int(np.prod(placed[path].shard_shape(leaf.shape)))
            total += part
            # Vectors, of which the largest are biases, need not be split.
            assert leaf.size // part >= (128 if leaf.size > 10**7 else 1), (path, leaf.shape, placed[path].spec)
        whole = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert total < 1.01 * whole / 128


def test_the_optimizer_lies_as_its_parameters_do():
    run = dataclasses.replace(RunConfig(), stages=("stage2",))
    mesh = abstract_mesh(data=2, fsdp=2, tensor=2)
    state = path_leaves(abstract_state(StagePlan(run, "stage2", student_of(TEACHER, "rad_rwkv7"), TEACHER, mesh)))
    specs = {path.removeprefix("params/"): leaf.sharding.spec for path, leaf in state.items() if path[:6] == "params"}
    for moment in ("mu", "nu"):
        placed = {path.split(f"/{moment}/")[1]: x.sharding.spec for path, x in state.items() if f"/{moment}/" in path}
        assert placed == specs
    assert any("fsdp" in str(spec) and "tensor" in str(spec) for spec in specs.values())


def test_dimensions_that_do_not_divide_stay_whole():
    mesh = abstract_mesh(data=2, fsdp=4, tensor=3)
    assert tuple(fitting_spec(("fsdp", "tensor"), (8, 9), mesh)) == ("fsdp", "tensor")
    assert tuple(fitting_spec(("fsdp", "tensor"), (6, 8), mesh)) == (None, None)
    assert tuple(fitting_spec((("tensor", "fsdp"),), (12, 5), mesh)) == (("tensor", "fsdp"), None)
    assert tuple(fitting_spec((("tensor", "fsdp"),), (8,), mesh)) == ("fsdp",)


def run_of(name: str, mesh: Mesh, accumulate: int = 1, eps: float = 1e-8) -> RunConfig:
    rates = {"lr": 1e-3, "lr_final": 1e-3, "mixer_lr": 1e-3, "mixer_lr_final": 1e-3}
    size = {"batch_size": 8 * max(accumulate, 1), "seq_len": 16, "accumulate": accumulate}
    stage = StageConfig(tokens=10**6, warmup_steps=0, **rates, **size)
    teacher = Teacher(path="teacher", dtype="float32")
    more = {"optim": Optim(eps=eps), name: stage}
    return dataclasses.replace(RunConfig(), mesh=mesh, dtype="float32", teacher=teacher, stages=(name,), **more)


def make_batch(rows: int, length: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    segments = np.ones((rows, length), np.int32)
    segments[1, 9:], segments[2, 12:] = 2, 0
    mask = np.zeros((rows, length), np.float32)
    mask[:, :-1] = (segments[:, :-1] == segments[:, 1:]) & (segments[:, :-1] > 0)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[1, 9:] -= 9
    tokens = np.where(segments > 0, rng.integers(1, 64, (rows, length)), 0).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": mask}


def trained(mixer: str, name: str, shape: Mesh, accumulate: int = 1, steps: int = 2):
    """(mesh, losses, state) after some steps."""
    # Adam's first update is g / (|g| + eps): of gdn's gradients some are rounding alone, which is not to be a step.
    run = run_of(name, shape, accumulate, **({"eps": 1e-5} if mixer == "gdn" else {}))
    mesh = mesh_lib.make_mesh(run)
    student = student_of(TEACHER, mixer)
    teacher = TEACHER.as_teacher_of(student)
    start, mixers = random_params(teacher, 0.1), random_mixers(student, 0.1, seed=1)
    params = whole_student(student, start, mixers) if STAGES[name].whole_student else mixers
    plan = StagePlan(run, name, student, teacher, mesh)
    params, frozen = split_params(params, plan.trains)
    # Copies: the state is donated, and shares arrays with the teacher.
    params, start = jax.tree.map(jnp.array, (params, start))
    if mesh is not None:
        params = jax.device_put(params, shardings(mesh, params, student))
        start = jax.device_put(start, shardings(mesh, start, teacher))
    state = create_state(plan, params)
    step = make_step(plan)
    teacher_params = start if STAGES[name].needs_teacher else None
    losses = []
    for _ in range(steps):
        rows = run.stage(name).batch_size
        batch = sharding.place_rows(mesh, make_batch(rows), rows)
        state, metrics = step(state, frozen, teacher_params, batch)
        losses.append(float(metrics["loss"]))
    return mesh, losses, state


reference = functools.cache(trained)
QUICK = {("rad_rwkv7", "stage2", 1), ("rad_rwkv6", "stage1", 0), ("rad_rwkv6", "stage3", 2)}


@pytest.mark.parametrize(
    ("mixer", "name", "which"),
    [
        pytest.param(mixer, name, which, marks=[] if (mixer, name, which) in QUICK else pytest.mark.slow)
        for mixer in ("rad_rwkv6", "rad_rwkv7", "gdn")
        for name in ("stage1", "stage2", "stage2a", "stage3")
        for which in range(len(ROUND_MESHES))
    ],
)
def test_eight_devices_train_as_one_does(mixer, name, which):
    check_equal(mixer, name, ROUND_MESHES[which])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_eight_devices_train_as_one_does_with_fewer_kv_heads_than_tensor(name):
    check_equal("rad_rwkv7", name, Mesh(fsdp=2, tensor=4))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 0])
def test_eight_devices_train_as_one_does_in_parts(accumulate):
    check_equal("rad_rwkv6", "stage2", Mesh(data=2, fsdp=2, tensor=2), accumulate)


def check_equal(mixer: str, name: str, shape: Mesh, accumulate: int = 1) -> None:
    """Losses within 1e-5 relative; so are parameters and both moments of Adam, as ratios of norms."""
    _, losses, expected_state = reference(mixer, name, Mesh(fsdp=1), accumulate)
    mesh, got_losses, many = trained(mixer, name, shape, accumulate)
    np.testing.assert_allclose(got_losses, losses, rtol=1e-5)
    expected, got = path_leaves(expected_state), path_leaves(many)
    errors = {path: relative_error(got[path], expected[path]) for path in expected}
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]
    placed = path_leaves(shardings(mesh, many, student_of(TEACHER, mixer)))
    assert all(leaf.sharding.is_equivalent_to(placed[path], leaf.ndim) for path, leaf in got.items())


def relative_error(got, expected) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30))


def eight(**axes: int):
    mesh = mesh_lib.make_mesh(dataclasses.replace(RunConfig(), mesh=Mesh(**{"fsdp": 1} | axes), stages=()))
    assert mesh is not None
    return mesh


def over(mesh, function, *arrays):
    """The result of a function over a mesh, of arrays that every device has."""
    with sharding.traced_over(mesh):
        return jax.jit(function)(*jax.device_put(arrays, NamedSharding(mesh, PartitionSpec())))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_fewer_kv_heads_than_tensor(kv_heads):
    mesh = eight(fsdp=2, tensor=4)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 12, h, 8)), jnp.float32) for h in (4, kv_heads, kv_heads))
    segments = jnp.asarray(make_batch(4, 12)["segment_ids"])
    angles = jnp.zeros((4, 12, 1, 4))

    def attend(q, k, v):
        return softmax_attention(q, k, v, Context(angles, angles, segments))

    np.testing.assert_allclose(over(mesh, attend, q, k, v), attend(q, k, v), atol=1e-6)


@pytest.mark.parametrize("vocab", [64, 61])
def test_the_loss_splits_its_vocabulary(vocab):
    """No device holds a slice's logits whole, nor the kernel or its gradient in float32."""
    mesh = eight(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    hidden, other = (jnp.asarray(rng.standard_normal((160, 32)), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.standard_normal((32, vocab)), jnp.float32)

    def gradients(hidden, kernel):
        return jax.grad(lambda h, k: linear_kl(h, k, other, 1.1 * kernel, jnp.ones(160)), (0, 1))(hidden, kernel)

    expected = gradients(hidden, kernel)
    rows = sharding.rows_sharding(mesh, 160)
    stored = NamedSharding(mesh, fitting_spec(("fsdp", "tensor"), kernel.shape, mesh))
    with sharding.traced_over(mesh):
        placed = jax.jit(gradients, in_shardings=(rows, stored), out_shardings=(rows, stored))
        compiled = placed.lower(hidden, kernel).compile()
    outputs = compiled(jax.device_put(hidden, rows), jax.device_put(kernel, stored))
    for got, want in zip(outputs, expected, strict=True):
        assert relative_error(got, want) < 1e-5
    assert not re.search(rf"f32\[160,{vocab}\]", compiled.as_text())


def test_a_kernel_runs_on_each_devices_own_rows_and_heads():
    mesh = eight(data=2, fsdp=2, tensor=2)
    shapes = []

    def scale(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def op(x, state, rows):
        shapes.append((x.shape, state.shape, rows.shape))
        doubled = pl.pallas_call(scale, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)
        return doubled + rows[:, :, None, None], state + 1

    x, state, rows = jnp.arange(256.0).reshape(4, 8, 4, 2), jnp.ones((4, 4, 2, 2)), jnp.ones((4, 8))
    run = per_shard(op, ("sequence", "state", "rows"), ("sequence", "state"))
    expected = run(x, state, rows)
    for got, want in zip(over(mesh, run, x, state, rows), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert shapes == [((4, 8, 4, 2), (4, 4, 2, 2), (4, 8)), ((1, 8, 2, 2), (1, 2, 2, 2), (1, 8))]


def test_parameters_are_born_where_they_lie(tmp_path):
    mesh = eight(fsdp=4, tensor=2)
    base = {"model_type": "qwen2", "eos_token_id": 0, "bos_token_id": 0}
    params = random_params(TEACHER)
    save_params(params, TEACHER, tmp_path / "teacher", base_config=base)
    placed = shardings(mesh, params, TEACHER)
    loaded = load_params(tmp_path / "teacher", TEACHER, dtype="float32", shardings=placed)
    student = student_of(TEACHER, "rad_rwkv6")
    mixers = init_mixers(student, loaded, 1, mesh=mesh)
    whole = path_leaves(whole_student(student, loaded, mixers))
    wanted = path_leaves(shardings(mesh, abstract_params(student), student))
    assert all(leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim) for path, leaf in whole.items())
    for path, leaf in path_leaves(whole_student(student, params, init_mixers(student, params, 1))).items():
        np.testing.assert_allclose(whole[path], leaf, rtol=1e-5, atol=1e-7, err_msg=path)


def test_a_state_goes_from_eight_devices_to_one_and_back(tmp_path):
    student = student_of(TEACHER, "rad_rwkv7")
    on_eight, on_one = run_of("stage2", Mesh(fsdp=8)), run_of("stage2", Mesh(fsdp=1))
    mesh = mesh_lib.make_mesh(on_eight)
    params = jax.device_put(random_params(student), shardings(mesh, abstract_params(student), student))
    state = create_state(StagePlan(on_eight, "stage2", student, TEACHER, mesh), params)
    state = state._replace(step=state.step + 3, opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    for i, (run, target) in enumerate(((on_one, None), (on_eight, mesh))):
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            checkpoints.save(3, state, data_state={}, meta={}, wait=True)
            restored, _, _ = checkpoints.restore(3, abstract_state(StagePlan(run, "stage2", student, TEACHER, target)))
        devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)}
        assert devices == ({1} if target is None else {8})
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        state = restored


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(8, 1), (1, 8)])
def test_a_run_continues_on_other_devices(tmp_path, monkeypatch, first, then):
    def config(fsdp: int) -> ConfigDict:
        config = defaults()
        config.dtype = config.teacher.dtype = config.export.dtype = "float32"
        config.teacher.path = str(tmp_path / "model")
        config.data.source, config.data.documents, config.data.eval_rows = "synthetic", 60, 32
        config.train.log_every, config.train.checkpoint_every = 1, 2
        config.stages, config.mesh.fsdp = ("stage1", "stage2"), fsdp
        for name in config.stages:
            stage = config[name]
            stage.seq_len, stage.batch_size, stage.tokens, stage.warmup_steps = 32, 8, 32 * 8 * 4, 2
            stage.lr = stage.mixer_lr = 1e-3
        return config

    save_teacher(tmp_path, dataclasses.replace(TEACHER, vocab_size=320))
    whole = train.convert(make_job(validate(config(first)), tmp_path / "whole"))

    class Killed(Exception):
        pass

    log = MetricsLogger.log

    def log_and_die(self, name, at, values):
        log(self, name, at, values)
        if (name, at) == ("stage2", 3):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", log_and_die)
        with pytest.raises(Killed):
            train.convert(make_job(validate(config(first)), tmp_path / "parts"))
    parts = train.convert(make_job(validate(config(then)), tmp_path / "parts"))
    losses = [[(r["stage"], r["step"], r["loss"]) for r in read_metrics(tmp_path / d)] for d in ("whole", "parts")]
    assert [r[:2] for r in losses[0]] == [r[:2] for r in losses[1]] and len(losses[0]) == 8
    np.testing.assert_allclose([r[2] for r in losses[1]], [r[2] for r in losses[0]], rtol=1e-5)
    assert parts["student"]["loss"] == pytest.approx(whole["student"]["loss"], rel=1e-5)
