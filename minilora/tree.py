"""Parameters as trees: nested dicts and lists whose leaves are arrays.

A path names a leaf by the keys that lead to it, joined by dots: `blocks.0.attn.qkv.w`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Tree: TypeAlias = Any
"""A dict or list of trees, or an array; for a type checker, anything."""


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its path, in the tree's order."""
    if isinstance(tree, dict):
        branches = tree.items()
    elif isinstance(tree, list):
        branches = enumerate(tree)  # type: ignore[assignment]
    else:
        return {prefix: tree}
    return {
        path: leaf
        for key, branch in branches
        for path, leaf in flatten(branch, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The tree with these leaves, by path: the inverse of `flatten`.

    A dict whose keys are all whole numbers becomes a list; a missing index becomes an empty dict.
    """
    if "" in flat:
        return flat[""]
    branches: dict[str, dict[str, Any]] = {}
    for path, leaf in flat.items():
        key, _, rest = path.partition(".")
        branches.setdefault(key, {})[rest] = leaf
    tree = {key: unflatten(branch) for key, branch in branches.items()}
    if tree and all(key.isdecimal() for key in tree):
        return [tree.get(str(i), {}) for i in range(1 + max(map(int, tree)))]
    return tree


def map_leaves(f: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """The tree of `f(leaf, *leaves)`, where `leaves` are those of `others` at the same place."""
    if isinstance(tree, dict):
        return {
            key: map_leaves(f, branch, *(other[key] for other in others))
            for key, branch in tree.items()
        }
    if isinstance(tree, list):
        return [
            map_leaves(f, branch, *(other[i] for other in others)) for i, branch in enumerate(tree)
        ]
    return f(tree, *others)


def count(tree: Tree) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in flatten(tree).values())


def nbytes(tree: Tree) -> int:
    """How many bytes its arrays take."""
    return sum(leaf.nbytes for leaf in flatten(tree).values())
