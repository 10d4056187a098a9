"""Constants that are made to meet a tensor: on its device, and of its class at the base, whatever levels it is of.

A class at the base that answers operators itself, as DTensor does, has factories of its own. What the library makes to
meet such a tensor (the cotangent that a gradient starts from, the rows of the identity, zeros) is made by them, so that
it is of the class, and placed as the class places it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.pytorch.thread_state import door_closed
from functrans.tensors.subclasses import answers_operators


def model_of(x: Tensor) -> Tensor | None:
    """The tensor at the base under ``x``, if its class answers operators itself; None of others."""
    while type(x) is WrapperTensor:
        x = x.value
    return None if type(x) is Tensor or not answers_operators(type(x)) else x


def ones_for(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Ones at the base, whatever levels and batches ``x`` is of; of its dtype unless another is given."""
    dtype = dtype or x.dtype
    with door_closed():
        model = model_of(x)
        return torch.ones(shape, dtype=dtype, device=x.device) if model is None else model.new_ones(shape, dtype=dtype)


def range_for(x: Tensor, n: int) -> Tensor:
    """The numbers from 0 to n - 1, at the base."""
    if model_of(x) is None:
        return torch.arange(n, device=x.device)
    return ones_for(x, n, dtype=torch.int64).cumsum(0) - 1


def identity_for(x: Tensor, rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """The identity matrix, of ``x``'s dtype unless another is given."""
    dtype, columns = dtype or x.dtype, rows if columns is None else columns
    if model_of(x) is None:
        return torch.eye(rows, columns, dtype=dtype, device=x.device)
    return (range_for(x, rows).unsqueeze(1) == range_for(x, columns)).to(dtype)
