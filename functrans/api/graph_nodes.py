"""Calls of transforms as they stand in Dynamo's graph: see NOTE [Compiled transforms] in api/compiled.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.api.compiled import transformed
from functrans.api.containers import is_container
from functrans.api.in_dims import check_inputs
from functrans.api.linear_functions import LinearFunction
from functrans.errors import Call
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import torch_pytree
from functrans.tensors.pytrees import tree_unflatten

#: Stands for a leaf that is in the graph, and for one that is an object which the function alone uses.
HOLE: Any = type("Hole", (), {"__repr__": lambda self: "HOLE"})()
OPAQUE: Any = type("Opaque", (), {"__repr__": lambda self: "an object"})()


class Around(NamedTuple):
    """A transform whose function Dynamo is tracing, and what it is called with."""

    transform: Callable[..., Any]
    options: dict[str, Any]
    args: Any
    kwargs: Any
    tangents: Any


class Seen(BaseException):
    """Leaves a transform, whatever it makes of results, with what was seen inside."""

    def __init__(self, result: Any) -> None:
        self.result = result


def seen_inside(around: Sequence[Around], call: Callable[[], Any]) -> Any:
    """What ``call`` returns inside of these transforms, the outermost first, with plain tensors in place of theirs."""
    if not around:
        return call()

    def func(*args: Any, **kwargs: Any) -> Any:
        result = seen_inside(around[1:], call)
        with running_at(None), torch.enable_grad():
            raise Seen(torch_pytree.tree_map_only(Tensor, like, result))

    try:
        outermost = around[0]
        transformed(outermost.transform, func, *outermost[1:])
    except Seen as seen:
        return seen.result
    raise AssertionError("the function was not called")


def like(x: Tensor) -> Tensor:
    """A plain tensor that looks as ``x`` does, and requires grad as examples do."""
    found = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return found.requires_grad_().clone() if x.is_floating_point() or x.is_complex() else found


class Tree:
    """A tree of arguments or results: its leaves, with HOLE for what is in the graph, and how they stand in it."""

    def __init__(self, leaves: list[Any], spec: Any) -> None:
        self.leaves, self.spec = leaves, spec

    def filled(self, values: Iterator[Any]) -> Any:
        return torch_pytree.tree_unflatten(filled(self.leaves, values), self.spec)

    def in_graph(self, like: Any) -> list[Any]:
        """The leaves of ``like``, a tree of this structure, that are in the graph."""
        return holes(self, self.spec.flatten_up_to(like))


def filled(leaves: list[Any], values: Iterator[Any]) -> list[Any]:
    return [next(values) if x is HOLE else x for x in leaves]


def holes(tree: Tree, leaves: Sequence[Any]) -> list[Any]:
    return [x for x, own in zip(leaves, tree.leaves, strict=True) if own is HOLE]


#: What a graph holds of what a transform returns.
HELD = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool, LinearFunction)


def is_linear(x: Any) -> bool:
    """Whether ``x`` is a pullback: a tree to others, one object in a graph."""
    return isinstance(x, LinearFunction)


class Node:
    """A call in Dynamo's graph that returns tensors; what it returned them in is known when it has run once."""

    results: Tree | None = None
    failure: Exception | None = None
    #: the transforms inside of which it runs for the first time, if it asks the levels around it
    around: Sequence[Around] = ()

    def run(self, call: Callable[[], Any]) -> tuple[Any, ...]:
        try:
            out = seen_inside(self.around, call) if self.results is None else call()
            leaves, spec = torch_pytree.tree_flatten(out, is_leaf=is_linear)
        except Exception as error:
            self.failure = error
            raise
        if self.results is None:
            self.results = Tree([HOLE if isinstance(x, HELD) else x for x in leaves], spec)
        return tuple(holes(self.results, leaves))


class TransformNode(Node):
    """One call of a transform in Dynamo's graph: what has to be known beside the tensors to run it.

    ``target`` makes the function that stands in the graph, which runs for the first time on Dynamo's fake tensors.
    """

    def __init__(
        self, transform: Callable[..., Any], options: dict[str, Any], arguments: Tree, tangents: Tree, seen: Tree
    ) -> None:
        self.transform, self.options, self.arguments, self.tangents = transform, options, arguments, tangents
        self.seen = seen  # the arguments as the function gets them: containers without their batch

    def target(self, graph: Callable[..., Any], outputs: Tree) -> Callable[..., Any]:
        """From tensors to tensors, by the function's ``graph``, which returns ``outputs``."""

        def call(*tensors: Any) -> tuple[Any, ...]:
            rest = iter(tensors)
            args, kwargs = self.arguments.filled(rest)
            tangents = self.tangents.filled(rest)
            captured = tuple(rest)

            def func(*args: Any, **kwargs: Any) -> Any:
                return outputs.filled(iter(graph(*self.seen.in_graph((args, kwargs)), *captured)))

            return self.run(lambda: transformed(self.transform, func, self.options, args, kwargs, tangents))

        call.__name__ = call.__qualname__ = f"functrans_{self.transform.__name__}"
        return call


class CalledNode(Node):
    """One call in Dynamo's graph of a function that asks the levels around it."""

    def __init__(self, function: Callable[..., Any], arguments: Tree) -> None:
        self.function, self.arguments = function, arguments

    def target(self) -> Callable[..., Any]:
        def call(*tensors: Any) -> tuple[Any, ...]:
            args, kwargs = self.arguments.filled(iter(tensors))
            return self.run(lambda: self.function(*args, **kwargs))

        call.__name__ = call.__qualname__ = "functrans_call"
        return call


class PullbackNode(Node):
    """One call of a pullback in Dynamo's graph."""

    def __init__(self, arguments: Tree) -> None:
        self.arguments = arguments

    def target(self) -> Callable[..., Any]:
        def functrans_pullback(pullback: Callable[..., Any], *tensors: Any) -> tuple[Any, ...]:
            args, kwargs = self.arguments.filled(iter(tensors))
            return self.run(lambda: pullback(*args, **kwargs))

        return functrans_pullback


def sights(
    transform: Callable[..., Any], options: dict[str, Any], args: Any, kwargs: Any
) -> tuple[list[tuple[int | None, bool]], Any]:
    """For each leaf of the arguments, the dimension of which the function sees one example, and whether it moves; and
    how the leaves stand in what the function sees."""
    moving: set[int] = set()
    if "argnums" in options or "in_dims" not in options:
        argnums = options.get("argnums", tuple(range(len(args))))
        moving = {i % len(args) for i in (argnums if isinstance(argnums, tuple) else (argnums,))}
    moves = [i in moving for i, arg in enumerate(args) for _ in torch_pytree.tree_leaves(arg)]
    if "in_dims" in options:
        in_dims = options["in_dims"]
        if in_dims is None:  # of those that belong to single examples
            in_dims = tuple(None if i in moving else 0 for i in range(len(args)))
        leaves, dims, spec, _ = check_inputs(Call("vmap", len, {"in_dims": in_dims}), in_dims, args)
        of_leaf = {id(x): d for leaf, d in zip(leaves, dims, strict=True) for x in torch_pytree.tree_leaves(leaf)}
        found = [of_leaf.get(id(x)) if isinstance(x, Tensor) else None for x in torch_pytree.tree_leaves(args)]
        if any(map(is_container, leaves)):  # it knows its batch size
            first = lambda x, d: x if d is None or not is_container(x) else x[(slice(None),) * d + (0,)]
            args = tree_unflatten(spec, list(map(first, leaves, dims)))
    else:
        found = [None] * len(moves)
    seen: list[tuple[int | None, bool]] = list(zip(found, moves, strict=True))
    seen += [(None, False) for _ in torch_pytree.tree_leaves(kwargs)]
    return seen, torch_pytree.tree_flatten((args, kwargs))[1]
