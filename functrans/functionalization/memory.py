"""Where in memory a tensor lies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrans.core.tensor import WrapperTensor
from functrans.pytorch.thread_state import running_at


def storage_offset_of(x: Tensor) -> int:
    """The storage offset of ``x``; for a wrapper, that of the plain tensor under it."""
    while type(x) is WrapperTensor:
        x = x.value
    return int(x.storage_offset())


def places(size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Where in the storage the elements of a tensor are, in their order."""
    with running_at(None):
        found = torch.tensor(offset)
        for n, s in zip(size, stride, strict=True):
            found = found.unsqueeze(-1) + s * torch.arange(n)
        return found.flatten()


def positions(named: Tensor, own: Tensor) -> Tensor | None:
    """For each of the places ``named`` its position among the places ``own``; None: one is not among them."""
    with running_at(None):
        own, order = own.sort()
        found = torch.searchsorted(own, named).clamp(max=max(len(own) - 1, 0))
        return order[found] if len(own) and bool((own[found] == named).all()) else None
