"""``Tensor.grad`` of wrappers, and what hangs on it: tensors that keep their gradient, hooks on what was added up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.door.leaves import can_be_leaf, leaves_of
from functrans.errors.misuse import RESERVED
from functrans.interpreters.grad.again import CURE
from functrans.pytorch.thread_state import running_at
from functrans.tensors.answers import REFUSED, refuse


def grad_of(self: WrapperTensor) -> Tensor | None:
    """``Tensor.grad``: of a leaf made inside, of a captured leaf, or what ``retain_grad`` asked for."""
    kept = self.__dict__.get("cotangent")
    if kept is not None or self.leaf is not None:
        return kept
    x: Any = self
    while type(x) is WrapperTensor:
        if x.interpreter.records(x) and getattr(x.interpreter, "passed_by", False):
            refuse(self, "Tensor.grad of what a transform records, after backward(),", "torch.autograd.grad(loss, x)")
        x = x.value
    if not can_be_leaf(self) or not x.is_leaf:
        return None
    with running_at(None):
        found = x.grad
    return None if found is None else like(self, found)


def like(x: Any, value: Tensor) -> Tensor:
    """``value`` as examples, as ``x`` is of its base."""
    return x.interpreter.rewrap(x, like(x.value, value)) if type(x) is WrapperTensor else value


def add_to_grad(x: WrapperTensor, g: Any, create_graph: bool) -> None:
    """``x.grad += g`` at the level of ``x``, where ``g`` is of the level that runs."""
    while type(g) is WrapperTensor and g.interpreter.level > x.interpreter.level:
        if not g.interpreter.is_constant(g):
            refuse(g, "Tensor.backward() to a leaf that was made outside of it", CURE)
        g = g.value
    kept = x.__dict__.get("cotangent")
    with running_at(x.interpreter), torch.set_grad_enabled(create_graph):
        if type(kept) is WrapperTensor and not create_graph:
            kept.add_(g)  # in place, as PyTorch does: the program may hold it
        else:
            x.cotangent = g if kept is None else kept + g
        for hook in list(x.__dict__.get("after_adding", {}).values()):
            hook(x)


def register_post_accumulate_grad_hook(self: WrapperTensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """``Tensor.register_post_accumulate_grad_hook``, of a leaf that was made inside."""
    if not self.requires_grad or self.leaf is None:
        refuse(self, *REFUSED["register_post_accumulate_grad_hook"])
    hooks = self.__dict__.setdefault("after_adding", OrderedDict())
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def retain_grad(self: WrapperTensor) -> None:
    """``Tensor.retain_grad``: of what a level records, or of what comes of leaves that were made inside."""
    if not self.requires_grad:
        raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
    level: Any = self.interpreter
    if level.records(self):
        level.retain(self)
    elif self.leaf is None and not retains_grad(self):
        if not all(hasattr(leaf, "leaf_inside") for leaf in leaves_of(self)):  # its gradient comes after the transform
            refuse(self, "Tensor.retain_grad()", "functrans.vjp inside, whose pullback returns cotangents")
        if not hasattr(level, "retaining_below"):
            level.retaining_below = []
        level.retaining_below.append(ref(self))


def retains_grad(self: WrapperTensor) -> bool:
    return any(x is self for x in keeping(self.interpreter))


def set_grad(self: WrapperTensor, value: Tensor | None) -> None:
    """``x.grad = value``."""
    if value is not None:
        if not isinstance(value, Tensor):
            raise TypeError(f"assigned grad expected to be a Tensor or None but got grad of type {type(value)}")
        if value.shape != self.shape or value.dtype != self.dtype:
            kinds = [f"{x.dtype} of size {list(x.shape)}".removeprefix("torch.") for x in (value, self)]
            raise RuntimeError(f"assigned grad is {kinds[0]}, and the tensor {kinds[1]}")
    self.cotangent = value


def delete_grad(self: WrapperTensor) -> None:
    self.cotangent = None


def keeping(level: Interpreter) -> list[WrapperTensor]:
    """The tensors of a level that keep their gradient, and are alive."""
    below = (kept() for kept in getattr(level, "retaining_below", ()))
    return [*getattr(level, "retaining", ()), *(x for x in below if x is not None)]


RESERVED.update(("cotangent", "after_adding"))
for _name, _member in (
    ("grad", property(grad_of, set_grad, delete_grad)),
    ("register_post_accumulate_grad_hook", register_post_accumulate_grad_hook),
    ("retain_grad", retain_grad),
    ("retains_grad", property(retains_grad)),
):
    setattr(WrapperTensor, _name, _member)
