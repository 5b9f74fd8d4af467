"""The short convolution in front of gdn, against torch's conv1d and against itself in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.gdn import conv_over_shards, short_conv
from pallas_kernels.sharded import per_shard
from pallas_kernels.testing import TOLERANCE, rms_ratio

BATCH, LENGTH, CHANNELS, WIDTH = 2, 16, 8, 4
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 2 + [1] * 9, [3] * 16])  # the first id again, two tokens later


def arrays(length: int = LENGTH) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, kernel, state."""
    rng = np.random.default_rng(0)
    shapes = (BATCH, length, CHANNELS), (WIDTH, CHANNELS), (BATCH, WIDTH - 1, CHANNELS)
    x, kernel, state = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    return x, kernel, state


def test_equals_torch():
    """Outputs and gradients of conv1d as transformers calls it, padded on the left and cut."""
    x, kernel, _ = arrays()
    theirs = [torch.from_numpy(np.array(a)).requires_grad_() for a in (jnp.swapaxes(x, 1, 2), kernel.T)]
    padded = torch.nn.functional.conv1d(theirs[0], theirs[1][:, None], padding=WIDTH - 1, groups=CHANNELS)
    want = torch.nn.functional.silu(padded[..., :LENGTH])
    want.square().sum().backward()
    out = short_conv(x, kernel)[0]
    d_x, d_kernel = jax.grad(lambda x, kernel: jnp.sum(short_conv(x, kernel)[0] ** 2), (0, 1))(x, kernel)
    assert rms_ratio(out, want.detach().numpy().swapaxes(1, 2)) < TOLERANCE["float32"]
    assert rms_ratio(d_x, theirs[0].grad.numpy().swapaxes(1, 2)) < TOLERANCE["float32"]
    assert rms_ratio(d_kernel, theirs[1].grad.numpy().T) < TOLERANCE["float32"]


@pytest.mark.parametrize("cut", [1, 7])
def test_whole_equals_parts(cut):
    """A part shorter than the taps' reach too."""
    x, kernel, start = arrays()
    out, state = short_conv(x, kernel, initial_state=start)
    first, middle = short_conv(x[:, :cut], kernel, initial_state=start)
    second, last = short_conv(x[:, cut:], kernel, initial_state=middle)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), out, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(last, state)


@pytest.mark.parametrize("length", [6, 16])
def test_segments_equal_separate_sequences(length):
    """Where the last segment is shorter than the taps' reach, the state holds it alone."""
    x, kernel, start = arrays(length)
    out, state = short_conv(x, kernel, initial_state=start, segment_ids=SEGMENTS[:, :length])
    before: jax.Array | None = start[:1]
    for begin, end in ((0, 5), (5, 7), (7, 16)):
        if begin < length:
            part = x[:1, begin : min(end, length)]
            alone, last = short_conv(part, kernel, initial_state=before)
            np.testing.assert_allclose(out[:1, begin:end], alone, rtol=1e-6, atol=1e-6)
            before = None
    np.testing.assert_array_equal(state[:1], last)
    whole, final = short_conv(x[1:], kernel, initial_state=start[1:])
    np.testing.assert_allclose(out[1:], whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(state[1:], final)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_the_whole(dtype):
    """One token after the other, as decoding goes."""
    x, kernel, state = (a.astype(dtype) for a in arrays())
    out, last = short_conv(x, kernel, initial_state=state)
    for t in range(LENGTH):
        y, state = short_conv(x[:, t : t + 1], kernel, initial_state=state)
        assert y.dtype == dtype and state.dtype == dtype
        assert rms_ratio(y[:, 0], out[:, t]) < TOLERANCE[dtype]
    np.testing.assert_array_equal(state, last)


@pytest.mark.parametrize(("segments", "length"), [(False, 16), (True, 16), (True, 8)])
def test_shards_over_devices_are_the_whole(segments, length):
    """Channels over the tensor axis; of 8 tokens a shard has two, fewer than the taps reach back."""
    x, kernel, start = arrays(length)
    ids = SEGMENTS[:, :length] if segments else None
    weights = jnp.cos(jnp.arange(start.size, dtype=jnp.float32)).reshape(start.shape)

    def whole(x, kernel, state, ids):
        return short_conv(x, kernel, initial_state=state, segment_ids=ids)

    def loss(op, *arrays):
        out, final = op(*arrays, ids)
        return jnp.sum(out * jnp.cos(out)) + jnp.sum(final * weights), (out, final)

    kinds = ("sequence", "taps", "window", "rows")
    split = per_shard(whole, kinds, ("sequence", "window"), conv_over_shards)
    devices = np.array(jax.devices()[:8]).reshape(1, 1, 2, 4)
    mesh = Mesh(devices, ("data", "fsdp", "tensor", "context"), axis_types=(AxisType.Auto,) * 4)
    expected = jax.grad(functools.partial(loss, whole), (0, 1, 2), has_aux=True)(x, kernel, start)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run = jax.jit(jax.grad(functools.partial(loss, split), (0, 1, 2), has_aux=True))
        outputs = run(*jax.device_put((x, kernel, start), NamedSharding(mesh, PartitionSpec())))
    for got, want in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        assert rms_ratio(got, want) < TOLERANCE["float32"]
