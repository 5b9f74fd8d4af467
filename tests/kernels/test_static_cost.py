"""The kernels and losses compiled for TPUs that are not there, which takes libtpu (extra tpu)."""

import importlib.util

import pytest

from pallas_kernels.measure import loss_forms, static_cost_tpu
from pallas_kernels.measure.static_profile import BACKWARD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (extra tpu)"),
]


@pytest.mark.parametrize("operation", ["wkv7", "wkv6", "gdn"])
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 128), ("float32", 64)])
def test_the_kernels_compile_for_every_tpu(operation, topology, dtype, size):
    """Forward and backward, kernels and nothing in their place."""
    request = {
        "operation": operation,
        "topology": topology,
        "implementation": "pallas_tpu",
        "direction": BACKWARD,
        "chunk_size": None,
        **vars(static_cost_tpu.Shape(1, 256, 2, size, dtype)),
    }
    profile = static_cost_tpu.compiled_in_child(request, "")
    assert profile is not None, "the compiler aborted"
    assert len(profile["kernels"]) >= 2
    assert all(0 < kernel["vmem"] <= 2**26 for kernel in profile["kernels"].values())


# How many arrays of logits a slice needs at once: the teacher's lie beside the student's.
HELD = {"cross_entropy": 1, "kl": 2, "topk_kl": 2}


def test_a_split_vocabulary_never_lies_whole_on_a_device():
    """Of four devices each has a quarter of one slice's logits at a time, where the plain form has all tokens'."""
    size = loss_forms.Size(tokens=2048, vocab=152064, width=128)
    held = static_cost_tpu.compiled_in_child({"operation": "linear_loss", "topology": "v5e:2x2", **vars(size)}, "")
    assert held is not None, "the compiler aborted"
    one_slice = size.tokens // 2 * size.vocab // 4 * 4  # float32; by default these tokens are two slices
    assert set(held) == set(HELD)
    for loss, bytes_of in held.items():
        assert bytes_of["sliced"] < 1.1 * HELD[loss] * one_slice < bytes_of["plain"], (loss, bytes_of)
