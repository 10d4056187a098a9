"""What our interpreters ask of a program's arguments, and how its results wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WRAPPERS, PendingWrapper, WrapperTensor
from functrans.tensors.broadcasting import same_shape


def are_alike(x: Any, y: Any) -> bool:
    """Whether two arguments are wrappers of one level, contiguous and of one shape, as results then are."""
    return (
        type(x) in WRAPPERS
        and type(y) in WRAPPERS
        and x.interpreter is y.interpreter
        and x.strides is None is y.strides
        and same_shape(x.shape, y.shape)
    )


def unwrap_program(interpreter: Interpreter, args: Sequence[Any]) -> tuple[Any, ...]:
    """``core.dispatch.unwrap`` of a program's arguments, tensors and numbers.

    Returns:
        the values one level down, which may be pending wrappers;
        the places of those on which ``interpreter`` keeps something, and what it keeps;
        the first wrapper; whether the results have its shape and are contiguous; whether all arguments have one shape.
    """
    values: list[Any] = []
    places: tuple[int, ...] = ()
    carried: list[Any] = []
    first: Any = None
    alike = same = True
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if first is None:
                first = a
            elif not same_shape(a.shape, first.shape):
                alike = same = False
            if a.strides is not None:
                alike = False
            if a.interpreter is interpreter:
                kept = a._carried
                if kept is not None:
                    places += (len(values),)
                    carried.append(kept)
                a = a._value
        elif isinstance(a, Tensor):
            if a.dim():
                alike = False
            same = same and first is not None and same_shape(a.shape, first.shape)
        values.append(a)
    return values, places, carried, first, alike, same


def pend(interpreter: Interpreter, value: Any, like: Any, shape: torch.Size | None = None) -> PendingWrapper:
    """What ``wrap_like`` makes, pending; ``shape``: a contiguous one in the place of ``like``'s."""
    wrapper = PendingWrapper()
    wrapper.interpreter = interpreter
    wrapper._value = value
    wrapper.made = None
    if shape is None:
        wrapper.shape, wrapper.strides = like.shape, like.strides
    else:
        wrapper.shape, wrapper.strides = shape, None
    wrapper.dtype = like.dtype
    wrapper.layout = like.layout
    wrapper.device = like.device
    return wrapper
