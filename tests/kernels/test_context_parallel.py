"""A recurrence over shards of a sequence on several devices is the recurrence over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from pallas_kernels.context_parallel import over_shards
from pallas_kernels.sharded import per_shard
from pallas_kernels.wkv6 import wkv6
from pallas_kernels.wkv7 import wkv7

BATCH, HEADS, SIZE = 2, 2, 8
# Of 4 shards; 20 is cut into shards that are no whole chunks.
LENGTHS = (64, 20)


def wkv7_of(r, log_w, k, v, a, b, state, segments, implementation="chunked"):
    return wkv7(r, log_w, k, v, a, b, initial_state=state, segment_ids=segments, implementation=implementation)


def wkv6_of(r, log_w, k, v, state, segments, implementation="chunked"):
    return wkv6(r, log_w, k, v, initial_state=state, segment_ids=segments, implementation=implementation)


OPERATIONS = {"wkv7": (wkv7_of, 6), "wkv6": (wkv6_of, 4)}


def mesh_of(shape: tuple[int, int, int, int]) -> Mesh:
    names = ("data", "fsdp", "tensor", "context")
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names, axis_types=(AxisType.Auto,) * 4)


def inputs(name: str, length: int) -> list[jax.Array]:
    rng = np.random.default_rng(length)
    shape = (BATCH, length, HEADS, SIZE)
    r, k, v = (rng.standard_normal(shape) for _ in range(3))
    log_w = -0.6 * rng.random(shape) * (1 if name == "wkv7" else 5)
    kk = rng.standard_normal(shape)
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    arrays = [r, log_w, k, v] + ([-kk, kk * rng.random(shape)] if name == "wkv7" else [])
    return [jnp.asarray(x, jnp.float32) for x in (*arrays, rng.standard_normal((BATCH, HEADS, SIZE, SIZE)))]


def segments_of(length: int, case: str) -> jax.Array | None:
    """Row 0 in several segments; "seam": the second begins where a shard does; "inside": it does not; row 1 in one."""
    if case == "none":
        return None
    begin = length // 4 if case == "seam" else length // 4 + 3
    ids = np.ones((BATCH, length), np.int32)
    ids[0, begin:], ids[0, length - 2 :] = 2, 3
    return jnp.asarray(ids)


@pytest.mark.parametrize("case", ["none", "seam", "inside"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_shards_are_the_whole(name: str, length: int, case: str) -> None:
    op, count = OPERATIONS[name]
    mesh, segments = mesh_of((2, 1, 1, 4)), segments_of(length, case)
    split = per_shard(op, ("sequence",) * count + ("state", "rows"), ("sequence", "state"), over_shards)
    *sequences, state = inputs(name, length)
    weights = [
        jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32) for x in (sequences[3], state)
    ]

    def loss(run, *arrays):
        out, final = run(*arrays, segments)
        return jnp.sum(out * weights[0]) + jnp.sum(final * weights[1]), (out, final)

    differentiated = tuple(range(count + 1))
    reference = functools.partial(op, implementation="reference")
    expected = jax.grad(functools.partial(loss, reference), differentiated, has_aux=True)(*sequences, state)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradients = jax.jit(jax.grad(functools.partial(loss, split), differentiated, has_aux=True))(
            *jax.device_put((*sequences, state), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        )
    for got, want in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(np.float64(got) - np.float64(want)) / np.linalg.norm(np.float64(want))
        assert error < 2e-6


def test_no_device_waits_for_another() -> None:
    """The compiled program exchanges maps of states, a gather, and hands no state from device to device."""
    op, count = OPERATIONS["wkv7"]
    mesh = mesh_of((1, 1, 1, 8))
    split = per_shard(op, ("sequence",) * count + ("state", "rows"), ("sequence", "state"), over_shards)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "context"))
    *sequences, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in inputs("wkv7", 64))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(lambda *x: split(*x, None, None)[0]).lower(*sequences).compile().as_text()
    assert "all-gather" in text
    assert "collective-permute" not in text
    assert f"f32[{BATCH},64,{HEADS},{SIZE}]" not in text
