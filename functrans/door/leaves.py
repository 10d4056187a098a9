"""Examples of a vmap as leaves of PyTorch's own autograd: ``requires_grad_``, ``grad`` and ``backward`` of wrappers.

The leaf is the whole batch, at the base. What a loop over the examples would have is what there is.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from functrans.core.errors import RequiresGradError
from functrans.core.errors.refusals import REFUSED, Refusing, concrete, refuse
from functrans.core.stack import interpreter_stack
from functrans.core.subclasses import ones_for
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import lowered, running_at
from functrans.door.autograd_inside import of_batch, values_at
from functrans.interpreters.vmap.interpreter import VmapInterpreter


def requires_grad_(self: WrapperTensor, requires_grad: bool = True) -> Tensor:
    """``Tensor.requires_grad_``, which makes a leaf at the base of examples that no level differentiates by."""
    if not requires_grad or self.requires_grad:
        return self
    # torch.nn.Parameter(w) detaches first: what it was taken from counts. On a constant its call means nothing:
    # constructors of modules do it.
    origin = self if self.view_link is None else self.view_link.base_content()
    by_module = sys._getframe(1).f_globals.get("__name__") == nn.Parameter.__module__
    if by_module and concrete(self) is not None and concrete(origin) is not None:
        return self
    if not (is_examples(self) and is_examples(origin)):
        raise RequiresGradError(self.interpreter.name)
    self.value = leaf_of(self.value)
    return self


def is_examples(x: Any) -> bool:
    """Whether ``x`` is a plain tensor, of which vmaps see examples."""
    while type(x) is WrapperTensor:
        if not (isinstance(x.interpreter, VmapInterpreter) or x.interpreter.is_constant(x)):
            return False
        x = x.value
    return True


def leaf_of(x: Any) -> Tensor:
    if type(x) is WrapperTensor:
        return x.interpreter.rewrap(x, leaf_of(x.value))
    with running_at(None):
        return x.detach().requires_grad_()


def base_of(x: Any) -> Any:
    while type(x) is WrapperTensor:
        x = x.value
    return x


def grad_of(self: WrapperTensor) -> Tensor | None:
    """``Tensor.grad``: what ``retain_grad`` asked for, or of examples that are a leaf at the base, their gradients."""
    kept = self.__dict__.get("cotangent")
    if kept is not None or not is_examples(self):
        return kept
    with running_at(None):
        found = base_of(self)
        found = found.grad if found.is_leaf else None
    return None if found is None else like(self, found)


def like(x: Any, value: Tensor) -> Tensor:
    """``value`` as examples, as ``x`` is of its base."""
    return x.interpreter.rewrap(x, like(x.value, value)) if type(x) is WrapperTensor else value


def backward(self: WrapperTensor, gradient: Any = None, *args: Any, inputs: Any = None, **options: Any) -> None:
    """``Tensor.backward``; it adds to ``.grad``, as a loop over the examples of a vmap does for each."""
    levels = []
    x: Any = self
    while type(x) is WrapperTensor:
        if isinstance(x.interpreter, VmapInterpreter) and x.bdim is not None:
            levels.append(x.interpreter)
        x = x.value
    stack = interpreter_stack()
    once = all(i in levels or getattr(i, "batch_size", None) == 1 for i in stack if i.repeats_writes)
    followed = levels and any(i.differentiates for i in stack)  # .grad would lose its derivative
    if not is_examples(self) or not x.requires_grad or not once or followed:
        refuse(self, *REFUSED["backward"])
    if gradient is None and self.numel() == 1:
        gradient = ones_for(self, *self.shape)
    x = self
    while gradient is not None and type(x) is WrapperTensor:
        level: Any = x.interpreter
        with lowered(level):
            gradient = of_batch(level, gradient, x) if level in levels else values_at(level, [gradient])[0]
        x = x.value
    if inputs is not None:
        options["inputs"] = [base_of(i) for i in (inputs if isinstance(inputs, list | tuple) else [inputs])]
    with running_at(None):
        base_of(self).backward(gradient, *args, **options)


WrapperTensor.backward = backward  # type: ignore[assignment, method-assign]
WrapperTensor.requires_grad_ = requires_grad_  # type: ignore[assignment, method-assign]
WrapperTensor.grad = property(grad_of, Refusing.grad.fset)  # type: ignore[assignment, attr-defined]
