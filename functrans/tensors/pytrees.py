"""Pytrees: optree in PyTorch's namespace, so that what is registered with torch's own pytree is known here too."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optree
from torch import Tensor

from functrans.pytorch.torch_private import TREE_NODES

NAMESPACE = "torch"
TreeSpec = optree.PyTreeSpec


def elements(a: Any) -> Iterator[Any]:
    """What stands in ``a``, an argument of an operator, or a list of arguments or results, and in lists within it."""
    if isinstance(a, (list, tuple)):
        for x in a:
            yield from elements(x)
    else:
        yield a


def tensors_in(values: Iterable[Any]) -> list[Any]:
    """The tensors among arguments or results of operators, and in lists among them."""
    found: list[Any] = []
    for v in values:
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (list, tuple)):
            found.extend(tensors_in(v))
    return found


def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of ``tree``; None is a leaf, and so is what ``is_leaf`` says."""
    kind = type(tree)
    if kind in TENSORS:
        return [tree], LEAF
    if kind is tuple and len(tree) < MANY:
        for x in tree:
            if type(x) not in TENSORS:
                break
        else:
            return list(tree), TUPLES[len(tree)]
    leaves, spec = optree.tree_flatten(tree, is_leaf, none_is_leaf=True, namespace=NAMESPACE)
    for leaf in leaves:
        if type(leaf) in TREE_NODES and not isinstance(leaf, Tensor) and _adopt(type(leaf)):
            return tree_flatten(tree, is_leaf)
    return leaves, spec


#: Types that are leaves without asking optree, which takes most of a microsecond; ``functrans.core.tensor`` adds its
#: wrapper.
TENSORS: set[type] = {Tensor}
LEAF_OBJECT: Any = object()
#: The structures of one tensor, and of tuples of 0, 1, 2, ... tensors, but not of so many.
MANY = 9
LEAF: TreeSpec = optree.tree_structure(LEAF_OBJECT, none_is_leaf=True, namespace=NAMESPACE)
TUPLES: list[TreeSpec] = [
    optree.tree_structure((LEAF_OBJECT,) * n, none_is_leaf=True, namespace=NAMESPACE)  # type: ignore[arg-type]
    for n in range(MANY)
]


def tree_unflatten(spec: TreeSpec, leaves: Any) -> Any:
    if spec is LEAF:
        (leaf,) = leaves
        return leaf
    if type(leaves) is list and (n := len(leaves)) < MANY and spec is TUPLES[n]:
        return tuple(leaves)
    return optree.tree_unflatten(spec, leaves)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``function`` applied to every leaf."""
    if type(tree) in TENSORS or tree is None:
        return function(tree)
    leaves, spec = tree_flatten(tree)
    return tree_unflatten(spec, [function(leaf) for leaf in leaves])


def broadcast_prefix(
    prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any] | None:
    """``prefix``, a tree with the structure of ``tree``'s upper part, given once per leaf; None if it does not fit."""
    try:
        return optree.broadcast_prefix(in_order_of(prefix, tree), tree, is_leaf, none_is_leaf=True, namespace=NAMESPACE)
    except ValueError:
        return None


def leaves_like(
    tree: Any, spec: TreeSpec, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of ``tree``, whose dicts are taken in the order of those in ``spec``."""
    leaves, own = tree_flatten(tree, is_leaf)
    if own == spec or own.num_leaves != spec.num_leaves:
        return leaves, own
    return tree_flatten(in_order_of(tree, tree_unflatten(spec, [None] * spec.num_leaves)), is_leaf)


DICTS = (dict, OrderedDict, defaultdict)


def in_order_of(tree: Any, like: Any) -> Any:
    """``tree`` with its dicts in the order of those in ``like``, so that the leaves of both can be matched by position.

    Where the two do not match, ``tree`` stays as it is; where ``tree`` or ``like`` ends, so does the other's order.
    """
    if type(tree) in DICTS and type(like) in DICTS:
        if tree.keys() != like.keys():
            return tree
        ordered = tree.copy()
        for key in like:
            del ordered[key]
            ordered[key] = in_order_of(tree[key], like[key])
        return ordered
    if type(tree) is not type(like) or type(tree) in TENSORS or type(tree) is int:
        return tree
    if type(tree) is tuple or type(tree) is list:
        pairs = zip(tree, like, strict=False)
        return type(tree)([in_order_of(a, b) for a, b in pairs]) if len(tree) == len(like) else tree
    children, spec = one_level(tree)
    others, _ = one_level(like)
    if len(children) != len(others) or spec.num_nodes == 1:
        return tree
    return tree_unflatten(spec, [in_order_of(a, b) for a, b in zip(children, others, strict=True)])


def one_level(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The children of ``tree`` and how they stand in it."""
    return optree.tree_flatten(tree, is_leaf=lambda x: x is not tree, none_is_leaf=True, namespace=NAMESPACE)


def _adopt(kind: type) -> bool:
    """Make a type that only torch's Python pytree knows (a dataclass, say) known to optree as well."""
    node = TREE_NODES.get(kind)
    if node is None:
        return False

    def flatten(x: Any) -> tuple[Any, Any]:
        children, context = node.flatten_fn(x)
        return tuple(children), Context(context)

    def unflatten(context: Any, children: Any) -> Any:
        return node.unflatten_fn(list(children), context.value)

    try:
        optree.register_pytree_node(kind, flatten, unflatten, namespace=NAMESPACE)
    except ValueError:  # known already: the leaf was of that type for another reason
        return False
    return True


class Context:
    """A node's context, compared by value where it can be."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Context) and bool(self.value == other.value)

    def __hash__(self) -> int:
        return hash(type(self.value))
