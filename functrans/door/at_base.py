"""Functions of PyTorch that put one tensor's insides into another, which no wrapper can do: they run at the base.

A parameter of a lazy module gets its shape that way, wherever the module is made or called first; what is then written
into it (its initial values) is a write to a captured tensor like any other. And so does the copy that ``copy.deepcopy``
makes of a captured tensor, or ``torch.load`` of a file; it belongs to the innermost transform, as all that is made
inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import parameter

from functrans.boundary.calls import lift
from functrans.boundary.facades import as_subclass
from functrans.core.stack import interpreter_stack
from functrans.errors import InsideTransformError
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import STATE, running_at
from functrans.pytorch.torch_private import torch_utils


def at_base(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if STATE.top is None:
            return function(*args, **kwargs)
        with running_at(None):
            return function(*args, **kwargs)

    return run


def materialized(original: Callable[..., None]) -> Callable[..., None]:
    """``materialize``, which comes before the initial values are drawn: one draw for all examples, or none."""

    @functools.wraps(original)
    def materialize(self: Any, *args: Any, **kwargs: Any) -> None:
        for interpreter in interpreter_stack() if isinstance(self, parameter.UninitializedParameter) else ():
            if isinstance(interpreter, VmapInterpreter) and interpreter.randomness != "same":
                cure = 'randomness="same", or call the module once outside'
                raise InsideTransformError("drawing the parameters of a lazy module", interpreter.name, cure)
        at_base(original)(self, *args, **kwargs)

    return materialize


for _kind in (parameter.UninitializedParameter, parameter.UninitializedBuffer):
    _kind.__new__ = staticmethod(at_base(_kind.__new__))  # type: ignore[assignment, method-assign]
    _kind.materialize = materialized(_kind.materialize)  # type: ignore[method-assign, assignment]

original_deepcopy = Tensor.__deepcopy__


@functools.wraps(original_deepcopy)
def deepcopy(self: Tensor, memo: Any) -> Any:
    top = STATE.top
    if top is None or type(self) is not Tensor or id(self) in memo:
        return original_deepcopy(self, memo)
    with running_at(None):
        copied = original_deepcopy(self, memo)
    if copied.layout is torch.strided and copied.numel() and not copied.is_meta:
        place = copied.untyped_storage().data_ptr()
        if memo.setdefault(("memory", place), self) is not self:  # a write to one wrapper would not be seen in another
            raise InsideTransformError("copy.deepcopy of tensors that share memory", top.name, "a copy made outside")
    memo[id(self)] = lift(copied, None, top)
    return memo[id(self)]


Tensor.__deepcopy__ = deepcopy  # type: ignore[method-assign]
Tensor.as_subclass = as_subclass  # type: ignore[assignment, method-assign]

rebuilt = at_base(torch_utils._rebuild_tensor)


@functools.wraps(rebuilt)
def rebuild(*args: Any, **kwargs: Any) -> Any:
    return lift(rebuilt(*args, **kwargs), None, STATE.top)


torch_utils._rebuild_tensor = rebuild
