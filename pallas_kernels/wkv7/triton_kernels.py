"""The Triton kernels of wkv7, forward and backward; the pass over chunks is `shared.triton_states.pass_states`.

Notation and algebra of `wkv7.chunked`, with exponents counted from a chunk's middle: A~, R~, B~, K~ are a, r, b, k
times e^(G - log_w - G_mid), e^(G - G_mid), e^(G_mid - G), e^(G_mid - G): finite for log_w >= -3.6 in chunks of 32.
Only two kernels go from chunk to chunk, and these are one: with what `prepare` makes of each chunk,
    forward    U = W S + U0,        S  <- e^G_C S + B_end^T U + K_end^T V
    backward   dU = B_end dS + Z,   dS <- e^G_C dS + W^T dU + R_head^T dO
All others take every chunk at the same time. Sequences are [B,T,H,D], stored states [B,H,N,V,K].
Products are of the sequences' dtype, or for float32 of PRECISION; sums are float32.
"""

import triton.language as tl

from pallas_kernels.shared.triton_chunk import (
    chunk_decay,
    from_middle,
    invert_unit_lower,
    jit,
    place,
    put,
    segment_starts,
    segments_passed,
    tile,
)
from pallas_kernels.shared.triton_states import through_state

AK, RB, RK, INVERSE = (tl.constexpr(index) for index in range(4))
_D_AB, _D_AK, _D_RB, _D_RK = (tl.constexpr(index) for index in range(4))


@jit
def prepare(
    r, log_w, k, v, a, b, segment_ids, w, u0, b_end, k_end, r_head, inner, decay,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
    RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk holds beside its state: W = (I - AB)^-1 A_head, U0 = (I - AB)^-1 AK V, ...

    inner [B,H,N,4,C,C] is AK, RB, RK and the inverse; decay [B,H,N,2,K] is e^G_C and what its rounding left out.
    """
    n, pair = tl.program_id(0), tl.program_id(1)
    batch, head = place(pair, H)
    dtype: tl.constexpr = r.dtype.element_ty
    row, column = tl.arange(0, C), tl.arange(0, BLOCK)
    token = n * C + row
    passed = segments_passed(segment_starts(segment_ids, batch, n, T, C, RESETS))
    last = tl.max(passed, axis=0)
    in_head, in_tail = (passed == 0)[:, None], (passed == last)[:, None]
    keep = tl.where(last == 0, 1.0, 0.0)
    chunk = (batch * H + head) * tl.cdiv(T, C) + n

    ab = tl.zeros((C, C), tl.float32)
    ak = tl.zeros((C, C), tl.float32)
    rb = tl.zeros((C, C), tl.float32)
    rk = tl.zeros((C, C), tl.float32)
    for start in range(0, K, BLOCK):
        at = (start + column)[None, :]
        decays = tile(log_w, batch, head, token[:, None], at, T, H, K)
        x, middle, rest = from_middle(decays, C)
        shrink, grow = tl.exp(x), tl.exp(-x)
        to_middle, to_end = tl.exp(middle)[None, :], tl.exp(rest)[None, :]
        a_in = tile(a, batch, head, token[:, None], at, T, H, K) * tl.exp(x - decays)
        r_in = tile(r, batch, head, token[:, None], at, T, H, K) * shrink
        b_in = tile(b, batch, head, token[:, None], at, T, H, K) * grow
        k_in = tile(k, batch, head, token[:, None], at, T, H, K) * grow
        put(r_head, tl.where(in_head, r_in * to_middle, 0.0), batch, head, token[:, None], at, T, H, K)
        put(b_end, tl.where(in_tail, b_in * to_end, 0.0), batch, head, token[:, None], at, T, H, K)
        put(k_end, tl.where(in_tail, k_in * to_end, 0.0), batch, head, token[:, None], at, T, H, K)
        end, lost = chunk_decay(middle + rest)
        tl.store(decay + (chunk * 2) * K + start + column, end * keep)
        tl.store(decay + (chunk * 2 + 1) * K + start + column, lost * keep)
        a_in, r_in = a_in.to(dtype), r_in.to(dtype)
        b_in, k_in = tl.trans(b_in.to(dtype)), tl.trans(k_in.to(dtype))
        ab = tl.dot(a_in, b_in, acc=ab, input_precision=PRECISION)
        ak = tl.dot(a_in, k_in, acc=ak, input_precision=PRECISION)
        rb = tl.dot(r_in, b_in, acc=rb, input_precision=PRECISION)
        rk = tl.dot(r_in, k_in, acc=rk, input_precision=PRECISION)

    together = passed[:, None] == passed[None, :]
    lower = together & (row[:, None] >= row[None, :])
    strict = together & (row[:, None] > row[None, :])
    inverse = invert_unit_lower(tl.where(strict, ab, 0.0), C, PRECISION)
    ak = tl.where(strict, ak, 0.0)
    base = inner + chunk * 4 * C * C + row[:, None] * C + row[None, :]
    tl.store(base + AK * C * C, ak.to(dtype))
    tl.store(base + RB * C * C, tl.where(lower, rb, 0.0).to(dtype))
    tl.store(base + RK * C * C, tl.where(lower, rk, 0.0).to(dtype))
    tl.store(base + INVERSE * C * C, inverse.to(dtype))

    from_values = tl.dot(inverse, ak, input_precision=PRECISION).to(dtype)
    inverse = inverse.to(dtype)
    for start in range(0, K, BLOCK):
        at = (start + column)[None, :]
        decays = tile(log_w, batch, head, token[:, None], at, T, H, K)
        x, middle, rest = from_middle(decays, C)
        a_in = tile(a, batch, head, token[:, None], at, T, H, K) * tl.exp(x - decays)
        a_in = tl.where(in_head, a_in * tl.exp(middle)[None, :], 0.0).to(dtype)
        put(w, tl.dot(inverse, a_in, input_precision=PRECISION), batch, head, token[:, None], at, T, H, K)
    for start in range(0, V, BLOCK):
        at = (start + column)[None, :]
        values = tile(v, batch, head, token[:, None], at, T, H, V)
        put(u0, tl.dot(from_values, values, input_precision=PRECISION), batch, head, token[:, None], at, T, H, V)


@jit
def outputs(
    r_head, inner, u, v, states, out,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = R_head S + RB U + RK V."""
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    row, column = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    total = tl.zeros((C, BLOCK), tl.float32)
    total = through_state(r_head, states, total, batch, head, chunk, token, column, T, H, K, V, BLOCK_K, PRECISION)
    base = inner + chunk * 4 * C * C + row[:, None] * C + row[None, :]
    removed = tile(u, batch, head, token[:, None], column[None, :], T, H, V)
    total = tl.dot(tl.load(base + RB * C * C), removed, acc=total, input_precision=PRECISION)
    values = tile(v, batch, head, token[:, None], column[None, :], T, H, V)
    total = tl.dot(tl.load(base + RK * C * C), values, acc=total, input_precision=PRECISION)
    put(out, total, batch, head, token[:, None], column[None, :], T, H, V)


@jit
def adjoint_values(
    w, inner, u0, states, d_out, u, z,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U = W S + U0 again, and Z = RB^T dO."""
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    row, column = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    removed = tile(u0, batch, head, token[:, None], column[None, :], T, H, V).to(tl.float32)
    removed = through_state(w, states, removed, batch, head, chunk, token, column, T, H, K, V, BLOCK_K, PRECISION)
    put(u, removed, batch, head, token[:, None], column[None, :], T, H, V)
    base = inner + chunk * 4 * C * C + row[None, :] * C + row[:, None]
    gradient = tile(d_out, batch, head, token[:, None], column[None, :], T, H, V)
    gradient = tl.dot(tl.load(base + RB * C * C), gradient, input_precision=PRECISION)
    put(z, gradient, batch, head, token[:, None], column[None, :], T, H, V)


@jit
def pair_gradients(
    k_end, inner, u, v, d_u, d_out, d_states, segment_ids, d_v, d_y, d_inner,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY = (I - AB)^-T dU, dV, and d_inner [B,H,N,4,C,C]: the gradients of AB, AK, RB, RK."""
    n, pair = tl.program_id(0), tl.program_id(1)
    batch, head = place(pair, H)
    dtype: tl.constexpr = v.dtype.element_ty
    row, column = tl.arange(0, C), tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    turned = inner + chunk * 4 * C * C + row[None, :] * C + row[:, None]
    inverse = tl.load(turned + INVERSE * C * C)
    a_to_v, r_to_v = tl.load(turned + AK * C * C), tl.load(turned + RK * C * C)
    d_ab = tl.zeros((C, C), tl.float32)
    d_ak = tl.zeros((C, C), tl.float32)
    d_rb = tl.zeros((C, C), tl.float32)
    d_rk = tl.zeros((C, C), tl.float32)
    for start in range(0, V, BLOCK):
        at = (start + column)[None, :]
        out = tile(d_out, batch, head, token[:, None], at, T, H, V)
        known = tl.dot(inverse, tile(d_u, batch, head, token[:, None], at, T, H, V), input_precision=PRECISION)
        put(d_y, known, batch, head, token[:, None], at, T, H, V)
        known = known.to(dtype)
        value = tl.dot(r_to_v, out, input_precision=PRECISION)
        value = tl.dot(a_to_v, known, acc=value, input_precision=PRECISION)
        value = through_state(
            k_end, d_states, value, batch, head, chunk, token, start + column, T, H, K, V, BLOCK_K, PRECISION
        )
        put(d_v, value, batch, head, token[:, None], at, T, H, V)
        removed = tl.trans(tile(u, batch, head, token[:, None], at, T, H, V))
        values = tl.trans(tile(v, batch, head, token[:, None], at, T, H, V))
        d_ab = tl.dot(known, removed, acc=d_ab, input_precision=PRECISION)
        d_ak = tl.dot(known, values, acc=d_ak, input_precision=PRECISION)
        d_rb = tl.dot(out, removed, acc=d_rb, input_precision=PRECISION)
        d_rk = tl.dot(out, values, acc=d_rk, input_precision=PRECISION)
    passed = segments_passed(segment_starts(segment_ids, batch, n, T, C, RESETS))
    together = passed[:, None] == passed[None, :]
    lower = together & (row[:, None] >= row[None, :])
    strict = together & (row[:, None] > row[None, :])
    base = d_inner + chunk * 4 * C * C + row[:, None] * C + row[None, :]
    tl.store(base + _D_AB * C * C, tl.where(strict, d_ab, 0.0).to(dtype))
    tl.store(base + _D_AK * C * C, tl.where(strict, d_ak, 0.0).to(dtype))
    tl.store(base + _D_RB * C * C, tl.where(lower, d_rb, 0.0).to(dtype))
    tl.store(base + _D_RK * C * C, tl.where(lower, d_rk, 0.0).to(dtype))


@jit
def key_gradients(
    r, log_w, k, v, a, b, segment_ids, decay, u, d_y, d_out, states, d_states, d_inner, d_r, d_log_w, d_k, d_a, d_b,
    T: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, RESETS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK key channels of r, log_w, k, a and b.

    d log_w sums differences that nearly cancel: they are made of the same rounded A~, R~, B~, K~ as the products,
    so that what should cancel does.
    """
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    dtype: tl.constexpr = r.dtype.element_ty
    row, key = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token, at = (n * C + row)[:, None], key[None, :]
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    first = segment_starts(segment_ids, batch, n, T, C, RESETS)
    passed = segments_passed(first)
    in_head, in_tail = (passed == 0)[:, None], (passed == tl.max(passed, axis=0))[:, None]

    grad_a = tl.zeros((C, BLOCK), tl.float32)
    grad_r = tl.zeros((C, BLOCK), tl.float32)
    grad_b = tl.zeros((C, BLOCK), tl.float32)
    grad_k = tl.zeros((C, BLOCK), tl.float32)
    from_state = tl.zeros((BLOCK,), tl.float32)
    for start_v in range(0, V, BLOCK_V):
        value = start_v + tl.arange(0, BLOCK_V)
        stored = chunk * V * K + value[:, None] * K + at
        state, d_state = tl.load(states + stored), tl.load(d_states + stored)
        known = tile(d_y, batch, head, token, value[None, :], T, H, V)
        grad_a = tl.dot(known, state, acc=grad_a, input_precision=PRECISION)
        out = tile(d_out, batch, head, token, value[None, :], T, H, V)
        grad_r = tl.dot(out, state, acc=grad_r, input_precision=PRECISION)
        removed = tile(u, batch, head, token, value[None, :], T, H, V)
        grad_b = tl.dot(removed, d_state, acc=grad_b, input_precision=PRECISION)
        values = tile(v, batch, head, token, value[None, :], T, H, V)
        grad_k = tl.dot(values, d_state, acc=grad_k, input_precision=PRECISION)
        from_state += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=0)

    decays = tile(log_w, batch, head, token, at, T, H, K)
    x, middle, rest = from_middle(decays, C)
    shrink, grow = tl.exp(x), tl.exp(-x)
    to_middle, to_end = tl.exp(middle)[None, :], tl.exp(rest)[None, :]
    b_in = (tile(b, batch, head, token, at, T, H, K) * grow).to(dtype)
    k_in = (tile(k, batch, head, token, at, T, H, K) * grow).to(dtype)
    grad_b = tl.where(in_tail, grad_b * to_end, 0.0)
    grad_k = tl.where(in_tail, grad_k * to_end, 0.0)
    through_end = tl.sum(b_in * grad_b + k_in * grad_k, axis=0)
    through_end += from_state * tl.load(decay + chunk * 2 * K + key)

    base = d_inner + chunk * 4 * C * C + row[:, None] * C + row[None, :]
    pairs = tl.load(base + _D_AB * C * C)
    others = tl.load(base + _D_AK * C * C)
    a_decay = tl.exp(x - decays)
    a_in = (tile(a, batch, head, token, at, T, H, K) * a_decay).to(dtype)
    grad_a = tl.where(in_head, grad_a * to_middle, 0.0)
    grad_a = tl.dot(pairs, b_in, acc=grad_a, input_precision=PRECISION)
    grad_a = tl.dot(others, k_in, acc=grad_a, input_precision=PRECISION)
    grad_b = tl.dot(tl.trans(pairs), a_in, acc=grad_b, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(others), a_in, acc=grad_k, input_precision=PRECISION)
    from_a = a_in * grad_a
    put(d_a, grad_a * a_decay, batch, head, token, at, T, H, K)

    pairs = tl.load(base + _D_RB * C * C)
    others = tl.load(base + _D_RK * C * C)
    r_in = (tile(r, batch, head, token, at, T, H, K) * shrink).to(dtype)
    grad_r = tl.where(in_head, grad_r * to_middle, 0.0)
    grad_r = tl.dot(pairs, b_in, acc=grad_r, input_precision=PRECISION)
    grad_r = tl.dot(others, k_in, acc=grad_r, input_precision=PRECISION)
    grad_b = tl.dot(tl.trans(pairs), r_in, acc=grad_b, input_precision=PRECISION)
    grad_k = tl.dot(tl.trans(others), r_in, acc=grad_k, input_precision=PRECISION)
    put(d_r, grad_r * shrink, batch, head, token, at, T, H, K)
    put(d_b, grad_b * grow, batch, head, token, at, T, H, K)
    put(d_k, grad_k * grow, batch, head, token, at, T, H, K)
    d_total = from_a + r_in * grad_r - b_in * grad_b - k_in * grad_k
    d_decay = tl.cumsum(d_total, axis=0, reverse=True) - from_a + through_end[None, :]
    put(d_log_w, tl.where(first[:, None], 0.0, d_decay), batch, head, token, at, T, H, K)
