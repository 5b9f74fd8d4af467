"""The Triton kernels of wkv6, forward and backward; the pass over chunks is `shared.triton_states.pass_states`.

Decays of -5 a token make e^-G too large to split off. As in `wkv6.levels` every pair of tokens is served at one level:
in groups of eight, with exponents counted from the group's middle; all others where a boundary between two spans of
8, 16, ... tokens comes between them, with both exponents counted from that boundary and so never positive.
Sequences are [B,T,H,D], stored states [B,H,N,V,K]. Products are of the sequences' dtype, or for float32 of PRECISION;
sums are float32.
"""

import triton.language as tl

from pallas_kernels.shared.triton_chunk import (
    chunk_decay,
    jit,
    place,
    put,
    segment_starts,
    segments_passed,
    tile,
)
from pallas_kernels.shared.triton_states import through_state

# 2 to the level's number tokens are a span; the first level makes the groups of eight.
_GROUPS = tl.constexpr(2)


@jit
def _masked_sums(mask, x, PRECISION: tl.constexpr):
    """Sums of x [C,BK] over the tokens that mask [C,C] says: a sum less its largest term would lose the others."""
    return tl.dot(mask.to(tl.float32), x, input_precision=PRECISION)


@jit
def _to_boundary(row, column, level):
    """[C,C] bool: the columns whose decays lie between a row's token and the boundary in its pair of spans."""
    second = (row >> level) % 2 == 1
    return ((row >> level) == (column >> level)) & ((second & (column <= row)) | (~second & (column > row)))


@jit
def _level_decays(log_w, row, column, level):
    """The exponentials [C,BK] of a level that receptances and keys are multiplied with."""
    gap = _masked_sums(_to_boundary(row, column, level), log_w, "tf32x3")
    r_gap = tl.where(((row >> level) % 2 == 0) & (level == _GROUPS), -gap, gap)
    return tl.exp(r_gap), tl.exp(tl.where(level == _GROUPS, -r_gap, gap))


@jit
def _level_mask(row, column, level):
    """[C,C] bool: the pairs of a level."""
    apart = (row >> level) != (column >> level)
    return (row > column) & ((row >> level + 1) == (column >> level + 1)) & (apart | (level == _GROUPS))


@jit
def prepare(
    r, log_w, k, segment_ids, k_end, r_head, inner, decay,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk holds beside its state: K_end = k e^(G_C - G) and R_head = r e^G within their segments, ...

    inner [B,H,N,C,C], the pairs i >= j, and decay [B,H,N,2,K], e^G_C and what its rounding left out.
    """
    n, pair = tl.program_id(0), tl.program_id(1)
    batch, head = place(pair, H)
    dtype: tl.constexpr = r.dtype.element_ty
    row, column = tl.arange(0, C), tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    passed = segments_passed(segment_starts(segment_ids, batch, n, T, C, RESETS))
    last = tl.max(passed, axis=0)
    in_head, in_tail = (passed == 0)[:, None], (passed == last)[:, None]
    keep = tl.where(last == 0, 1.0, 0.0)

    pairs = tl.zeros((C, C), tl.float32)
    itself = tl.zeros((C,), tl.float32)
    for start in range(0, K, BLOCK):
        at = (start + column)[None, :]
        decays = tile(log_w, batch, head, token[:, None], at, T, H, K)
        r_in = tile(r, batch, head, token[:, None], at, T, H, K).to(tl.float32)
        k_in = tile(k, batch, head, token[:, None], at, T, H, K).to(tl.float32)
        itself += tl.sum(r_in * k_in, axis=1)
        to_end = tl.cumsum(decays, axis=0, reverse=True) - decays
        heads = tl.where(in_head, r_in * tl.exp(tl.cumsum(decays, axis=0)), 0.0)
        put(r_head, heads, batch, head, token[:, None], at, T, H, K)
        tails = tl.where(in_tail, k_in * tl.exp(to_end), 0.0)
        put(k_end, tails, batch, head, token[:, None], at, T, H, K)
        end, lost = chunk_decay(tl.sum(decays, axis=0))
        tl.store(decay + chunk * 2 * K + start + column, end * keep)
        tl.store(decay + (chunk * 2 + 1) * K + start + column, lost * keep)
        for level in range(_GROUPS, LEVELS):
            r_decay, k_decay = _level_decays(decays, row[:, None], row[None, :], level)
            rs, ks = (r_in * r_decay).to(dtype), tl.trans((k_in * k_decay).to(dtype))
            products = tl.dot(rs, ks, input_precision=PRECISION)
            pairs += tl.where(_level_mask(row[:, None], row[None, :], level), products, 0.0)
    pairs = tl.where(passed[:, None] == passed[None, :], pairs, 0.0)
    pairs = tl.where(row[:, None] == row[None, :], itself[:, None], pairs)
    tl.store(inner + chunk * C * C + row[:, None] * C + row[None, :], pairs.to(dtype))


@jit
def combine(
    x, states, inner, y, out,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = R_head S + inner V, or TRANSPOSED dV = K_end dS + inner^T dO."""
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    row, column = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    turned = row[None, :] * C + row[:, None] if TRANSPOSED else row[:, None] * C + row[None, :]
    values = tile(y, batch, head, token[:, None], column[None, :], T, H, V)
    total = tl.dot(tl.load(inner + chunk * C * C + turned), values, input_precision=PRECISION)
    total = through_state(x, states, total, batch, head, chunk, token, column, T, H, K, V, BLOCK_K, PRECISION)
    put(out, total, batch, head, token[:, None], column[None, :], T, H, V)


@jit
def key_gradients(
    r, log_w, k, v, segment_ids, decay, d_out, states, d_states, d_r, d_log_w, d_k,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, LEVELS: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK key channels of r, log_w and k.

    Within a group d log_w sums differences that nearly cancel: they are made of the same rounded factors as the
    products, so that what should cancel does.
    """
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    dtype: tl.constexpr = r.dtype.element_ty
    row, key = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token, at = (n * C + row)[:, None], key[None, :]
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    first = segment_starts(segment_ids, batch, n, T, C, RESETS)
    passed = segments_passed(first)

    grad_r = tl.zeros((C, BLOCK), tl.float32)
    grad_k = tl.zeros((C, BLOCK), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    from_state = tl.zeros((BLOCK,), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        value = start_v + tl.arange(0, BLOCK_V)
        stored = chunk * V * K + value[:, None] * K + at
        state, d_state = tl.load(states + stored), tl.load(d_states + stored)
        out = tile(d_out, batch, head, token, value[None, :], T, H, V)
        values = tile(v, batch, head, token, value[None, :], T, H, V)
        grad_r = tl.dot(out, state, acc=grad_r, input_precision=PRECISION)
        grad_k = tl.dot(values, d_state, acc=grad_k, input_precision=PRECISION)
        pairs = tl.dot(out, tl.trans(values), acc=pairs, input_precision=PRECISION)
        from_state += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=0)
    pairs = tl.where(passed[:, None] == passed[None, :], pairs, 0.0)
    itself = tl.sum(tl.where(row[:, None] == row[None, :], pairs, 0.0), axis=1)[:, None]
    pairs = pairs.to(dtype)

    decays = tile(log_w, batch, head, token, at, T, H, K)
    r_in = tile(r, batch, head, token, at, T, H, K)
    k_in = tile(k, batch, head, token, at, T, H, K)
    grad_r = tl.where((passed == 0)[:, None], grad_r * tl.exp(tl.cumsum(decays, axis=0)), 0.0)
    to_end = tl.exp(tl.cumsum(decays, axis=0, reverse=True) - decays)
    grad_k = tl.where((passed == tl.max(passed, axis=0))[:, None], grad_k * to_end, 0.0)
    d_decay = tl.cumsum(r_in * grad_r, axis=0, reverse=True)
    d_decay += _masked_sums(row[:, None] > row[None, :], k_in * grad_k, PRECISION)
    d_decay += (from_state * tl.load(decay + chunk * 2 * K + key))[None, :]
    grad_r += itself * k_in
    grad_k += itself * r_in
    for level in range(_GROUPS, LEVELS):
        r_decay, k_decay = _level_decays(decays, row[:, None], row[None, :], level)
        rs, ks = (r_in * r_decay).to(dtype), (k_in * k_decay).to(dtype)
        of_level = tl.where(_level_mask(row[:, None], row[None, :], level), pairs, 0.0)
        d_rs = tl.dot(of_level, ks, input_precision=PRECISION)
        d_ks = tl.dot(tl.trans(of_level), rs, input_precision=PRECISION)
        grad_r += d_rs * r_decay
        grad_k += d_ks * k_decay
        from_r, from_k, second = rs * d_rs, ks * d_ks, ((row >> level) % 2 == 1)[:, None]
        d_gap = tl.where(second, from_r, from_k)
        d_gap -= tl.where(level == _GROUPS, tl.where(second, from_k, from_r), 0.0)
        d_decay += _masked_sums(_to_boundary(row[None, :], row[:, None], level), d_gap, PRECISION)
    put(d_r, grad_r, batch, head, token, at, T, H, K)
    put(d_k, grad_k, batch, head, token, at, T, H, K)
    put(d_log_w, tl.where(first[:, None], 0.0, d_decay), batch, head, token, at, T, H, K)
