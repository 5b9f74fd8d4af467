"""Adafactor: where its state, which has other shapes than the parameters, lies on a mesh, and that it trains there."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import abstract_mesh, make_batch, run_of
from untrained import random_params, student_of

from radlads_jax.config import Mesh, Optim, RunConfig
from radlads_jax.distill import mesh as mesh_lib
from radlads_jax.distill.optim import make_optimizer
from radlads_jax.distill.program import StagePlan, abstract_state, create_state, make_step
from radlads_jax.models import ModelConfig, abstract_params, sharding
from radlads_jax.models.placement import shardings
from radlads_jax.models.tree import path_leaves, split_params

# Matrices of 128 x 128 and more, which are factored, beside smaller ones.
WIDE = ModelConfig("qwen2", 64, 128, 256, 4, 4, 32, (("attention", 2),), qkv_bias=True, tie_embeddings=True)
SKETCHES = ((), (1,), (2, 128), (2, 128, 256))


def adafactor(run: RunConfig, **fields) -> RunConfig:
    return dataclasses.replace(run, optim=Optim(name="adafactor", **fields))


@pytest.mark.parametrize("mixer", ["rad_rwkv6", "rad_rwkv7"])
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_factored_state_lies_whole_and_the_rest_as_its_parameters(mixer, shape):
    mesh = abstract_mesh(**shape)
    run = adafactor(dataclasses.replace(RunConfig(), stages=("stage2",)))
    state = path_leaves(abstract_state(StagePlan(run, "stage2", student_of(WIDE, mixer), WIDE, mesh)))
    params = {path.removeprefix("params/"): leaf for path, leaf in state.items() if path.startswith("params/")}
    factored = 0
    for path, leaf in state.items():
        moment = re.match(r"opt_state/.*?/(v_row|v_col|v|ema)/(.+)$", path)
        if moment and leaf.shape == params[moment[2]].shape:
            assert leaf.sharding.spec == params[moment[2]].sharding.spec, path
        elif moment:
            factored += moment[1] in ("v_row", "v_col") and leaf.shape != (1,)
            assert not any(leaf.sharding.spec) and leaf.size <= 2 * 2 * 128, path
    assert factored >= 2 * 7, "rows and columns of the MLP and the projections"
    moments = sum(leaf.size for path, leaf in state.items() if re.match(r"opt_state/\d+/v", path))
    assert moments < 0.25 * sum(leaf.size for leaf in params.values())


def test_a_state_of_another_shape_does_not_trip_over_rules():
    """A sketch with dimensions of its own under a parameter's path, as other optimizers keep one."""
    mesh, cfg = abstract_mesh(data=2, fsdp=2, tensor=2), dataclasses.replace(WIDE, stacks=(("attention", 1),) * 4)
    tree = {"stacks": [{"mlp": {"up": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}} for shape in SKETCHES]}
    specs = [leaf.spec for leaf in jax.tree.leaves(shardings(mesh, tree, cfg))]
    assert [tuple(spec) for spec in specs] == [(), (None,), (None, None), (None, "fsdp", "tensor")]


def test_adafactor_updates_on_eight_devices_as_on_one():
    run, params = adafactor(run_of("pretrain", Mesh(fsdp=4, tensor=2))), random_params(WIDE, 0.1)
    params, _ = split_params(params, lambda path: path.endswith(("up/kernel", "q/bias")))
    optimizer, mesh = make_optimizer(run.pretrain, run.optim, WIDE), mesh_lib.make_mesh(run)
    grads = jax.tree.map(lambda x: x * jnp.arange(x.shape[-1]), params)
    expected, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    placed = shardings(mesh, (grads, jax.eval_shape(optimizer.init, params), params), WIDE)
    parts = jax.device_put((grads, optimizer.init(params), params), placed)
    many, _ = jax.jit(optimizer.update, out_shardings=placed[:2])(*parts)
    for path, update in path_leaves(many).items():
        np.testing.assert_allclose(update, path_leaves(expected)[path], rtol=1e-3, atol=1e-7, err_msg=path)


def test_adafactor_trains_on_eight_devices():
    run = adafactor(run_of("pretrain", Mesh(fsdp=4, tensor=2)), moment_dtype="bfloat16")
    mesh = mesh_lib.make_mesh(run)
    params = jax.device_put(random_params(WIDE, 0.1), shardings(mesh, abstract_params(WIDE), WIDE))
    plan = StagePlan(run, "pretrain", WIDE, WIDE, mesh)
    state, step = create_state(plan, params), make_step(plan)
    losses = []
    for _ in range(4):
        state, metrics = step(state, {}, None, sharding.place_rows(mesh, make_batch(8), 8))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.97 * losses[0]
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {8}
