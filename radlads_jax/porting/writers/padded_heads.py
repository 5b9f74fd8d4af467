"""Softmax heads without norms of q and k in a format that has them: padded by a constant, next to which q is small.

Of a head of size K the second half of 2 K channels is a bias C, for q and k alike. RMSNorm then divides by nearly
C / sqrt(2) whatever the first half is, with a relative error of |q|^2 / (2 K C^2), and its scale undoes that; the
constant's own scale is 0. RoPE turns the first half alone, which is the head as it was; where that has no RoPE, the
constant stands first, and what is turned is 0.
"""

import math

import jax.numpy as jnp
import numpy as np

SIZES = 2


def _undone(constant: float) -> float:
    """The scale of q and of k: C sqrt(1/2), and 2^(1/4) for scores that are divided by sqrt(2 K) and not sqrt(K)."""
    return constant * math.sqrt(1 / SIZES) * SIZES**0.25


def _miss(constant: float) -> float:
    stored = float(np.float32(_undone(constant) - 1).astype(jnp.bfloat16))
    return abs(stored + 1 - _undone(constant))


# About 2^12, and of bfloat16's values there the one whose scale bfloat16 holds best.
CONSTANT = min((float(32 * m) for m in range(128, 256)), key=lambda c: _miss(c) / c)


def norm(size: int, *, turned: bool = True) -> np.ndarray:
    """The stored scale of q's and k's norm [2 size]. turned: whether the head has RoPE."""
    halves = np.array([_undone(CONSTANT) - 1, -1], np.float32)
    return np.repeat(halves if turned else halves[::-1], size)


def padded(array: np.ndarray, heads: int, *, axis: int, value: float, before: bool = False) -> np.ndarray:
    """Every head's channels along the axis, and as many of this value behind them, or before them."""
    front, back = array.shape[:axis], array.shape[axis + 1 :]
    by_head = array.reshape(*front, heads, -1, *back)
    halves = [by_head, np.full_like(by_head, value)]
    return np.concatenate(halves[::-1] if before else halves, axis=axis + 1).reshape(*front, -1, *back)
