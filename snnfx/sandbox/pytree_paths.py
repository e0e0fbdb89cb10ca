"""Leaves of a pytree with their paths, also inside classes that are registered without keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snnfx.sandbox.torch_internals import pytree

__all__ = ["flatten_with_path"]


def flatten_with_path(tree: Any) -> tuple[list[tuple[tuple[Any, ...], Any]], pytree.TreeSpec]:
    """Flatten a pytree to `(path, leaf)` pairs and its structure.

    A class registered without `flatten_with_keys_fn`, which `tree_flatten_with_path` refuses, gets the index of each
    child as its key.
    """
    return list(_leaves((), tree)), pytree.tree_structure(tree)


def _leaves(path: tuple[Any, ...], tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if pytree.tree_is_leaf(tree):
        yield path, tree
        return

    def is_child(value: Any) -> bool:
        return value is not tree

    try:
        children: list[Any] = pytree.tree_flatten_with_path(tree, is_leaf=is_child)[0]
    except ValueError:
        values = pytree.tree_leaves(tree, is_leaf=is_child)
        children = [((pytree.SequenceKey(i),), value) for i, value in enumerate(values)]
    for key, child in children:
        yield from _leaves((*path, *key), child)
