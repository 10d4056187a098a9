"""Batching rules of ``as_strided`` and its like, which name places in memory.

An example's places are those between its first and its last element, if no other example's are between them; else
those of its elements. (That is so in the caller's memory; for what was computed, see ``hidden_effects.as_strided``.)
``storage_offset`` counts in the physical tensor's storage, as ``x.storage_offset()`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.errors import InsideTransformError
from functrans.functionalization.memory import storage_offset_of
from functrans.interpreters.vmap.families import RuleDeclined, any_rank
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, materialize
from functrans.pytorch.thread_state import door_closed

aten = torch.ops.aten


def region(
    x: Tensor, bdim: int, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> tuple[Any, Any, int]:
    """Size, strides and offset of the region in all examples, the batch dimension first."""
    if len(size) != len(stride):
        raise RuntimeError(f"as_strided(size={size}, stride={stride}): size and stride must have the same length")
    shape, strides = list(x.shape), list(x.stride())
    batch, step = shape.pop(bdim), strides.pop(bdim)
    start = storage_offset_of(x)
    offset = start if offset is None else offset
    span = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    first = offset - start
    if batch > 1 and 0 < step < span and not is_own(first, size, stride, shape, strides):
        raise InsideTransformError(
            "as_strided of a tensor whose examples lie between each other in memory, at places that are not its own,",
            "vmap",
            "as_strided on its .contiguous()",
        )
    last = first + sum((n - 1) * s for n, s in zip(size, stride))
    if 0 not in size and not 0 <= first <= last < span:
        raise RuntimeError(
            f"as_strided(size={list(size)}, stride={list(stride)}, storage_offset={offset}) inside vmap: "
            f"got places {first} to {last} of an example; expected places between 0 and {span - 1}. "
            "Other places belong to other examples."
        )
    return [batch, *size], [step, *stride], offset


def is_own(first: int, size: Sequence[int], stride: Sequence[int], shape: list[int], strides: list[int]) -> bool:
    """Whether an element of the example is at each of the places."""
    with door_closed():
        return bool(torch.isin(first + places(size, stride), places(shape, strides)).all())


def places(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Where in memory the elements are, relative to the first."""
    found = torch.zeros((), dtype=torch.int64)
    for n, step in zip(shape, strides, strict=True):
        found = found.unsqueeze(-1) + torch.arange(n) * step
    return found


@batching_rule(aten.as_strided.default, aten.as_strided_copy.default)
@any_rank
def as_strided(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, size: Any, stride: Any, storage_offset: int | None = None
) -> tuple[Any, Any]:
    """The same places of every example."""
    return torch.as_strided(x, *region(x, in_dims[0], size, stride, storage_offset)), 0


@batching_rule(aten.as_strided_scatter.default)
@any_rank
def as_strided_scatter(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    src: Tensor,
    size: Any,
    stride: Any,
    storage_offset: int | None = None,
) -> tuple[Any, Any]:
    """The result lies in memory as ``x`` does."""
    bdim = in_dims[0]
    if bdim is None and x.is_contiguous():
        x, bdim = materialize(x, None, info.batch_size).contiguous(), 0
    if bdim is None or x.stride(bdim) == 0:
        raise RuleDeclined("as_strided_scatter: only the source is batched")
    where = region(x, bdim, size, stride, storage_offset)
    return torch.as_strided_scatter(x, materialize(src, in_dims[1], info.batch_size), *where), bdim
