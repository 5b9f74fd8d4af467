"""A recurrence whose sequence is split over devices: every shard at once, then the shards' transitions composed.

A shard of a sequence maps the state before it to the state after it by an affine map, S -> A S + E: E is the state
after the shard when none came before, and A is what the shard makes of the identity when nothing is written. Each
device finds the A and E of its own shard, all of them see all of these, and each composes those before its own.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.sharded import CONTEXT

_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_VALUES = 3  # where v stands among a recurrence's sequences: r, log_w, k, v, ...


def over_shards(op: Callable[..., Any] | None = None, *, values: int = _VALUES) -> Callable[..., Any]:
    """op as it runs on one device's shard of every sequence, inside a shard_map over the axis `context`.

    op: (r, log_w, k, v, ..., initial_state, segment_ids) -> (o, final_state), linear in (v, initial_state), resetting
    where segment_ids change; v [B,T,H,V] is the sequence number `values`, and r may have fewer heads than v. Returned
    is the same function of shards [B,T/n,H,K] and [B,T/n]; initial_state (or None) is the whole sequence's, and so is
    the final_state that every device gets. It runs op twice. Without op, it is what takes op.

    o_t = S_t^T r_t is the sum of what the shard wrote and of (A_t^T r_t)^T S_before: the second run's outputs, from
    the identity as state and with v = 0, are the rows A_t^T r_t.
    """
    if op is None:
        return functools.partial(over_shards, values=values)

    def run(*arguments: Any) -> Any:
        *sequences, initial_state, segment_ids = arguments
        v, key_size = sequences[values], sequences[0].shape[-1]
        batch, _, heads, value_size = v.shape
        shape = (batch, heads, key_size, value_size)
        own, end = op(*sequences, jnp.zeros(shape, jnp.float32), segment_ids)

        sequences[values] = jnp.zeros((*v.shape[:-1], key_size), v.dtype)
        identity = jnp.broadcast_to(jnp.eye(key_size, dtype=jnp.float32), (*shape[:-1], key_size))
        reads, transition = op(*sequences, identity, segment_ids)

        before, final = _compose(transition, end, initial_state, _continues(segment_ids, batch))
        inherited = jnp.einsum(
            "bthk,bhkv->bthv", reads.astype(jnp.float32), before, precision=jax.lax.Precision.HIGHEST
        )
        return (own.astype(jnp.float32) + inherited).astype(own.dtype), final

    return run


def _compose(
    transition: jax.Array, end: jax.Array, initial_state: jax.Array | None, continues: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(state before this device's shard, state after the last), from this shard's map and all the others'."""
    transitions, ends = (jax.lax.all_gather(x, CONTEXT) for x in (transition, end))

    def enter(state: jax.Array, shard: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        transition, end, continues = shard
        state = jnp.where(continues[:, None, None, None], state, 0.0)
        return _exact("bhkj,bhjv->bhkv", transition, state) + end, state

    start = jnp.zeros_like(end) if initial_state is None else initial_state.astype(jnp.float32)
    final, before = jax.lax.scan(enter, start, (transitions, ends, continues))
    return before[jax.lax.axis_index(CONTEXT)], final


def _continues(segment_ids: jax.Array | None, batch: int) -> jax.Array:
    """[n,B] bool: whether a shard begins in the segment in which the one before it ended; the first one does."""
    if segment_ids is None:
        return jnp.ones((jax.lax.axis_size(CONTEXT), batch), bool)
    first, last = (jax.lax.all_gather(segment_ids[:, i], CONTEXT) for i in (0, -1))
    return jnp.concatenate([jnp.ones((1, batch), bool), first[1:] == last[:-1]])
