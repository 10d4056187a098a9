"""Tensor subclasses at the base that answer operators themselves, as DTensor does.

What the library makes to meet such a tensor (the cotangent that a gradient starts from, the rows of the identity,
zeros) is made by the tensor's own factories, so that it is of the class, and placed as the class places it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import door_closed


def model_of(x: Tensor) -> Tensor | None:
    """The tensor at the base under ``x``, if its class answers operators itself; None of others."""
    while type(x) is WrapperTensor:
        x = x.value
    return None if type(x) is Tensor or not answers_operators(type(x)) else x


def answers_operators(kind: type) -> bool:
    return getattr(kind, "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


def ones_for(x: Tensor, *shape: int) -> Tensor:
    """Ones at the base of ``x``'s dtype and device, and of its class at the base; whatever levels ``x`` is of."""
    with door_closed():
        model = model_of(x)
        if model is None:
            return torch.ones(shape, dtype=x.dtype, device=x.device)
        return model.new_ones(shape, dtype=x.dtype)


def identity_for(x: Tensor, size: int) -> Tensor:
    """The identity matrix, as ``ones_for``."""
    return torch.eye(size, dtype=x.dtype, device=x.device) if model_of(x) is None else ones_for(x, size).diag_embed()
