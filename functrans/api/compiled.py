"""torch.compile of programs that use transforms, and compiled functions inside of transforms.

NOTE [Compiled transforms]
Dynamo, which traces Python for torch.compile and torch.export, does not see how a transform works. What a transform
returns asks whether it is being traced (``is_dynamo_compiling``, which Dynamo answers itself), and if so calls
``TRACED``: for Dynamo a higher-order operator, whose meaning ``api/dynamo.py`` hands over. It has the function
traced into a graph of its own, at the shapes that one example has, which makes all that the function captures (tensors
of closures, parameters, buffers) inputs of that graph; then it writes one call into the graph around it, that of the
transform proper on the function's graph. Whoever runs the graph around it, Python or AOTAutograd with its tracers,
thereby runs the transform as it is, with whatever stands in the graph inside: also transforms of the same kind.

Where that does not go (the function has effects, branches by numbers, cannot be traced, or asks for an error), Dynamo
breaks the graph, and the call takes place outside of it; under ``fullgraph=True``, that is Dynamo's error.

What asks the levels around it (a ``Primitive``, ``psum``, ``sow``, a ``custom_vjp``) is one node, ``CALLED``, that runs
where it stands. While Dynamo traces, no level runs; what such a call returns there is found among the levels of the
transforms that are being traced, which are entered for it once more (``seen_inside``).

Inside of a running transform, a compiled function is run as it was written: the transform has to see its operators.
Both are connected when torch._dynamo is imported, which functrans itself never does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.compiler import is_dynamo_compiling

from functrans.api.containers import is_container
from functrans.api.in_dims import check_inputs
from functrans.api.linear_functions import LinearFunction
from functrans.boundary.calls import lift
from functrans.core.tensor import NOT_READ, WrapperTensor
from functrans.errors import Call
from functrans.functionalization.scalar_index import SCALAR_INDICES
from functrans.pytorch.thread_state import STATE, running_at, unchanged
from functrans.pytorch.torch_private import (
    HigherOrderOperator,
    mode_kinds,
    mode_of_kind,
    set_grad_enabled,
    torch_pytree,
)
from functrans.tensors.pytrees import tree_unflatten

#: Transforms that are called with the function and its arguments at once.
AT_ONCE = ("jet", "jvp", "linear_transpose", "linearize", "vjp")
#: Those that return a function, which stays in the graph.
RETURNING = ("linear_transpose", "linearize", "vjp")
#: Those that switch grad mode on for the function.
RECORDING = (
    "grad", "grad_and_value", "value_and_grad", "jacrev", "jacrev_and_value", "hessian", "clipped_grad",
    "per_example_norms", "vjp", "linearize", "linear_transpose",
)  # fmt: skip

#: Stands for a leaf that is in the graph, and for one that is an object which the function alone uses.
HOLE: Any = type("Hole", (), {"__repr__": lambda self: "HOLE"})()
OPAQUE: Any = type("Opaque", (), {"__repr__": lambda self: "an object"})()


def transformed(
    transform: Callable[..., Any], func: Any, options: dict[str, Any], args: Any, kwargs: Any, tangents: Any = None
) -> Any:
    """The call that ``TRACED`` stands for. ``tangents``: those, or other tensors that the transform takes: options by
    name, or a tuple of what comes in front of the arguments, and is not for the function."""
    if transform.__name__ in AT_ONCE:
        return transform(func, args, tangents, **options) if tangents is not None else transform(func, *args, **options)
    if isinstance(tangents, tuple):
        return transform(func, **options)(*tangents, *args, **kwargs)
    return transform(func, **options, **(tangents or {}))(*args, **kwargs)


class Traced(HigherOrderOperator):
    """The name under which Dynamo knows a call of a transform; called as any function, it is that call, untraced."""

    def __init__(self) -> None:
        super().__init__("functrans_transform")

    def __call__(self, *args: Any) -> Any:
        return transformed(*args)


class Called(HigherOrderOperator):
    """The name of a call that means what the levels around it say: ``CALLED(function, args, kwargs)``."""

    def __init__(self) -> None:
        super().__init__("functrans_called")

    def __call__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


class Untraced(HigherOrderOperator):
    """Calls a function that Dynamo is not to look into: it breaks the graph, and says the reason."""

    def __init__(self) -> None:
        super().__init__("functrans_untraced")

    def __call__(self, what: str, reason: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return function(*args, **kwargs)


TRACED: Any = Traced()
CALLED: Any = Called()
UNTRACED: Any = Untraced()


def named_after(func: Callable[..., Any]) -> Callable[[Any], Any]:
    """``functools.wraps``, which Dynamo does not trace for all functions, and which it has no use for."""
    return unchanged if is_dynamo_compiling() else functools.wraps(func, updated=())


def call_with(func: Callable[..., Any], given: tuple[Any, Any]) -> Any:
    args, kwargs = given
    return func(*args, **kwargs)


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


def example_of(x: Tensor, dim: int | None, moves: bool) -> Tensor:
    """What the function is to see of ``x`` while Dynamo traces it.

    If it requires grad, Dynamo writes an autograd.Function down as one, and not the operators of its forward.
    """
    if dim is not None:
        return x.select(dim, 0)
    if not (moves and (x.is_floating_point() or x.is_complex())):
        return x
    with torch.enable_grad():
        return x.detach().requires_grad_().clone()  # a leaf might not be written to


def is_scalar(x: Tensor, dtypes: frozenset[torch.dtype]) -> bool:
    return x.dim() == 0 and x.dtype in dtypes


def unread(key: Any, dtypes: frozenset[torch.dtype]) -> tuple[Any, ...]:
    """The index ``key``, of which no tensor without dimensions of ``dtypes`` is read: NOTE [Scalar indices].

    Inside of the transform it belongs to that. Where Dynamo asks how the result looks, any place is as good.
    """
    tracing = STATE.top is None and mode_of_kind(mode_kinds.FAKE) is not None

    def scalar(i: Tensor) -> Any:
        if tracing:
            return True if i.dtype is torch.bool else 0
        return i if type(i) is WrapperTensor else lift(i, None, STATE.top)

    keys = key if isinstance(key, tuple) else (key,)
    return tuple(scalar(i) if isinstance(i, Tensor) and is_scalar(i, dtypes) else i for i in keys)


def at(x: Tensor, key: Any) -> Tensor:
    """``x[key]`` in Dynamo's graph, where ``key`` has numbers that are tensors."""
    return x[unread(key, SCALAR_INDICES)]


def put_at(x: Tensor, key: Any, value: Any) -> None:
    """``x[key] = value`` in Dynamo's graph, where ``key`` has numbers or truth values that are tensors."""
    x[unread(key, NOT_READ)] = value


def function_applied(
    forward: Any, backward: Any, *args: Any, non_differentiable_idx: Any, dirty_idx: Any = (), **options: Any
) -> Any:
    """A call of an ``autograd.Function`` whose methods Dynamo has traced: ``forward`` returns what it saves, too.

    PyTorch keeps that beside the Function, where the values of one level take the place of another's. As a Function
    that saves in its context it is what it is untraced: NOTE [Contexts per level] in door/autograd_function.py. So is
    what is differentiated again of its methods, which Dynamo traces without grad.
    """
    forward, backward = with_grad(forward), with_grad(backward)

    def run(ctx: Any, *args: Any) -> Any:
        out, saved = forward(*args)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in saved]
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in saved])
        ctx.mark_non_differentiable(*chosen(out, non_differentiable_idx))
        return out

    def run_and_mark(ctx: Any, *args: Any) -> Any:
        out = run(ctx, *args)
        ctx.mark_dirty(*chosen(out, dirty_idx))
        return out

    class InGraph(Function):
        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = zip(ctx.saved_tensors, ctx.constants, strict=True)
            return backward(*grads, *[constant if x is None else x for x, constant in saved])

    InGraph.forward = staticmethod(run_and_mark if dirty_idx else run)  # type: ignore[method-assign]
    return InGraph.apply(*args)


def with_grad(method: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A method of a Function as Dynamo traced it, but in the grad mode of whoever calls it."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(method.graph, {}))
    switches = [node for node in graph.nodes if node.target is set_grad_enabled]
    if [node.args for node in switches] not in ([], [(False,), (True,)]):
        raise NotImplementedError("A method of an autograd.Function switches grad mode on.")
    for node in switches:
        graph.erase_node(node)
    return torch.fx.GraphModule(method, graph)


def chosen(out: Any, places: Sequence[int]) -> list[Any]:
    outs = out if isinstance(out, (tuple, list)) else (out,)
    return [outs[i] for i in places]


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


#: Why a pullback breaks the graph.
MADE_OUTSIDE = "It was made outside of the graph."

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
