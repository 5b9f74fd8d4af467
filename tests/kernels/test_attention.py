"""Softmax attention beside its own definition in float64; the TPU's kernels are interpreted."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels.attention import api, attention
from pallas_kernels.dispatch import traced_for
from pallas_kernels.testing import TOLERANCE, attention_formula, rms_ratio

LENGTH = 300  # three blocks of queries, the last one smaller
WHOLE = 256  # what the TPU's kernels take of it


def value_and_gradients(attend, *inputs):
    def loss(*inputs):
        out = attend(*inputs)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    return out, *gradients


@pytest.fixture(scope="module", params=[(4, 2, 64), (2, 2, 128)], ids=["grouped", "128"])
def inputs(request):
    heads, kv_heads, size = request.param
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, LENGTH, count, size)) for count in (heads, kv_heads, kv_heads))
    # A document of 100 tokens, one of 90, padding; and a row that is one document.
    segment_ids = np.stack([np.repeat([1, 2, 0], [100, 90, LENGTH - 190]), np.ones(LENGTH, int)]).astype(np.int32)
    return (q, k, v), segment_ids


@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients(inputs, implementation, dtype):
    length = WHOLE if implementation == "pallas_tpu" else LENGTH
    arrays, segment_ids = [x[:, :length] for x in inputs[0]], inputs[1][:, :length]
    with jax.enable_x64(True):
        exact = tuple(jnp.asarray(jnp.asarray(x, dtype), jnp.float64) for x in arrays)
        expected = value_and_gradients(lambda q, k, v: attention_formula(q, k, v, segment_ids), *exact)

    def attend(q, k, v):
        return attention(q, k, v, segment_ids=jnp.asarray(segment_ids), implementation=implementation)

    got = value_and_gradients(attend, *(jnp.asarray(x, dtype) for x in arrays))
    for name, ours, exact in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert ours.dtype == dtype
        assert rms_ratio(ours, exact) < TOLERANCE[dtype], name


def test_rows_without_segments_are_one(inputs):
    arrays = [jnp.asarray(x[:, :WHOLE], jnp.float32) for x in inputs[0]]
    got = attention(*arrays, implementation="pallas_tpu")
    assert rms_ratio(got, attention(*arrays, segment_ids=jnp.ones((2, WHOLE), int))) < TOLERANCE["float32"]


@pytest.mark.parametrize(
    ("backend", "length", "size", "dtype", "expected"),
    [
        ("tpu", 2048, 64, "bfloat16", "pallas_tpu"),
        ("tpu", 4096, 128, "bfloat16", "pallas_tpu"),
        ("tpu", 1024, 64, "bfloat16", "chunked"),
        ("tpu", 2100, 64, "bfloat16", "chunked"),
        ("tpu", 2048, 80, "bfloat16", "chunked"),
        ("tpu", 2048, 64, "float32", "chunked"),
        ("gpu 9.0", 2048, 64, "bfloat16", "cudnn"),
        ("gpu 10.0", 4096, 128, "bfloat16", "cudnn"),
        ("gpu 8.0", 2048, 64, "bfloat16", "chunked"),
        ("gpu 9.0", 1024, 64, "bfloat16", "chunked"),
        ("gpu 9.0", 2048, 64, "float32", "chunked"),
        ("gpu gfx942", 2048, 64, "bfloat16", "chunked"),
        ("cpu", 2048, 64, "bfloat16", "chunked"),
    ],
)
def test_which_runs_where(monkeypatch, backend, length, size, dtype, expected):
    backend, _, capability = backend.partition(" ")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    ran = []
    stand_ins = {name: lambda q, *_, name=name: ran.append(name) or q for name in api.IMPLEMENTATIONS}
    monkeypatch.setattr(api, "IMPLEMENTATIONS", stand_ins)
    with traced_for(backend):
        attention(*(jnp.zeros((1, length, 1, size), dtype) for _ in range(3)))
    assert ran == [expected]


@pytest.mark.parametrize("segments", [True, False])
def test_cudnn_is_called_for_values_and_gradients(monkeypatch, segments):
    """As a program for a GPU is lowered, each device its own rows; what cuDNN gives can be seen on a GPU alone."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2))
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32) if segments else None

    def loss(q, k, v, ids):
        rows = jax.sharding.PartitionSpec("data")
        attend = functools.partial(attention, implementation="cudnn")
        sharded = jax.shard_map(
            lambda q, k, v, ids: attend(q, k, v, segment_ids=ids), mesh=mesh, in_specs=(rows,) * 4, out_specs=rows
        )
        return jnp.sum(sharded(q, k, v, ids).astype(jnp.float32))

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v, ids).lower(lowering_platforms=("cuda",)).as_text()
    kind = "ScaleBiasSoftmax" if segments else "Softmax"
    assert re.findall(r"@__cudnn\$fmha(\w+)", lowered) == [kind, f"{kind}Backward"]
    settings = lowered.replace("\\22", '"')
    assert set(re.findall(r'"mask_type": "(\w+)"', settings)) == {"CAUSAL"}
    assert set(re.findall(r'"fmha_scale": ([\d.]+)', settings)) == {"0.125"}


def test_a_row_that_is_no_whole_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match=r"200 positions.*128"):
        attention(*(jnp.zeros((1, 200, 1, 64)) for _ in range(3)), implementation="pallas_tpu")
