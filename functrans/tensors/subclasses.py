"""Tensor subclasses at the base that answer operators themselves, as DTensor does.

What the library makes to meet such a tensor (the cotangent that a gradient starts from, the rows of the identity,
zeros) is made by the tensor's own factories, so that it is of the class, and placed as the class places it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.pytorch.thread_state import door_closed
from functrans.pytorch.torch_private import without_torch_function


def model_of(x: Tensor) -> Tensor | None:
    """The tensor at the base under ``x``, if its class answers operators itself; None of others."""
    while type(x) is WrapperTensor:
        x = x.value
    return None if type(x) is Tensor or not answers_operators(type(x)) else x


#: by class, what ``keeps_class`` says
_keeping: dict[type, bool] = {}


class KeptClassMet(Exception):
    """An operator came to the door with a tensor whose class is kept in front of it; see NOTE [Facades]."""


def keeps_class(kind: Any) -> bool:
    """Whether ``kind`` is a subclass of Tensor with ``__torch_function__`` and nothing else."""
    found = _keeping.get(kind)
    if found is None:
        plain = not issubclass(kind, Tensor) or kind is Tensor or answers_operators(kind)
        found = _keeping[kind] = not plain and kind.__torch_function__ is not without_torch_function
    return found


def answers_operators(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


# Constants for ``x``, on its device and of its class at the base, whatever levels it is of.


def ones_for(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Ones, at the base, of ``x``'s dtype unless another is given."""
    dtype = dtype or x.dtype
    with door_closed():
        model = model_of(x)
        return torch.ones(shape, dtype=dtype, device=x.device) if model is None else model.new_ones(shape, dtype=dtype)


def range_for(x: Tensor, n: int) -> Tensor:
    """0, 1, ..., n - 1."""
    if model_of(x) is None:
        return torch.arange(n, device=x.device)
    return ones_for(x, n, dtype=torch.int64).cumsum(0) - 1


def identity_for(x: Tensor, rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The identity matrix, of ``x``'s dtype unless another is given."""
    dtype, columns = dtype or x.dtype, rows if columns is None else columns
    if model_of(x) is None:
        return torch.eye(rows, columns, dtype=dtype, device=x.device)
    return (range_for(x, rows).unsqueeze(1) == range_for(x, columns)).to(dtype)
