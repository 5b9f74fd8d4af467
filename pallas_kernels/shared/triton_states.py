"""The Triton kernel that goes from chunk to chunk, and products with the states that it stored.

Sequences are [B,T,H,D], stored states [B,H,N,V,K]; products are of the sequences' dtype, or for float32 of PRECISION.
"""

import triton.language as tl

from pallas_kernels.shared.triton_chunk import jit, place, put, tile


@jit
def pass_states(
    p, x0, q, m, y, decay, start, x, states, final,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    REMOVAL: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk: X = P S + X0, S <- E S + Q^T X + M^T Y; without REMOVAL only S <- E S + M^T Y.

    states [B,H,N,V,K] are what each chunk begins with, in its direction; start and final are [B,H,K,V] float32.
    A program owns BLOCK value channels and holds the state transposed: on tensor cores one product's sums are then
    the next one's left operand as they lie.
    """
    column, key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K)
    batch, head = place(tl.program_id(1), H)
    dtype: tl.constexpr = m.dtype.element_ty
    row = tl.arange(0, C)
    chunks: tl.constexpr = (T + C - 1) // C
    ends = (batch * H + head) * K * V + key[None, :] * V + column[:, None]
    state = tl.load(start + ends)
    for step in range(chunks):
        n = chunks - 1 - step if REVERSE else step
        token = n * C + row
        chunk = (batch * H + head) * chunks + n
        stored = chunk * V * K + column[:, None] * K + key[None, :]
        tl.store(states + stored, state.to(dtype))
        decays = decay + chunk * 2 * K + key
        end, rest = tl.load(decays), tl.load(decays + K)
        values = tile(y, batch, head, token[None, :], column[:, None], T, H, V)
        into = tile(m, batch, head, token[:, None], key[None, :], T, H, K)
        new = state * end[None, :] + state * rest[None, :]
        if REMOVAL:
            seen = tile(p, batch, head, token[None, :], key[:, None], T, H, K)
            removed = tile(x0, batch, head, token[None, :], column[:, None], T, H, V).to(tl.float32)
            removed = tl.dot(state.to(dtype), seen, acc=removed, input_precision=PRECISION)
            put(x, removed, batch, head, token[None, :], column[:, None], T, H, V)
            back = tile(q, batch, head, token[:, None], key[None, :], T, H, K)
            new = tl.dot(removed.to(dtype), back, acc=new, input_precision=PRECISION)
        state = tl.dot(values, into, acc=new, input_precision=PRECISION)
    tl.store(final + ends, state)


@jit
def through_state(
    x, states, total, batch, head, chunk, token, column,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + X S for a tile of tokens and value channels; BLOCK key channels at a time, for want of registers."""
    for start in range(0, K, BLOCK):
        key = start + tl.arange(0, BLOCK)
        state = tl.load(states + chunk * V * K + column[None, :] * K + key[:, None])
        rows = tile(x, batch, head, token[:, None], key[None, :], T, H, K)
        total = tl.dot(rows, state, acc=total, input_precision=PRECISION)
    return total
