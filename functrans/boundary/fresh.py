"""Tensors that were just made inside of a transform: PyTorch may yet make them leaves, and tells nobody."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.pytorch.torch_private import without_torch_function

REQUIRES_GRAD: Any = Tensor.requires_grad


class Fresh:
    """In the place of a view link of a tensor that was made inside: it looks whether PyTorch made it a leaf since; see
    NOTE [Leaves made inside]."""

    version = 0
    base = None
    doubtful = False

    @property
    def group(self) -> Fresh:
        return self

    def refresh(self, x: WrapperTensor) -> None:
        x.view_link = None
        if without_torch_function(REQUIRES_GRAD.__get__, (), (x,), {}):
            without_torch_function(REQUIRES_GRAD.__set__, (), (x, False), {})
            x.requires_grad_()


FRESH = Fresh()
