"""Wrappers that show another dtype or shape than their value has, because the payload says how to read the value.

An int8 tensor with a scale stands for floats, two factors for their product. What the library does itself with a value
(a policy that runs the operator on it, a write that keeps part of the old contents) takes it for what the wrapper
shows, so here it either does something else, or is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor, strides_of, wrap
from functrans.errors import CallError, CallTypeError, InsideTransformError
from functrans.functionalization.layouts import wrap_showing
from functrans.functionalization.numbers_read import carries_derivative
from functrans.pytorch.thread_state import lowered
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.described import shown
from functrans.tensors.pytrees import tree_flatten

if TYPE_CHECKING:
    from functrans.extension.table_interpreter import TableInterpreter

aten = torch.ops.aten

#: Operators that name places in memory.
BY_PLACES = frozenset((aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default))


def wrap_by_payload(interpreter: TableInterpreter, value: Tensor, payload: dict[str, Any]) -> WrapperTensor:
    """A wrapper around ``value`` that shows what ``interpreter.shows`` says of it with this payload, if it has one."""
    named = {name: payload.get(name) for name in interpreter.payload}
    if all(carried is None for carried in named.values()):
        return wrap(interpreter, value)
    said = interpreter.shows(value, **named)
    if not (isinstance(said, tuple) and len(said) == 2 and is_shape(said[0]) and isinstance(said[1], torch.dtype)):
        raise CallTypeError(f"shows of {interpreter.name}", shown(said), "a pair (shape, dtype)")
    shape, dtype = torch.Size(said[0]), said[1]
    return wrap_showing(interpreter, value, shape, strides_of(value) if shape == value.shape else None, dtype)


def is_shape(x: Any) -> bool:
    return isinstance(x, list | tuple) and all(isinstance(n, int | torch.SymInt) and n >= 0 for n in x)


def differs(x: WrapperTensor) -> bool:
    """Whether ``x`` shows something else than its value."""
    return x.dtype is not x.value.dtype or x.shape != x.value.shape


def check_values(interpreter: TableInterpreter, op: OpOverload, args: Iterable[Any], way: str) -> None:
    """Refuse to run ``op``, by ``way``, on the values of wrappers that stand for something else."""
    for x in args if interpreter.shows_own else ():
        if interpreter.owns(x) and differs(x):
            raise CallError(
                f"{way} for {op} of {interpreter.name} at level {interpreter.level}",
                f"{shown(x)} around {shown(x.value)}",
                "values that are what their wrappers show",
                "Give the operator a rule, or the table a function as default, which computes what is shown.",
            )


def check_places(interpreter: TableInterpreter, op: OpOverload) -> None:
    if op in BY_PLACES:
        raise InsideTransformError(f"{op} of what does not lie in memory as it shows", interpreter.name, "an index")


def without_numbers(interpreter: TableInterpreter, x: Any) -> Any:
    """``x``, or, for an operator that reads no values, what is like it one level down."""
    if not interpreter.owns(x):
        return x
    with lowered(interpreter):
        return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)


def check_no_history(interpreter: TableInterpreter, old: WrapperTensor) -> None:
    """Refuse to write numbers and leave the derivative as it was: the old payload is no reading of the new value."""
    for x in tree_flatten([old.value, *(getattr(old, name) for name in interpreter.payload)])[0]:
        if isinstance(x, Tensor) and (carries_derivative(x) or base_of(x).requires_grad):
            what = "a write under no_grad() or through detach() to what shows more than its value"
            raise InsideTransformError(what, interpreter.name, "torch.where, which makes a new tensor")


def base_of(x: Any) -> Tensor:
    while type(x) is WrapperTensor:
        x = x.value
    return x
