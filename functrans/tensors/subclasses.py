"""Which subclasses of Tensor answer operators themselves, as DTensor does, and which only functions of torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functrans.pytorch.torch_private import without_torch_function

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
