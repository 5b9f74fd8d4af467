"""What a mixer does head by head, with its sequences flat: [B, T, H K], as matrices give them and kernels take them.

A TPU lays [B, T, H, K] out otherwise than [B, T, H K], and every reshape between them moves all of it. So there heads
are lanes of the flat form: sums over a head are products with a matrix of zeros and ones, RoPE is two rolls, a repeated
head a concatenation. Elsewhere a reshape is free. Over a mesh, heads lie over tensor and every device has whole ones.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.dispatch import backend
from pallas_kernels.sharded import ROWS, constrain, parts, per_shard
from radlads_jax.models import rope
from radlads_jax.models.layers import RMSNorm, repeat_kv, split_heads

_LEAST_SQUARE = 1e-24


def by_heads(x: Float[Array, "B T C"], size: int) -> Float[Array, "B T C"]:
    """x with heads of this size over tensor, positions over context."""
    return constrain(x, ROWS, "context", "tensor" if parts("tensor", x.shape[-1] // size) > 1 else None)


def repeat(x: Float[Array, "B T g"], size: int, heads: int) -> Float[Array, "B T d"]:
    """Every kv head for its heads/kv_heads query heads, neighbours together (repeat-interleave)."""
    own = x.shape[-1] // size
    times = heads // own
    if times == 1:
        return x

    def op(x: Array) -> Array:
        groups = x.shape[-1] // size
        if not _in_lanes():
            return _flat(repeat_kv(split_heads(x, groups), groups * times))
        each = jnp.split(x, groups, axis=-1)
        return jnp.concatenate([head for head in each for _ in range(times)], axis=-1)

    return _by_shard(op, ("sequence",), own)(x)


def rotate(
    x: Float[Array, "B T C"], size: int, cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T C"]:
    """`rope.rotate` of every head."""

    def op(x: Array, cos: Array, sin: Array) -> Array:
        count = x.shape[-1] // size
        if not _in_lanes():
            return _flat(rope.rotate(split_heads(x, count), cos, sin))
        cos, sin = cos[:, :, 0], sin[:, :, 0]
        half = cos.shape[-1]
        still = jnp.ones((*cos.shape[:2], size - 2 * half), cos.dtype)
        of_own = jnp.concatenate([cos, cos, still] * count, axis=-1)
        of_partner = jnp.concatenate([-sin, sin, 0 * still] * count, axis=-1)
        wide = x.astype(jnp.float32)
        is_first = jnp.arange(x.shape[-1]) % size < half
        partner = jnp.where(is_first, jnp.roll(wide, -half, axis=-1), jnp.roll(wide, half, axis=-1))
        return (wide * of_own + partner * of_partner).astype(x.dtype)

    return _by_shard(op, ("sequence", "rows", "rows"), x.shape[-1] // size)(x, cos, sin)


def unit(x: Float[Array, "B T C"], size: int, *, eps: float = 0.0) -> Float[Array, "B T C"]:
    """Every head over sqrt(its square + eps), which is taken to be at least 1e-12; float32 in and out."""

    def inverse(sums: Array) -> Array:
        return jax.lax.rsqrt(jnp.maximum(sums + eps, _LEAST_SQUARE))

    def op(x: Array) -> Array:
        return x * _of_heads(jnp.square(x), size, inverse)

    return _by_shard(op, ("sequence",), x.shape[-1] // size)(x)


def normed(x: Float[Array, "B T C"], norm: RMSNorm) -> Float[Array, "B T C"]:
    """`norm` of every head."""
    size = norm.scale.shape[-1]

    def op(x: Array) -> Array:
        return x * _of_heads(jnp.square(x), size, lambda sums: jax.lax.rsqrt(sums / size + norm.eps))

    out = _by_shard(op, ("sequence",), x.shape[-1] // size)(x.astype(jnp.float32))
    return norm.scaled(out, x.dtype, times=x.shape[-1] // size)


def recurrence(
    kernel: Callable[..., Any],
    step: Callable[..., Any],
    over_shards: Callable[[Callable[..., Any]], Callable[..., Any]],
    sizes: tuple[int, ...],
    *,
    heads: int,
    of_heads: int = 0,
) -> Callable[..., tuple[Array, Array]]:
    """(*sequences, initial_state, segment_ids) -> (o, final state), each device with its own heads.

    The sequences are flat, of heads of these sizes, then of_heads of them [B, T, H]; heads: of the first one, by which
    all are cut. kernel: of sequences [B, T, H, K]; step: of [B, H, K] and a state, which takes a single token on.
    """

    def run(*arguments: Any) -> tuple[Array, Array]:
        *sequences, initial_state, segment_ids = arguments
        if sequences[0].shape[1] == 1 and initial_state is not None:
            out, final = step(*(x[:, 0] for x in sequences), initial_state)
            return out[:, None], final
        return kernel(*sequences, initial_state=initial_state, segment_ids=segment_ids)

    def of_flat(run: Callable[..., Any]) -> Callable[..., tuple[Array, Array]]:
        def flat(*arguments: Any) -> tuple[Array, Array]:
            cut = [split_heads(x, x.shape[-1] // size) for x, size in zip(arguments, sizes, strict=False)]
            out, final = run(*cut, *arguments[len(sizes) :])
            return _flat(out), final

        return flat

    kinds = ("sequence",) * (len(sizes) + of_heads) + ("state", "rows")
    return per_shard(of_flat(run), kinds, ("sequence", "state"), lambda _: of_flat(over_shards(run)), heads=heads)


def _of_heads(x: Array, size: int, function: Callable[[Array], Array]) -> Array:
    """function(each head's sum), at every channel of the head; float32."""
    count = x.shape[-1] // size
    if not _in_lanes():
        sums = function(jnp.sum(split_heads(x, count), axis=-1, keepdims=True))
        return _flat(jnp.broadcast_to(sums, (*x.shape[:2], count, size)))
    belongs = (jnp.arange(x.shape[-1])[:, None] // size == jnp.arange(count)).astype(jnp.float32)
    # In float32: a TPU would round to bfloat16 first.
    highest = jax.lax.Precision.HIGHEST
    sums = function(jnp.einsum("btc,ch->bth", x, belongs, precision=highest))
    return jnp.einsum("bth,ch->btc", sums, belongs, precision=highest)


def _by_shard(op: Callable[..., Array], kinds: tuple[str, ...], heads: int) -> Callable[..., Array]:
    """op of every device's own heads, in its own positions."""
    return per_shard(op, kinds, "sequence", lambda op: op, heads=heads)


def _in_lanes() -> bool:
    return backend() == "tpu"


def _flat(x: Float[Array, "B T H K"]) -> Float[Array, "B T d"]:
    return x.reshape(*x.shape[:2], -1)
