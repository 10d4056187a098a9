"""What depends on a window: pools and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.shipped.sparsity_level import OperatorCall, everything, pattern_of

aten = torch.ops.aten


def windows(numbers: Tensor, sizes: Any, stride: Any, padding: Any, dilation: Any, out: Sequence[int]) -> Tensor:
    """[..., *out, window] of [..., *spatial]: what lies under a window at each of its places."""
    first = numbers.dim() - len(sizes)
    for i, (size, s, p, d) in enumerate(zip(sizes, stride, padding, dilation, strict=True)):
        dim = first + i
        needed = (out[i] - 1) * s + (size - 1) * d + 1
        behind = max(needed - numbers.shape[dim] - p, 0)
        pad = [0, 0] * (numbers.dim() - 1 - dim) + [p, behind]
        numbers = aten.constant_pad_nd.default(numbers, pad, 0)
        starts = torch.arange(out[i]) * s
        reached = starts.unsqueeze(1) + torch.arange(size) * d
        numbers = numbers.index_select(dim, reached.flatten()).unflatten(dim, reached.shape).movedim(dim + 1, -1)
    return numbers.flatten(numbers.dim() - len(sizes))


def spread(values: Any, rank: int) -> list[int]:
    values = list(values) if isinstance(values, list | tuple) else [values]
    return values * rank if len(values) == 1 else values


def pooled(call: OperatorCall, rank: int) -> Any:
    size = spread(call["kernel_size"], rank)
    stride = spread(call["stride"], rank) if call["stride"] else size
    padding, dilation = spread(call["padding"], rank), spread(call.named.get("dilation", 1), rank)
    numbers = call.numbers(call["self"])
    return call.sets.union_last(windows(numbers, size, stride, padding, dilation, call.outs[0].shape[-rank:]))


@pattern_of(aten.avg_pool2d.default, aten.max_pool2d_with_indices.default)
def pooled_2d(call: OperatorCall) -> Any:
    return pooled(call, 2)


@pattern_of(aten.avg_pool3d.default, aten.max_pool3d_with_indices.default)
def pooled_3d(call: OperatorCall) -> Any:
    return pooled(call, 3)


def spread_by_stride(call: OperatorCall, numbers: Tensor, weight: Tensor, out: Sequence[int]) -> Tensor:
    """[..., *out, window] of a transposed convolution's input: what may come to each place of the output."""
    rank = len(out)
    stride, padding, dilation = (spread(call[name], rank) for name in ("stride", "padding", "dilation"))
    sizes = weight.shape[2:]
    for i, s in enumerate(stride):
        dim = numbers.dim() - rank + i
        wide = torch.zeros(
            *numbers.shape[:dim], max((numbers.shape[dim] - 1) * s + 1, 0), *numbers.shape[dim + 1 :],
            dtype=torch.int64,
        )  # fmt: skip
        numbers = wide.index_copy(dim, torch.arange(numbers.shape[dim]) * s, numbers)
    ahead = [d * (k - 1) - p for d, k, p in zip(dilation, sizes, padding, strict=True)]
    for i, p in enumerate(ahead):
        if p < 0:
            dim = numbers.dim() - rank + i
            numbers = numbers.narrow(dim, -p, numbers.shape[dim] + p)
    return windows(numbers, sizes, [1] * rank, [max(p, 0) for p in ahead], dilation, out)


@pattern_of(aten.convolution.default)
def convolution(call: OperatorCall) -> Any:
    weight, groups, out = call["weight"], call["groups"], call.outs[0]
    if out.numel() == 0 or out.dim() != weight.dim():
        return everything(call)
    rank = out.dim() - 2
    numbers = call.numbers(call["input"]).unflatten(1, (groups, -1))
    numbers = call.sets.union_along(numbers, [2]).squeeze(2)
    if call["transposed"]:
        reached = spread_by_stride(call, numbers, weight, out.shape[2:])
        filters = call.sets.union_along(call.numbers(weight).unflatten(0, (groups, -1)), [1, *range(3, 3 + rank)])
        filters = filters.flatten()
    else:
        stride, padding, dilation = (spread(call[name], rank) for name in ("stride", "padding", "dilation"))
        reached = windows(numbers, weight.shape[2:], stride, padding, dilation, out.shape[2:])
        filters = call.sets.union_along(call.numbers(weight), range(1, 2 + rank)).flatten()
    found = call.sets.union_last(reached).repeat_interleave(out.shape[1] // groups, 1)
    for per_channel in (filters, *(call.numbers(b) for b in call.tensors("bias"))):
        found = call.union(found, per_channel.view(-1, *[1] * rank))
    return found
