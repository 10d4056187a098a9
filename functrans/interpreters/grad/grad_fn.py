"""``grad_fn`` of a tracked tensor: the record of the tape that made it, by name, and the hooks on it.

Modules' backward hooks ask for it, and hooks on it (``register_full_backward_hook`` and its like). A record with hooks
has a node around its own; those without pay nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from weakref import ref

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from functrans.boundary.leftovers import suspended
from functrans.core.tensor import tensor_of
from functrans.errors import HookError
from functrans.interpreters.fitting import described, spec
from functrans.interpreters.function_context import Context

if TYPE_CHECKING:
    from functrans.interpreters.grad.interpreter import GradInterpreter

Hook = Callable[..., Any]


class GradFn:
    """Record number ``place`` of a tape, as autograd's nodes show themselves: a name, the records before, hooks."""

    def __init__(self, interpreter: GradInterpreter, place: int) -> None:
        self.interpreter = interpreter
        self.place = place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradFn) and (self.interpreter, self.place) == (other.interpreter, other.place)

    def __hash__(self) -> int:
        return hash((self.interpreter, self.place))

    def __repr__(self) -> str:
        return f"<{self.name()} of {self.interpreter.name}>"

    @property
    def _forward_cls(self) -> Any:
        """The ``autograd.Function`` that it is of, as autograd's nodes name it; None for another."""
        return getattr(self.interpreter.tape[self.place][3], "cls", None)

    def name(self) -> str:
        node, _, _, saved = self.interpreter.tape[self.place]
        cls = self._forward_cls
        return str(node.operator(saved)) if cls is None else f"{cls.__name__}Backward"

    @property
    def next_functions(self) -> tuple[tuple[GradFn | None, int], ...]:
        """The records of its inputs, None for an argument of the transform."""
        ins = self.interpreter.tape[self.place][2]
        return tuple((grad_fn_of(self.interpreter, i), 0) for i in ins if type(i) is int)

    def register_prehook(self, hook: Hook) -> RemovableHandle:
        """Run ``hook`` on the cotangents of the outputs; what it returns, if not None, takes their place."""
        return added(self.hooked().before, hook)

    def register_hook(self, hook: Hook) -> RemovableHandle:
        """Run ``hook`` on the cotangents of the inputs and of the outputs; what it returns replaces the former."""
        return added(self.hooked().after, hook)

    def hooked(self) -> HookedNode:
        node, outs, ins, saved = self.interpreter.tape[self.place]
        if type(node) is not HookedNode:
            node = HookedNode(self.interpreter, node)
            self.interpreter.tape[self.place] = node, outs, ins, saved
        return node


def added(hooks: OrderedDict[int, Hook], hook: Hook) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


class HookedNode:
    """A node with hooks before and after it."""

    def __init__(self, interpreter: GradInterpreter, node: Any) -> None:
        self.interpreter = ref(interpreter)  # which holds the node
        self.node = node
        self.before: OrderedDict[int, Hook] = OrderedDict()
        self.after: OrderedDict[int, Hook] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.node, name)

    def pull(self, saved: Any, grad: Any) -> list[Any]:
        grads = tuple(grad) if type(grad) is list else (grad,)
        for hook in list(self.before.values()):
            grads = replaced(hook, "register_prehook", self.run(hook, grads), grads)
        found = self.node.pull(saved, list(grads) if type(grad) is list else grads[0])
        if not self.after:
            return found
        ctx = getattr(saved, "ctx", None)  # of an autograd.Function, which has a place for every input
        needed = ctx.needs_input_grad if type(ctx) is Context else [True] * len(found)
        each = iter(found)
        given = tuple(tensor_of(next(each)) if n else None for n in needed)
        for hook in list(self.after.values()):
            given = replaced(hook, "register_hook", self.run(hook, given, grads), given)
        return [g for g, n in zip(given, needed, strict=True) if n]

    def run(self, hook: Hook, *grads: tuple[Any, ...]) -> Any:
        interpreter = self.interpreter()
        with nullcontext() if interpreter is None else suspended(interpreter):
            return hook(*grads)


def replaced(hook: Hook, how: str, new: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
    """The cotangents that ``hook`` returned, in the place of ``old``."""
    if new is None:
        return old
    new = new if isinstance(new, tuple | list) else (new,)
    if len(new) != len(old):
        raise HookError(hook, f"{len(new)} gradients", f"expected {len(old)}", f"grad_fn.{how}")
    for n, o in zip(new, old, strict=True):
        if isinstance(o, Tensor) and n is not None and not (isinstance(n, Tensor) and spec(n) == spec(o)):
            raise HookError(hook, described(n), described(o), f"grad_fn.{how}")
    return tuple(None if o is None else n for n, o in zip(new, old, strict=True))


def grad_fn_of(interpreter: GradInterpreter, index: int) -> GradFn | None:
    """The record that made ``index``; None for an argument of the transform."""
    tape = interpreter.tape
    for place in range(len(tape) - 1, -1, -1):
        outs = tape[place][1]
        if index == outs if type(outs) is int else index in outs:
            return GradFn(interpreter, place)
    return None
