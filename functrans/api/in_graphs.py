"""What Dynamo is given to write into a graph in the place of what it would, inside of a transform.

See NOTE [Compiled transforms] in api/compiled.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.boundary.calls import lift
from functrans.core.tensor import NOT_READ, WrapperTensor
from functrans.functionalization.scalar_index import SCALAR_INDICES
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import mode_kinds, mode_of_kind, set_grad_enabled


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
