"""Products that a CPU takes in another form are the same products, with the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import traced_for
from pallas_kernels.shared.products import kernel_gradient, product
from radlads_jax.models.layers import matmul

_SHAPES = [((2, 5, 24), (24, 40)), ((37, 8), (8, 8)), ((1, 1, 16), (16, 3))]


@pytest.mark.parametrize("x_shape, kernel_shape", _SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2**-8), (jnp.float32, 1e-6)])
def test_products_and_gradients_beside_float64(x_shape, kernel_shape, dtype, tolerance):
    """bfloat16: float64's of the same numbers, to a unit in the last place of sums of such numbers."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (x_shape, kernel_shape))
    d_out = jnp.asarray(rng.normal(size=(*x_shape[:-1], kernel_shape[-1])), dtype)
    wide_x, wide_kernel, wide_out = (np.asarray(each, np.float64) for each in (x, kernel, d_out))

    @jax.jit
    def both(x, kernel, d_out):
        out, back = jax.vjp(matmul, x, kernel)
        return out, *back(d_out)

    got = both(x, kernel, d_out)
    wanted = (
        wide_x @ wide_kernel,
        wide_out @ wide_kernel.T,
        wide_x.reshape(-1, x_shape[-1]).T @ wide_out.reshape(-1, kernel_shape[-1]),
    )
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=tolerance, atol=tolerance)
    sums = kernel_gradient(x, d_out, jnp.float32)
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, wanted[2], rtol=1e-5, atol=1e-5)


def _products(backend):
    """What a bfloat16 projection and its kernel's gradient sum into, traced for a backend."""
    x, kernel = jnp.ones((2, 5, 24), jnp.bfloat16), jnp.ones((24, 40), jnp.bfloat16)

    def gradients(x, kernel):
        return product(x, kernel), kernel_gradient(x, product(x, kernel), jnp.bfloat16)

    with traced_for(backend):
        jaxpr = jax.make_jaxpr(gradients)(x, kernel)
    return [str(each.params["preferred_element_type"]) for each in jaxpr.eqns if each.primitive.name == "dot_general"]


def test_only_a_cpu_sums_bfloat16_into_float32_results():
    """On a CPU XLA has no other fast code; on an accelerator such results would travel between devices as float32."""
    assert set(_products("cpu")) == {"float32"}
    assert set(_products("tpu")) == {"bfloat16"}


def test_under_vmap():
    x, kernel = jnp.ones((3, 4, 8), jnp.bfloat16), jnp.ones((8, 2), jnp.bfloat16)
    gradient = jax.grad(lambda kernel, x: jnp.sum(matmul(x, kernel).astype(jnp.float32)))
    np.testing.assert_array_equal(jax.vmap(gradient, (None, 0))(kernel, x), jnp.full((3, 8, 2), 4, jnp.bfloat16))
