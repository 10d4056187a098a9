"""Derivatives of operators that read and write at places in memory: ``as_strided`` and its like.

Every place in memory gets a number, counted from the first one that is looked at. Then reading is ``index_select``, and
its transpose ``index_add``. As in PyTorch, a place that belongs to no element of ``self`` has no derivative, and
elements that share a place (of an expanded tensor) share its cotangent evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast
from functrans.derivatives.table import derivative
from functrans.functionalization.memory import storage_offset_of

aten = torch.ops.aten


@dataclass
class Places:
    """Where the elements of a tensor and those of a region lie, as flat lists of numbers below ``count``."""

    own: Tensor
    region: Tensor
    count: int
    shared: bool  # elements of the tensor may share places
    twice: bool  # and those of the region


def places(x: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None) -> Places:
    """The memory of ``x`` and of the region that ``as_strided`` names."""
    start = storage_offset_of(x)
    offset = start if offset is None else offset
    low = min(start, offset)
    own, own_end, shared = numbered(x, x.shape, x.stride(), start - low)
    region, region_end, twice = numbered(x, size, stride, offset - low)
    return Places(own, region, max(own_end, region_end, 1), shared, twice)


def numbered(x: Tensor, size: Sequence[int], stride: Sequence[int], start: int) -> tuple[Tensor, int, bool]:
    """Flat numbers of the places, the end of their range, and whether two may be the same."""
    at = torch.full([1] * len(size), start, device=x.device)
    end, shared, reach = start + 1, False, 0
    for dim, (n, step) in enumerate(zip(size, stride, strict=True)):
        at = at + (torch.arange(n, device=x.device) * step).reshape([n if d == dim else 1 for d in range(len(size))])
        end += (n - 1) * step
    for step, n in sorted((s, n) for s, n in zip(stride, size, strict=True) if n > 1):
        shared = shared or step <= reach
        reach += (n - 1) * step
    return at.expand(list(size)).flatten(), end, shared


def in_memory(at: Tensor, values: Tensor, count: int) -> Tensor:
    """Memory of ``count`` places with ``values`` added where they belong."""
    return values.new_zeros(count).index_add(0, at, values.flatten())


def as_strided_self(grad: Tensor, self: Tensor, size: Any, stride: Any, storage_offset: int | None) -> Tensor:
    p = places(self, size, stride, storage_offset)
    read = in_memory(p.region, grad, p.count)
    if p.shared:
        read = read / in_memory(p.own, grad.new_ones(p.own.shape), p.count).clamp(1)
    return read.index_select(0, p.own).reshape(self.shape)


def as_strided_tangent(self: Tensor, size: Any, stride: Any, storage_offset: int | None, self_t: Tensor) -> Tensor:
    p = places(self, size, stride, storage_offset)
    memory = self_t.new_zeros(p.count).index_put([p.own], self_t.flatten())  # elements that share a place are alike
    return memory.index_select(0, p.region).reshape(list(size))


for _op in (aten.as_strided.default, aten.as_strided_copy.default):
    derivative(_op, tangent=as_strided_tangent, self=as_strided_self)


def written_places(self: Tensor, size: Any, stride: Any, storage_offset: int | None) -> tuple[Places, Tensor]:
    """The places, and a mask of the elements of ``self`` that are written."""
    p = places(self, size, stride, storage_offset)
    if p.twice:
        raise RuntimeError(
            "as_strided_scatter: places written twice have no derivative. Choose strides that do not overlap."
        )
    mask = torch.zeros(p.count, dtype=torch.bool, device=self.device).index_fill(0, p.region, True)
    return p, mask.index_select(0, p.own).reshape(self.shape)


def as_strided_scatter_self(grad: Tensor, self: Tensor, size: Any, stride: Any, storage_offset: int | None) -> Tensor:
    return grad.masked_fill(written_places(self, size, stride, storage_offset)[1], 0)


def as_strided_scatter_src(
    grad: Tensor, self: Tensor, src: Tensor, size: Any, stride: Any, storage_offset: int | None
) -> Tensor:
    p, _ = written_places(self, size, stride, storage_offset)
    return cast(in_memory(p.own, grad, p.count).index_select(0, p.region).reshape(src.shape), src.dtype)


def as_strided_scatter_tangent(
    self: Tensor, size: Any, stride: Any, storage_offset: int | None, self_t: Tensor | None, src_t: Tensor | None
) -> Tensor | None:
    p, written = written_places(self, size, stride, storage_offset)
    kept = None if self_t is None else self_t.masked_fill(written, 0)
    if src_t is None:
        return kept
    new = in_memory(p.region, src_t.to(self.dtype), p.count).index_select(0, p.own).reshape(self.shape)
    return new if kept is None else kept + new


derivative(
    aten.as_strided_scatter.default,
    tangent=as_strided_scatter_tangent,
    self=as_strided_scatter_self,
    src=as_strided_scatter_src,
)
