"""A chunk's pairs of tokens sorted into levels, so that no pair's decay is the quotient of large exponentials.

Every pair is served at one level: neighbours in a group of GROUP tokens, with exponents counted from the group's
middle; all others where a boundary between two spans of 8, 16, ... tokens comes between them, with both exponents
counted from that boundary and so never positive.
"""

import functools
from typing import NamedTuple

import numpy as np

GROUP = 8


class _Levels(NamedTuple):
    """Constants of a chunk size, for L levels.

    `sums` [L+2,C,C]: times log_w they give each level's exponents, the sums from the chunk's start to each token
    (itself included), and from each token (itself not included) to the chunk's end. `sign` [L,1,1] is -1 where a
    key's exponent is the opposite of a receptance's. `masks` [L,C,C]: the pairs of each level; together, all i > j.
    """

    sums: np.ndarray
    sign: np.ndarray
    masks: np.ndarray


@functools.cache
def levels(size: int) -> _Levels:
    """The levels of a chunk of `size` tokens, a power of two."""
    i, j = np.indices((size, size))
    start, end = j <= i, j > i
    group = min(GROUP, size)
    middle = i // group * group + group // 2
    centred = np.where(i >= middle, (j <= i) & (j > middle), 0) - np.where(i < middle, (j > i) & (j <= middle), 0)
    sums, sign, masks = [centred], [-1], [(i // group == j // group) & (j < i)]
    span = group
    while span < size:
        in_span, second = i // span == j // span, i // span % 2 == 1
        sums.append(in_span & np.where(second, start, end))
        sign.append(1)
        masks.append((i // span == j // span + 1) & second)
        span *= 2
    sums += [start, end]
    signs = np.asarray(sign, np.float32)[:, None, None]
    return _Levels(np.asarray(sums, np.float32), signs, np.asarray(masks, np.float32))
