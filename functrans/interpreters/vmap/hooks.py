"""Hooks on gradients that levels below a vmap compute: a hook sees those of the examples, as the function sees values.

When a hook is run the vmap has ended, mostly, and it is run in one of its own; see NOTE [Leftovers]. A ``backward()``
inside of the vmap runs it there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import TYPE_CHECKING, Any

from torch import Tensor

from functrans.boundary.leftovers import as_here, suspended
from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.errors import DeadWrapperError, InsideTransformError
from functrans.pytorch.modules import forward_class
from functrans.pytorch.thread_state import running_at

if TYPE_CHECKING:
    from functrans.interpreters.vmap.interpreter import VmapInterpreter

Dims = Sequence[int | None]


def on_batches(outer: VmapInterpreter, hook: Callable[..., Any], *dims: Dims) -> Callable[..., Any]:
    """``hook``, which takes tuples of gradients, on physical ones that are batched along ``dims``; what it returns
    replaces those of the first tuple."""

    def kept(x: WrapperTensor) -> Any:
        """A gradient that a hook kept for another one, as modules' hooks do."""
        if outer.stands_for is None:
            raise DeadWrapperError(x)
        return outer.stands_for(x)

    def physical(*grads: tuple[Any, ...]) -> Any:
        running = outer.alive and outer.thread == get_ident()
        inner = outer if running else type(outer)(outer.batch_size, outer.randomness, hook)

        def entered(given: tuple[Any, ...], dims: Dims) -> tuple[Any, ...]:
            return tuple(inner.batched(g, d) if isinstance(g, Tensor) else g for g, d in zip(given, dims, strict=True))

        def left(x: Any, dim: Any) -> Any:
            value, bdim = (x.value, x.bdim) if inner.owns(x) else (x, None)
            if not isinstance(value, Tensor) or bdim == dim:
                return value
            if bdim is not None:
                return value.movedim(bdim, dim)
            return value.unsqueeze(dim).expand(*value.shape[:dim], outer.batch_size, *value.shape[dim:])

        def body() -> Any:
            return hook(*map(entered, grads, dims))

        if running:  # still, around a backward() inside, and may use what the hook keeps
            with running_at(outer):
                new = body()
        else:
            inner.stands_for = kept
            with suspended(outer, lambda x: inner.rewrap(x, as_here(x.value, expected=True))):
                new = run_transformed(inner, body)
        if new is None:
            return None
        new = new if isinstance(new, tuple) else (new,)
        return tuple(left(x, d) for x, d in zip(new, dims[0], strict=True))

    return physical


def on_batch(outer: VmapInterpreter, hook: Callable[[Tensor], Any], dim: int) -> Callable[[Tensor], Any]:
    """``hook`` of a tensor that is batched along ``dim``."""
    many = on_batches(outer, lambda grads: hook(*grads), (dim,))

    def physical(grad: Tensor) -> Any:
        new = many((grad,))
        return None if new is None else new[0]

    return physical


class BatchedGradFn:
    """``grad_fn`` of a batched tensor that a level below recorded, as ``node``; hooks are for those of Functions."""

    def __init__(self, interpreter: VmapInterpreter, node: Any) -> None:
        self.interpreter = interpreter
        self.node = node
        #: the Function that it is of, by vmap's rule for Functions; autograd's nodes name theirs so
        self._forward_cls = getattr(forward_class(node), "function", None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchedGradFn) and self.node == other.node

    def __hash__(self) -> int:
        return hash(self.node)

    def name(self) -> str:
        return self.node.name() if self._forward_cls is None else f"{self._forward_cls.__name__}Backward"

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        return tuple(
            (None if n is None else BatchedGradFn(self.interpreter, n), i) for n, i in self.node.next_functions
        )

    def register_prehook(self, hook: Callable[..., Any]) -> Any:
        _, outs = self.dims()
        return self.node.register_prehook(lambda grads: on_batches(self.interpreter, hook, outs(grads))(grads))

    def register_hook(self, hook: Callable[..., Any]) -> Any:
        ins, outs = self.dims()

        def physical(grads: Any, grad_outputs: Any) -> Any:
            return on_batches(self.interpreter, hook, ins, outs(grad_outputs))(grads, grad_outputs)

        return self.node.register_hook(physical)

    def dims(self) -> tuple[Dims, Callable[[Any], Dims]]:
        if self._forward_cls is None:
            cure = "Tensor.register_hook(), or Module.register_full_backward_hook()"
            raise InsideTransformError("a hook on grad_fn", self.interpreter.name, cure)
        return forward_class(self.node).in_dims, lambda grads: [0] * len(grads)
