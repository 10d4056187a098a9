"""Where in memory a tensor lies."""

from __future__ import annotations

from torch import Tensor

from functrans.core.tensor import WrapperTensor


def storage_offset_of(x: Tensor) -> int:
    """The storage offset of ``x``; for a wrapper, that of the plain tensor under it."""
    while type(x) is WrapperTensor:
        x = x.value
    return int(x.storage_offset())
