"""``torch.autograd.grad`` and ``backward`` inside of transforms: of a graph that is PyTorch's own, at the base.

That is the graph of captured tensors that require grad; cotangents for it may be of the transforms. What belongs to a
level has no such graph, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import lift
from functrans.core.errors import InsideTransformError
from functrans.core.errors.refusals import REFUSED, concrete, refuse
from functrans.core.pytrees import tree_flatten, tree_map
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import STATE, running_at
from functrans.core.torch_private import without_torch_function
from functrans.door.torch_function import ENTRANCES, OF_ANY_TYPES


def at_base(x: Any) -> Any:
    """The plain tensor that a constant of levels is."""
    if type(x) is not WrapperTensor:
        return x
    value = concrete(x)
    return refuse(x, "torch.autograd.grad", REFUSED["backward"][1]) if value is None else value


def plain_if_constant(x: Any) -> Any:
    value = concrete(x) if type(x) is WrapperTensor else None
    return x if value is None else value


def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
    """``torch.autograd.grad`` with a wrapper among its arguments."""
    if any(type(x) is WrapperTensor and x.interpreter.carries_autograd for x in tree_flatten((outputs, inputs))[0]):
        # a derivative that is borrowed from PyTorch
        return without_torch_function(torch.autograd.grad, (), (outputs, inputs, grad_outputs), options)
    given = tree_map(at_base, (outputs, inputs))
    cotangents = tree_map(plain_if_constant, grad_outputs)
    if STATE.top is not None and not any(x.requires_grad for x in tree_flatten(given[0])[0] if isinstance(x, Tensor)):
        what = "torch.autograd.grad of what PyTorch has not recorded"
        raise InsideTransformError(what, STATE.top.name, REFUSED["backward"][1])
    if any(type(x) is WrapperTensor for x in tree_flatten(cotangents)[0]):
        # of the transforms, into which the formulas that the engine calls go, too
        return without_torch_function(torch.autograd.grad, (), (*given, cotangents), options)
    with running_at(None):
        found = torch.autograd.grad(given[0], given[1], cotangents, **options)
    return tuple(g if g is None else lift(g, None, STATE.top) for g in found)


def backward(self: WrapperTensor, *args: Any, **kwargs: Any) -> None:
    """``Tensor.backward``; it adds to ``.grad``, which a loop over the examples of a vmap would do for each."""
    value = concrete(self)
    if value is None or not value.requires_grad or any(i.repeats_writes for i in interpreter_stack()):
        refuse(self, *REFUSED["backward"])
    args, kwargs = tree_map(at_base, (args, kwargs))
    with running_at(None):
        value.backward(*args, **kwargs)


ENTRANCES[torch.autograd.grad] = grad
OF_ANY_TYPES.add(torch.autograd.grad)
WrapperTensor.backward = backward  # type: ignore[assignment, method-assign]
