"""The kernels of GPUs on a GPU, against the float64 loop and formula: JAX_PLATFORMS=cuda pytest -m gpu."""

import gpu_kernels
import jax
import pytest

from pallas_kernels import dispatch
from pallas_kernels.testing import TOLERANCE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("operation", gpu_kernels.OPERATIONS)
def test_the_kernels_are_what_runs(operation):
    """Nothing that follows is of another implementation."""
    assert jax.default_backend() == "gpu" and dispatch.fits("triton_gpu", (64, 128))
    inputs = gpu_kernels.inputs_of(operation, (1, 64, 1, 64), "bfloat16")
    text = jax.jit(gpu_kernels.OPERATIONS[operation]).lower(**inputs).as_text()
    assert "triton" in text.lower()


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", gpu_kernels.DTYPES)
@pytest.mark.parametrize("operation", gpu_kernels.OPERATIONS)
def test_recurrences(operation, dtype, size):
    for name in gpu_kernels.implementations():
        errors = gpu_kernels.errors(operation, name, dtype, size, length=150)
        assert all(error < TOLERANCE[dtype] for error in errors.values()), (name, errors)


@pytest.mark.parametrize("dtype", gpu_kernels.DTYPES)
@pytest.mark.parametrize("loss", gpu_kernels.LOSSES)
def test_losses(loss, dtype):
    errors = gpu_kernels.loss_errors(loss, dtype)
    assert all(error < gpu_kernels.LOSS_TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("size", [64, 128])
def test_attention(size, documents):
    for name in gpu_kernels.implementations("cudnn"):
        errors = gpu_kernels.attention_errors(name, size, 256, documents)
        assert all(error < TOLERANCE["bfloat16"] for error in errors.values()), (name, errors)
