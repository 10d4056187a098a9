"""Where two pytrees differ, and where a leaf stands in one, for errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree

from functrans.errors.wording import shown, what
from functrans.tensors.pytrees import NAMESPACE

PLURALS = ("args", "primals")


IsLeaf = Callable[[Any], bool] | None


def path_of(root: str, tree: Any, index: int, is_leaf: IsLeaf = None) -> str:
    """Where leaf ``index`` of ``tree`` stands: ``args[1]['weight']`` for ``root`` "args"."""
    return paths(root, tree, is_leaf)[index]


def paths(root: str, tree: Any, is_leaf: IsLeaf = None) -> list[str]:
    """Where each leaf of ``tree`` stands."""
    return [a.codify(root) for a in optree.tree_accessors(tree, is_leaf, none_is_leaf=True, namespace=NAMESPACE)]


def difference(root: str, given: Any, of: str, expected: Any, *, prefix: bool = False) -> tuple[str, str]:
    """The first place where the structures of ``given`` and ``expected`` differ: what is there, and what was expected.

    The trees are called ``root`` and ``of``. ``prefix``: a leaf of ``given`` stands for a whole subtree. Dicts are
    compared by key.
    """
    found = _difference("", given, expected, prefix)
    if found is None:  # they differ in what no notation shows, such as the context of a custom node
        return f"{what(given)} as {root}", f"the structure of {of}"
    path, g, e = found
    there = of + path if of.isidentifier() else of
    if _dicts(g, e) and g.keys() != e.keys():
        missing, extra = [shown(k) for k in e if k not in g], [shown(k) for k in g if k not in e]
        apart = [
            f"{word} {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
            for word, names in (("without", missing), ("with", extra))
            if names
        ]
        return f"{root}{path} {' and '.join(apart)}", f"the keys of {there}"
    if prefix and _is_leaf(e):
        return f"{what(g)} as {root}{path}", f"an int or None, since {there} is {what(e)}"
    return f"{what(g)} as {root}{path}", f"{what(e)}, as {there} {'are' if there in PLURALS else 'is'}"


def _difference(path: str, given: Any, expected: Any, prefix: bool) -> tuple[str, Any, Any] | None:
    if _is_leaf(given) and (prefix or _is_leaf(expected)):
        return None
    if _is_leaf(given) or _is_leaf(expected):
        return path, given, expected
    ours, theirs = _children(given), _children(expected)
    if not _dicts(given, expected) and type(given) is not type(expected) or ours.keys() != theirs.keys():
        return path, given, expected
    for step, child in ours.items():
        found = _difference(path + step, child, theirs[step], prefix)
        if found is not None:
            return found
    return None if type(given) is type(expected) else (path, given, expected)  # a dict and an OrderedDict


def _is_leaf(tree: Any) -> bool:
    return optree.tree_is_leaf(tree, none_is_leaf=True, namespace=NAMESPACE)


def _dicts(a: Any, b: Any) -> bool:
    return isinstance(a, dict) and isinstance(b, dict)


def _children(tree: Any) -> dict[str, Any]:
    """The children of a node, by the step that leads there."""
    accessors, children, _ = optree.tree_flatten_with_accessor(
        tree, lambda x: x is not tree, none_is_leaf=True, namespace=NAMESPACE
    )
    return {accessor.codify(""): child for accessor, child in zip(accessors, children, strict=True)}
