"""The causal depthwise convolution in front of gdn, with SiLU: a few taps a channel, and the inputs they reach back to.

The state is [B,W-1,C], the last inputs themselves, oldest first: tokens before channels, as sequences lie, so that it
is put in front of the next tokens as it is, and channels stay on a vector's lanes and on the mesh's axis. It holds
zeros where a segment began since, and needs no ids of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout
from pallas_kernels.sharded import CONTEXT


def short_conv(
    x: Float[Array, "B T C"],
    kernel: Float[Array, "W C"],
    *,
    initial_state: Float[Array, "B W1 C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W1 C"]]:
    """A causal convolution of each channel for itself, with SiLU, and the state after the last token.

    y_t = SiLU(sum_j kernel[W-1-j] x_{t-j}),   j = 0, ..., W-1

    The last tap is the token's own, as in torch's conv1d, whose weights [C,1,W] are kernel's transposed. Taps do not
    reach across a token t > 0 whose segment id differs from the one before it; initial_state (zeros by default), W-1
    inputs, continues into token 0's segment. Sums are float32; y and the state have x's dtype.
    """
    _check(x, kernel, initial_state, segment_ids)
    batch, _, channels = x.shape
    reach = kernel.shape[0] - 1
    before = jnp.zeros((batch, reach, channels), x.dtype) if initial_state is None else initial_state.astype(x.dtype)
    passed = None  # resets from the start to each token
    if segment_ids is not None:
        passed = jnp.cumsum(layout.boundaries(segment_ids).astype(jnp.int32), axis=1)
    taps = kernel.astype(jnp.float32)

    def tap(back: int) -> jax.Array:
        """The inputs `back` tokens ago, where they are visible."""
        shifted = _shifted(x, before, back).astype(jnp.float32)
        if passed is None or back == 0:
            return shifted
        visible = passed == _shifted(passed, jnp.zeros((batch, reach), passed.dtype), back)
        return jnp.where(visible[..., None], shifted, 0.0)

    total = sum((taps[reach - back] * tap(back) for back in range(1, reach + 1)), taps[reach] * tap(0))
    return jax.nn.silu(total).astype(x.dtype), _final_state(x, before, passed)


def conv_over_shards(op: Callable[..., Any]) -> Callable[..., Any]:
    """op, `short_conv` as (x, kernel, initial_state, segment_ids), on one device's shard of every sequence.

    For `per_shard` over the axis `context`: each device gets the last W-1 inputs before its shard, from as many shards
    as they lie in. initial_state (or None) is the whole sequence's, and so is the final state that every device gets.
    """

    def run(
        x: jax.Array, kernel: jax.Array, initial_state: jax.Array | None, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        batch, length, channels = x.shape
        reach = kernel.shape[0] - 1
        count = min(reach, length)  # a shorter shard is handed on as a whole
        if initial_state is None:
            initial_state = jnp.zeros((batch, reach, channels), x.dtype)
        inputs = jnp.concatenate([initial_state.astype(x.dtype), _ends(x, count)], axis=1)
        ids = None
        if segment_ids is not None:
            first = jax.lax.all_gather(segment_ids[:, :1], CONTEXT)[0]
            ids = jnp.concatenate([jnp.repeat(first, reach, axis=1), _ends(segment_ids, count)], axis=1)

        def before(shard: jax.Array | int, following: jax.Array | None) -> jax.Array:
            """The state that a shard begins with, whose first id follows; for none, the state after the last one."""
            state = jax.lax.dynamic_slice_in_dim(inputs, shard * count, reach, axis=1)
            if ids is None:
                return state
            near = jax.lax.dynamic_slice_in_dim(ids, shard * count, reach, axis=1)
            near = jnp.concatenate([near, near[:, -1:] if following is None else following], axis=1)
            passed = jnp.cumsum(layout.boundaries(near).astype(jnp.int32), axis=1)
            return jnp.where((passed[:, :-1] == passed[:, -1:])[..., None], state, 0)

        own = before(jax.lax.axis_index(CONTEXT), None if segment_ids is None else segment_ids[:, :1])
        return op(x, kernel, own, segment_ids)[0], before(jax.lax.axis_size(CONTEXT), None)

    return run


def _ends(x: jax.Array, count: int) -> jax.Array:
    """The last `count` tokens of every device's shard, one after the other."""
    return jax.lax.all_gather(x[:, x.shape[1] - count :], CONTEXT, axis=1, tiled=True)


def _shifted(x: jax.Array, before: jax.Array, back: int) -> jax.Array:
    """x [B,T,...] as it was `back` tokens ago, begun with the end of `before`."""
    if back == 0:
        return x
    length = x.shape[1]
    return jnp.concatenate([before[:, before.shape[1] - back :], x[:, : max(length - back, 0)]], axis=1)[:, :length]


def _final_state(x: jax.Array, before: jax.Array, passed: jax.Array | None) -> jax.Array:
    """The last inputs, zeros in the place of those before the last reset."""
    reach, length = before.shape[1], x.shape[1]
    recent = x[:, max(length - reach, 0) :]
    state = jnp.concatenate([before[:, length:], recent], axis=1)
    if passed is None:
        return state
    counts = jnp.pad(passed[:, max(length - reach, 0) :], ((0, 0), (reach - recent.shape[1], 0)))
    return jnp.where((counts == passed[:, -1:])[..., None], state, 0)


def _check(x: jax.Array, kernel: jax.Array, state: jax.Array | None, segment_ids: jax.Array | None) -> None:
    """Raises ValueError unless kernel, state and segment ids go with x [B,T,C]."""
    batch, length, channels = x.shape
    arrays = {"kernel": kernel}
    expected: dict[str, tuple[int, ...]] = {"kernel": (*kernel.shape[:1], channels)}
    if state is not None:
        arrays["state"] = state
        expected["state"] = (batch, kernel.shape[0] - 1, channels)
    if segment_ids is not None:
        arrays["segment_ids"] = segment_ids
        expected["segment_ids"] = (batch, length)
    layout.check_shapes("short_conv", arrays, expected, f"x of shape {x.shape}")
