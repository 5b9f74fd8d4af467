"""Damage of any kind of file, for the generators of fuzz_files.py."""

import copy
import random
from typing import Any

Rng = random.Random
JUNK = (
    None,
    True,
    False,
    0,
    -1,
    3,
    1.5,
    1e308,
    10**30,
    -(10**30),
    float("nan"),
    float("inf"),
    "",
    "12",
    "\0",
    "\ud800",
)
JUNK += ("../../etc/passwd", [], [[]], [1, "a"], {}, {"a": {"b": []}}, [None] * 1000, "x" * 100_000)


def flipped(rng: Rng, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """One to four random bytes between start and stop changed."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(start, stop or len(changed))] ^= rng.randint(1, 255)
    return bytes(changed)


def truncated(rng: Rng, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def deep(rng: Rng) -> str:
    depth = rng.choice((1_000, 100_000, 1_000_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + "1" + rng.choice(("", closing * depth))


def mutated(rng: Rng, tree: Any) -> Any:
    """A JSON value with one random place in it replaced, removed or doubled."""
    tree = copy.deepcopy(tree)
    node, parent, key = tree, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        parent, key = node, rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        node = parent[key]
    action = rng.random()
    if parent is None or action < 0.7:
        junk = copy.deepcopy(rng.choice(JUNK))
        if parent is None:
            return junk
        parent[key] = junk
    elif action < 0.85:
        del parent[key]
    elif isinstance(parent, dict):
        parent[rng.choice(list(parent))] = node
    else:
        parent.insert(key, node)
    return tree
