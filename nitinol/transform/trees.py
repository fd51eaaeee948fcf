"""Arguments and results that are nested tuples, lists and dicts, as a flat list of leaves and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

LEAF = "*"  # stands for a leaf in a structure


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves in order, and the structure: what `rebuild` needs, equal for equal nesting and names.
    None is no leaf."""
    leaves: list[Any] = []
    return leaves, _flatten(tree, leaves)


def _flatten(tree: Any, leaves: list[Any]) -> Any:
    kind = type(tree)
    if tree is None:
        return None
    if kind is tuple or kind is list:
        return kind, tuple([_flatten(item, leaves) for item in tree])
    if kind is dict:
        return kind, tuple([(name, _flatten(item, leaves)) for name, item in tree.items()])
    leaves.append(tree)
    return LEAF


def rebuild(structure: Any, leaves: Sequence[Any]) -> Any:
    """The same nesting with other leaves."""
    return _rebuild(structure, iter(leaves))


def _rebuild(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure == LEAF:
        return next(leaves)
    if structure is None:
        return None
    kind, items = structure
    if kind is dict:
        return {name: _rebuild(item, leaves) for name, item in items}
    return kind([_rebuild(item, leaves) for item in items])
