"""What mixers do head by head: in lanes, as a TPU is given it, beside the form by reshapes; and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from untrained import TEACHER

from pallas_kernels import dispatch
from radlads_jax.models import heads, rope, sharding
from radlads_jax.models.layers import RMSNorm, repeat_kv, split_heads

BATCH, LENGTH, GROUPS, HEADS, SIZE = 2, 8, 2, 4, 8


def _inputs(turned: int):
    rng = np.random.default_rng(0)
    wide, narrow = (jnp.asarray(rng.standard_normal((BATCH, LENGTH, n * SIZE)), jnp.float32) for n in (HEADS, GROUPS))
    angles = jnp.asarray(rng.uniform(0, 6, (BATCH, LENGTH, 1, turned // 2)), jnp.float32)
    return wide.at[0, 0].set(0), narrow, jnp.cos(angles), jnp.sin(angles)


def _norm() -> RMSNorm:
    norm = RMSNorm(SIZE, TEACHER)
    norm.scale = nnx.Param(jnp.linspace(0.5, 2, SIZE))
    return norm


@pytest.fixture(params=["cpu", "tpu"])
def form(request):
    with dispatch.traced_for(request.param):
        yield request.param


@pytest.mark.parametrize("turned", [SIZE, SIZE // 2])
def test_equal_to_the_operations_on_heads(form, turned):
    wide, narrow, cos, sin = _inputs(turned)
    by_head = split_heads(wide, HEADS)
    want = {
        "repeat": repeat_kv(split_heads(narrow, GROUPS), HEADS),
        "rotate": rope.rotate(by_head, cos, sin),
        "unit": by_head / jnp.maximum(jnp.linalg.norm(by_head, axis=-1, keepdims=True), 1e-12),
        "normed": _norm()(by_head),
    }
    got = {
        "repeat": heads.repeat(narrow, SIZE, HEADS),
        "rotate": heads.rotate(wide, SIZE, cos, sin),
        "unit": heads.unit(wide, SIZE),
        "normed": heads.normed(wide, _norm()),
    }
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name].reshape(value.shape), rtol=2e-6, atol=2e-6, err_msg=name)


def test_equal_gradients():
    """Of the form in lanes and the one by reshapes, through all of them."""
    wide, narrow, cos, sin = _inputs(SIZE)

    def loss(wide, narrow):
        k = heads.rotate(heads.repeat(narrow, SIZE, HEADS), SIZE, cos, sin)
        return jnp.sum(jnp.tanh(heads.unit(wide + k, SIZE)) * heads.normed(wide, _norm()))

    gradients = {}
    for name in ("cpu", "tpu"):
        with dispatch.traced_for(name):
            gradients[name] = jax.grad(loss, argnums=(0, 1))(wide + 0.1, narrow)
    for lanes, reshaped in zip(gradients["tpu"], gradients["cpu"], strict=True):
        np.testing.assert_allclose(lanes, reshaped, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tensor", "context"), [(2, 2), (4, 1), (8, 1)])
def test_over_devices(form, tensor, context):
    """Heads over tensor where it divides them (2 kv heads over 4 devices it does not), positions over context."""
    wide, narrow, cos, sin = _inputs(SIZE)

    def run(wide, narrow):
        k = heads.rotate(heads.repeat(narrow, SIZE, HEADS), SIZE, cos, sin)
        return heads.unit(heads.by_heads(wide, SIZE), SIZE) + heads.by_heads(k, SIZE) + heads.normed(wide, _norm())

    devices = np.array(jax.devices()[: tensor * context]).reshape(1, 1, tensor, context)
    mesh = jax.sharding.Mesh(devices, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    want = run(wide, narrow)
    placed = jax.device_put((wide, narrow), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    with sharding.traced_over(mesh):
        got = jax.jit(run)(*placed)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
