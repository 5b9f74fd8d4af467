"""Matrix products in the forms that XLA's CPU compiler has fast code for.

There bfloat16 meets the CPU's matrix units (AMX) only in a product that sums into a float32 result and whose left
operand lies in memory as it is read, along its rows; every other one is computed as float32 is.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from pallas_kernels.dispatch import backend
from pallas_kernels.sharded import current_mesh


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel [..., D] [D, d] -> [..., d], in their dtype."""
    if not _has_fast_form(x):
        return x @ kernel
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


def kernel_gradient(x: jax.Array, d_out: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x^T d_out [..., D] [..., d] -> [D, d], in this dtype: the gradient of `product` in its kernel."""
    # A mesh may split rows and tokens, which one dimension of both would gather.
    if not _has_fast_form(x) or current_mesh() is not None:
        return jnp.einsum("...i,...o->io", x, d_out, preferred_element_type=dtype)
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    columns = with_layout_constraint(rows.T, Layout(major_to_minor=(0, 1)))
    return jnp.matmul(columns, d_rows, preferred_element_type=jnp.float32).astype(dtype)


def _has_fast_form(x: jax.Array) -> bool:
    return x.dtype == jnp.bfloat16 and backend() == "cpu"
