"""The Triton kernels of gdn, forward and backward.

Per chunk of C tokens, with G the cumulative log decay from its start and D = e^(G_i - G_j) for i >= j, else 0:
    N = strict(K K^T * D) diag(beta),   P = (Q K^T * D) diag(beta),   M = (I + N)^-1
    W_S = -M e^G K,   W_V = M V,   K_end = beta e^(G_C - G) K
Only two kernels go from chunk to chunk, and these are one:
    forward    W = W_S S + W_V,                      S  <- e^G_C S + K_end^T W
    backward   dW = K_end dS + Z,   Z = P^T dO,      dS <- e^G_C dS + W_S^T dW + (e^G Q)^T dO
All others take every chunk at the same time. Sequences are [B,T,H,D], with G heads those of keys, stored states
[B,H,N,V,K]; log_g and beta are [B,T,H] float32. No exponent is positive; log_g is summed in two parts, multiples of a
sixteenth and the rest, so that strong decays take nothing from the weak ones after them.
Products are of the sequences' dtype, or for float32 of PRECISION; sums are float32.
"""

import triton.language as tl

from pallas_kernels.shared.triton_chunk import chunk_decay, invert_unit_lower, jit, place, put, tile
from pallas_kernels.shared.triton_states import through_state

P, INVERSE = (tl.constexpr(index) for index in range(2))
_D_KK, _D_QK = (tl.constexpr(index) for index in range(2))


@jit
def _scalars(pointer, batch, head, token, T: tl.constexpr, H: tl.constexpr):
    """[C] of [B,T,H], zeros beyond the last token."""
    return tl.load(pointer + (batch * T + token) * H + head, mask=token < T, other=0.0)


@jit
def _put_scalars(pointer, value, batch, head, token, T: tl.constexpr, H: tl.constexpr):
    """Stores a [C] of [B,T,H]."""
    tl.store(pointer + (batch * T + token) * H + head, value, mask=token < T)


@jit
def _two_sums(log_g):
    """G [C] in two parts."""
    coarse = tl.floor(log_g * 16.0 + 0.5) * (1.0 / 16.0)
    return tl.cumsum(coarse, axis=0), tl.cumsum(log_g - coarse, axis=0)


@jit
def _pair_decays(coarse, fine, C: tl.constexpr):
    """D [C,C]."""
    row = tl.arange(0, C)
    gap = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.exp(tl.where(row[:, None] >= row[None, :], gap, float("-inf")))


@jit
def _from_last(coarse, fine, C: tl.constexpr):
    """G_C - G [C], and G_C."""
    last = tl.arange(0, C) == C - 1
    coarse_end = tl.sum(tl.where(last, coarse, 0.0), axis=0)
    fine_end = tl.sum(tl.where(last, fine, 0.0), axis=0)
    return (coarse_end - coarse) + (fine_end - fine), coarse_end + fine_end


@jit
def _key_products(
    q, k, batch, group, token,
    T: tl.constexpr, G: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K K^T and Q K^T [C,C]."""
    column = tl.arange(0, BLOCK)
    kk = tl.zeros((C, C), tl.float32)
    qk = tl.zeros((C, C), tl.float32)
    for start in range(0, K, BLOCK):
        at = (start + column)[None, :]
        key = tile(k, batch, group, token[:, None], at, T, G, K)
        turned = tl.trans(key)
        kk = tl.dot(key, turned, acc=kk, input_precision=PRECISION)
        qk = tl.dot(tile(q, batch, group, token[:, None], at, T, G, K), turned, acc=qk, input_precision=PRECISION)
    return kk, qk


@jit
def prepare(
    q, k, v, log_g, beta, w_state, w_value, inner,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_S, W_V, and inner [B,H,N,2,C,C]: P and M."""
    n, pair = tl.program_id(0), tl.program_id(1)
    batch, head = place(pair, H)
    group = head // (H // G)
    dtype: tl.constexpr = k.dtype.element_ty
    row, column = tl.arange(0, C), tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    coarse, fine = _two_sums(_scalars(log_g, batch, head, token, T, H))
    kk, qk = _key_products(q, k, batch, group, token, T, G, K, C, BLOCK, PRECISION)
    weights = _pair_decays(coarse, fine, C) * _scalars(beta, batch, head, token, T, H)[None, :]
    strict = tl.where(row[:, None] > row[None, :], kk * weights, 0.0)
    inverse = invert_unit_lower(-strict, C, PRECISION).to(dtype)
    base = inner + chunk * 2 * C * C + row[:, None] * C + row[None, :]
    tl.store(base + P * C * C, (qk * weights).to(dtype))
    tl.store(base + INVERSE * C * C, inverse)
    decay = -tl.exp(coarse + fine)[:, None]
    for start in range(0, K, BLOCK):
        at = (start + column)[None, :]
        decayed = (tile(k, batch, group, token[:, None], at, T, G, K) * decay).to(dtype)
        put(w_state, tl.dot(inverse, decayed, input_precision=PRECISION), batch, head, token[:, None], at, T, H, K)
    for start in range(0, V, BLOCK):
        at = (start + column)[None, :]
        values = tile(v, batch, head, token[:, None], at, T, H, V)
        put(w_value, tl.dot(inverse, values, input_precision=PRECISION), batch, head, token[:, None], at, T, H, V)


@jit
def pass_states(
    q, k, log_g, beta, w_state, x0, y, start, x, states, final,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From chunk to chunk: X = W_S S + X0, S <- e^G_C S + K_end^T X; or REVERSE, with y = dO, the other one.

    states [B,H,N,V,K] are what each chunk begins with, in its direction; start and final are [B,H,K,V] float32.
    A program owns BLOCK value channels and holds the state transposed: on tensor cores one product's sums are then
    the next one's left operand as they lie.
    """
    column, key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, K)
    batch, head = place(tl.program_id(1), H)
    group = head // (H // G)
    dtype: tl.constexpr = k.dtype.element_ty
    row = tl.arange(0, C)
    chunks: tl.constexpr = (T + C - 1) // C
    ends = (batch * H + head) * K * V + key[None, :] * V + column[:, None]
    state = tl.load(start + ends)
    for step in range(chunks):
        n = chunks - 1 - step if REVERSE else step
        token = n * C + row
        chunk = (batch * H + head) * chunks + n
        tl.store(states + chunk * V * K + column[:, None] * K + key[None, :], state.to(dtype))
        coarse, fine = _two_sums(_scalars(log_g, batch, head, token, T, H))
        to_end, total = _from_last(coarse, fine, C)
        end, lost = chunk_decay(total)
        rest = _scalars(beta, batch, head, token, T, H) * tl.exp(to_end)
        new = state * end + state * lost
        removed = tile(x0, batch, head, token[None, :], column[:, None], T, H, V).to(tl.float32)
        if REVERSE:
            into = (tile(k, batch, group, token[None, :], key[:, None], T, G, K) * rest[None, :]).to(dtype)
            back = tile(w_state, batch, head, token[:, None], key[None, :], T, H, K)
            query = tile(q, batch, group, token[:, None], key[None, :], T, G, K)
            query = (query * tl.exp(coarse + fine)[:, None]).to(dtype)
            out = tile(y, batch, head, token[None, :], column[:, None], T, H, V)
            new = tl.dot(out, query, acc=new, input_precision=PRECISION)
        else:
            into = tile(w_state, batch, head, token[None, :], key[:, None], T, H, K)
            back = (tile(k, batch, group, token[:, None], key[None, :], T, G, K) * rest[:, None]).to(dtype)
        removed = tl.dot(state.to(dtype), into, acc=removed, input_precision=PRECISION)
        put(x, removed, batch, head, token[None, :], column[:, None], T, H, V)
        state = tl.dot(removed.to(dtype), back, acc=new, input_precision=PRECISION)
    tl.store(final + ends, state)


@jit
def outputs(
    q, log_g, inner, w, states, out,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = e^G Q S + P W."""
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    group = head // (H // G)
    row, column = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    coarse, fine = _two_sums(_scalars(log_g, batch, head, token, T, H))
    total = tl.zeros((C, BLOCK), tl.float32)
    total = through_state(q, states, total, batch, group, chunk, token, column, T, G, K, V, BLOCK_K, PRECISION)
    total = total * tl.exp(coarse + fine)[:, None]
    pairs = tl.load(inner + (chunk * 2 + P) * C * C + row[:, None] * C + row[None, :])
    values = tile(w, batch, head, token[:, None], column[None, :], T, H, V)
    total = tl.dot(pairs, values, acc=total, input_precision=PRECISION)
    put(out, total, batch, head, token[:, None], column[None, :], T, H, V)


@jit
def adjoint_values(
    w_state, w_value, inner, states, d_out, w, z,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W = W_S S + W_V again, and Z = P^T dO."""
    n, start, pair = tl.program_id(0), tl.program_id(1) * BLOCK, tl.program_id(2)
    batch, head = place(pair, H)
    row, column = tl.arange(0, C), start + tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    values = tile(w_value, batch, head, token[:, None], column[None, :], T, H, V).to(tl.float32)
    values = through_state(w_state, states, values, batch, head, chunk, token, column, T, H, K, V, BLOCK_K, PRECISION)
    put(w, values, batch, head, token[:, None], column[None, :], T, H, V)
    turned = tl.load(inner + (chunk * 2 + P) * C * C + row[None, :] * C + row[:, None])
    gradient = tile(d_out, batch, head, token[:, None], column[None, :], T, H, V)
    gradient = tl.dot(turned, gradient, input_precision=PRECISION)
    put(z, gradient, batch, head, token[:, None], column[None, :], T, H, V)


@jit
def pair_gradients(
    q, k, log_g, beta, inner, w, d_w, d_out, d_v, d_inner, d_total, d_beta,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dV = dZ = M^T dW, and of the pairs: d_inner [B,H,N,2,C,C] of K K^T and Q K^T, and what G and beta take.

    What a token pairs with itself has no decay: left out of d_total, where it would only cancel.
    """
    n, pair = tl.program_id(0), tl.program_id(1)
    batch, head = place(pair, H)
    group = head // (H // G)
    dtype: tl.constexpr = k.dtype.element_ty
    row, column = tl.arange(0, C), tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    inverse = tl.load(inner + (chunk * 2 + INVERSE) * C * C + row[None, :] * C + row[:, None])
    d_kk = tl.zeros((C, C), tl.float32)
    d_qk = tl.zeros((C, C), tl.float32)
    for start in range(0, V, BLOCK):
        at = (start + column)[None, :]
        known = tl.dot(inverse, tile(d_w, batch, head, token[:, None], at, T, H, V), input_precision=PRECISION)
        put(d_v, known, batch, head, token[:, None], at, T, H, V)
        turned = tl.trans(tile(w, batch, head, token[:, None], at, T, H, V))
        d_kk = tl.dot((-known).to(dtype), turned, acc=d_kk, input_precision=PRECISION)
        out = tile(d_out, batch, head, token[:, None], at, T, H, V)
        d_qk = tl.dot(out, turned, acc=d_qk, input_precision=PRECISION)
    coarse, fine = _two_sums(_scalars(log_g, batch, head, token, T, H))
    weight = _scalars(beta, batch, head, token, T, H)
    decay = _pair_decays(coarse, fine, C)
    strict = row[:, None] > row[None, :]
    d_kk = tl.where(strict, d_kk * decay, 0.0)
    d_qk = d_qk * decay
    base = d_inner + chunk * 2 * C * C + row[:, None] * C + row[None, :]
    tl.store(base + _D_KK * C * C, (d_kk * weight[None, :]).to(dtype))
    tl.store(base + _D_QK * C * C, (d_qk * weight[None, :]).to(dtype))
    kk, qk = _key_products(q, k, batch, group, token, T, G, K, C, BLOCK, PRECISION)
    of_pairs = tl.where(strict, d_kk * kk + d_qk * qk, 0.0)
    itself = tl.sum(tl.where(row[:, None] == row[None, :], d_qk * qk, 0.0), axis=0)
    later = tl.sum(of_pairs, axis=0)
    earlier = tl.sum(of_pairs * weight[None, :], axis=1)
    _put_scalars(d_total, earlier - weight * later, batch, head, token, T, H)
    _put_scalars(d_beta, later + itself, batch, head, token, T, H)


@jit
def key_gradients(
    q, k, log_g, beta, w, d_z, d_out, states, d_states, d_inner, d_total, d_pairs_beta, d_q, d_k, d_log_g, d_beta,
    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k, for each head that reads them, of log_g and of beta; BLOCK key channels at a time."""
    n, pair = tl.program_id(0), tl.program_id(1)
    batch, head = place(pair, H)
    group = head // (H // G)
    row, column = tl.arange(0, C), tl.arange(0, BLOCK)
    token = n * C + row
    chunk = (batch * H + head) * tl.cdiv(T, C) + n
    coarse, fine = _two_sums(_scalars(log_g, batch, head, token, T, H))
    to_end, total = _from_last(coarse, fine, C)
    weight = _scalars(beta, batch, head, token, T, H)
    decay, rest = tl.exp(coarse + fine), tl.exp(to_end)
    base = d_inner + chunk * 2 * C * C + row[:, None] * C + row[None, :]
    from_start = tl.zeros((C,), tl.float32)
    from_end = tl.zeros((C,), tl.float32)
    from_state = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        at = (start + column)[None, :]
        grad_q = tl.zeros((C, BLOCK), tl.float32)
        grad_k = tl.zeros((C, BLOCK), tl.float32)
        into = tl.zeros((C, BLOCK), tl.float32)
        for start_v in range(0, V, BLOCK_V):
            value = start_v + tl.arange(0, BLOCK_V)
            stored = chunk * V * K + value[:, None] * K + at
            state, d_state = tl.load(states + stored), tl.load(d_states + stored)
            out = tile(d_out, batch, head, token[:, None], value[None, :], T, H, V)
            grad_q = tl.dot(out, state, acc=grad_q, input_precision=PRECISION)
            known = tile(d_z, batch, head, token[:, None], value[None, :], T, H, V)
            grad_k = tl.dot(known, state, acc=grad_k, input_precision=PRECISION)
            values = tile(w, batch, head, token[:, None], value[None, :], T, H, V)
            into = tl.dot(values, d_state, acc=into, input_precision=PRECISION)
            from_state += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=0)
        query = tile(q, batch, group, token[:, None], at, T, G, K)
        key = tile(k, batch, group, token[:, None], at, T, G, K)
        grad_q = grad_q * decay[:, None]
        grad_k = -grad_k * decay[:, None]
        from_start += tl.sum(query * grad_q + key * grad_k, axis=1)
        from_end += tl.sum(key * into, axis=1)
        grad_k += into * (weight * rest)[:, None]
        pairs = tl.load(base + _D_QK * C * C)
        grad_q = tl.dot(pairs, key, acc=grad_q, input_precision=PRECISION)
        put(d_q, grad_q, batch, head, token[:, None], at, T, H, K)
        grad_k = tl.dot(tl.trans(pairs), query, acc=grad_k, input_precision=PRECISION)
        pairs = tl.load(base + _D_KK * C * C)
        grad_k = tl.dot(pairs, key, acc=grad_k, input_precision=PRECISION)
        grad_k = tl.dot(tl.trans(pairs), key, acc=grad_k, input_precision=PRECISION)
        put(d_k, grad_k, batch, head, token[:, None], at, T, H, K)
    from_end = from_end * rest
    _put_scalars(d_beta, _scalars(d_pairs_beta, batch, head, token, T, H) + from_end, batch, head, token, T, H)
    # A token's decay is in each G from it on, in each G_C - G before it, and in the state's.
    d_start = _scalars(d_total, batch, head, token, T, H) + from_start
    from_later = tl.sum(tl.where(row[:, None] >= row[None, :], d_start[:, None], 0.0), axis=0)
    before = tl.sum(tl.where(row[:, None] < row[None, :], (weight * from_end)[:, None], 0.0), axis=0)
    d_decay = from_later + before + tl.exp(total) * tl.sum(from_state, axis=0)
    _put_scalars(d_log_g, d_decay, batch, head, token, T, H)
