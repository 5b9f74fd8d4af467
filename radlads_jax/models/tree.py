"""Nested dicts of parameters, by path: split, merge, overlay, flatten."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import traverse_util

_Tree = TypeVar("_Tree")
# Strings are the keys, but for the stacks' numbers.
Params = dict[Any, Any]
ParamPath = tuple[str | int, ...]
_IN_STACK = re.compile(r"(?:^|/)stacks/(\d+)/(mixer/)?")


def split_params(params: Params, predicate: Callable[[str], bool]) -> tuple[Params, Params]:
    """(those whose "/"-joined path fulfils the predicate, the others), both without empty dicts; nothing is copied."""
    flat = flatten(params)
    chosen = {path for path in flat if predicate(shown(path))}
    first, second = ({path: leaf for path, leaf in flat.items() if (path in chosen) == mine} for mine in (True, False))
    return nest(first), nest(second)


def merge_params(first: Params, second: Params) -> Params:
    """The union of two dicts of disjoint paths. Raises ValueError for a path in both."""
    merged = dict(first)
    for key, value in second.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = merge_params(merged[key], value)
        else:
            raise ValueError(f"parameter {key!r} is in both parts of a split tree; each path belongs to one of them.")
    return merged


def overlay_params(below: Params, above: Params) -> Params:
    """`below` with the arrays of `above` in the place of its own."""
    return below | {
        key: overlay_params(below[key], value) if isinstance(value, dict) else value for key, value in above.items()
    }


def joined(path: tuple) -> str:
    """A leaf's path in a pytree, its keys joined with slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def stack_of(path: str) -> int | None:
    """The stack of the parameter that this path is or ends in, as in an optimizer's state; None for one in none."""
    found = _IN_STACK.search(path)
    return None if found is None else int(found[1])


def in_mixer(path: str) -> bool:
    """Whether the parameter that this path is or ends in stands in a stack's mixer."""
    found = _IN_STACK.search(path)
    return found is not None and found[2] is not None


def path_leaves(tree: Any) -> dict[str, Any]:
    """Every leaf of a pytree by its "/"-joined path; ValueError where two have the same."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {joined(path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError(
            f"{len(leaves)} leaves have only {len(flat)} different paths: a key holds a '/' or a dict mixes 1 and '1'. "
            "Rename the keys."
        )
    return flat


def from_path_leaves(like: _Tree, flat: dict[str, Any]) -> _Tree:
    """A tree like another, of leaves by their paths."""
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in path_leaves(like)])


def keys_of(path: str) -> ParamPath:
    """The keys of a path that is joined with slashes."""
    return tuple(path.split("/"))


def nest(flat: dict[ParamPath, Any]) -> dict[str, Any]:
    """A nested dict from values by path."""
    return traverse_util.unflatten_dict(flat)


def flatten(tree: dict[Any, Any]) -> dict[ParamPath, Any]:
    """The leaves of a nested dict by path."""
    return traverse_util.flatten_dict(tree)


def shown(path: ParamPath) -> str:
    """A path as it is written in messages: joined with slashes."""
    return "/".join(map(str, path))
