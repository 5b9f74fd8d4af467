"""What the recurrences' Triton kernels share: tiles in and out, segments, decays, the inverse of a chunk's matrix.

Sequences are [B,T,H,D], a chunk has C tokens, a block BK channels.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit of the function as written: what a run-time type checker wraps it in has other globals."""
    return triton.jit(inspect.unwrap(function))


@jit
def place(pair, H: tl.constexpr):
    """Batch (64 bits: offsets pass 2^31) and head of a program."""
    return (pair // H).to(tl.int64), pair % H


@jit
def _sequence(batch, head, token, column, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """Offsets in [B,T,H,D]; token and column are expanded against each other by the caller."""
    return ((batch * T + token) * H + head) * D + column


@jit
def tile(pointer, batch, head, token, column, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """A tile of [B,T,H,D], zeros beyond the last token."""
    return tl.load(pointer + _sequence(batch, head, token, column, T, H, D), mask=token < T, other=0.0)


@jit
def put(pointer, value, batch, head, token, column, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr):
    """Stores a tile of [B,T,H,D]."""
    offsets = _sequence(batch, head, token, column, T, H, D)
    tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=token < T)


@jit
def segment_starts(segment_ids, batch, n, T: tl.constexpr, C: tl.constexpr, RESETS: tl.constexpr):
    """[C] bool: the state resets before this token of chunk n."""
    token = n * C + tl.arange(0, C)
    if RESETS:
        later = (token > 0) & (token < T)
        here = tl.load(segment_ids + batch * T + token, mask=later, other=0)
        before = tl.load(segment_ids + batch * T + token - 1, mask=later, other=0)
        return here != before
    return token < 0


@jit
def segments_passed(starts):
    """[C] int32: resets from the chunk's start to each token."""
    return tl.cumsum(starts.to(tl.int32), axis=0)


@jit
def from_middle(log_w, C: tl.constexpr):
    """The sums G - G_mid [C,BK] of log_w, and the row vectors G_mid and G_C - G_mid."""
    row = tl.arange(0, C)[:, None]
    total = tl.cumsum(log_w, axis=0)
    middle = tl.sum(tl.where(row < C // 2, log_w, 0.0), axis=0)
    rest = tl.sum(tl.where(row >= C // 2, log_w, 0.0), axis=0)
    return total - middle[None, :], middle, rest


@jit
def chunk_decay(total):
    """e^total as a float32 and what its rounding left out, kept where decay is weak.

    Over a thousand chunks of the same weak decay that rounding would add up, always to the same side.
    """
    end = tl.exp(total)
    series = 1.0 + total * (1.0 / 8.0)
    for term in tl.static_range(6):
        series = 1.0 + series * total * (1.0 / (7 - term))
    rest = tl.where(end > 0.5, series * total - (end - 1.0), 0.0)
    return end, rest


@jit
def invert_unit_lower(strict, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I - strict)^-1 of a strictly lower triangular [C,C], by merging diagonal blocks of doubling width."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    corner = tl.where((row == column + 1) & (row % 2 == 1), strict, 0.0)
    inverse = tl.where(row == column, 1.0, corner)
    for level in tl.static_range(1, 6):
        if 2**level < C:
            block = row // 2**level
            corner = tl.where((block == column // 2**level + 1) & (block % 2 == 1), strict, 0.0)
            half = tl.dot(inverse, corner, input_precision=PRECISION)
            inverse = tl.dot(half, inverse, acc=inverse, input_precision=PRECISION)
    return inverse
