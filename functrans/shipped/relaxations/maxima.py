"""Maxima: one of the numbers is below, and above too where no other can be greater."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.thread_state import running_at
from functrans.shipped.interval_rules.level import Ends, ends
from functrans.shipped.relaxations.level import PARTS, RELAXATIONS, Affine, OperatorCall, Relaxation, RelaxationLevel
from functrans.shipped.sparsity_rules.windows import spread

aten = torch.ops.aten


@RELAXATIONS.register(aten.amax.default)
def largest(call: OperatorCall, out: Ends) -> Relaxation | None:
    x, *rest = call.args
    dims = along(x, rest[0] if rest else ())

    def lines(t: Tensor) -> Tensor:
        """The numbers that a maximum is of, in the last dimension."""
        return t.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)) if dims else t.unsqueeze(-1)

    low, high = (lines(t) for t in ends(x))
    place = low.argmax(-1, keepdim=True)
    others = high.scatter(-1, place, -math.inf).amax(-1, keepdim=True)
    greatest = low.gather(-1, place) >= others
    shape, most = out[1].shape, out[1]

    def one(x: Tensor) -> Tensor:
        return lines(x).gather(-1, place)

    def below(x: Tensor) -> Tensor:
        return one(x).reshape(shape)

    def above(x: Tensor) -> Tensor:
        return torch.where(greatest, one(x), most.reshape(greatest.shape)).reshape(shape)

    return Affine(below), Affine(above)


def along(x: Any, dims: int | Sequence[int] | None) -> tuple[int, ...]:
    """The dimensions, sorted; all, where none are named."""
    named = [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % x.dim() for d in named)) if named and x.dim() else tuple(range(x.dim()))


@PARTS.register(aten.max.default)
def max_of_all(level: RelaxationLevel, x: Any) -> Any:
    with running_at(level):
        return x.amax()


@PARTS.register(aten.max.dim)
def max_along(level: RelaxationLevel, x: Any, dim: int, keepdim: bool = False) -> Any:
    with running_at(level):
        return x.amax(dim, keepdim)


@PARTS.register(aten.min.default, aten.amin.default)
def min_of_all(level: RelaxationLevel, x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    with running_at(level):
        return -(-x).amax(dim, keepdim)


@PARTS.register(aten.min.dim)
def min_along(level: RelaxationLevel, x: Any, dim: int, keepdim: bool = False) -> Any:
    return min_of_all(level, x, dim, keepdim)


@PARTS.register(aten.maximum.default, aten.clamp_min.Tensor)
def maximum(level: RelaxationLevel, x: Any, y: Any) -> Any:
    with running_at(level):
        return y + (x - y).relu()


@PARTS.register(aten.minimum.default, aten.clamp_max.Tensor)
def minimum(level: RelaxationLevel, x: Any, y: Any) -> Any:
    with running_at(level):
        return y - (y - x).relu()


def max_pool(rank: int) -> Callable[..., Any]:
    """The maximum of strided slices, one for each place in the window."""

    def in_parts(
        level: RelaxationLevel, x: Any, size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
    ) -> Any:
        size, stride, padding, dilation = (spread(values, rank) for values in (size, stride or size, padding, dilation))
        behind, counts = [], []
        for n, k, s, p, d in zip(x.shape[-rank:], size, stride, padding, dilation, strict=True):
            room = n + 2 * p - d * (k - 1) - 1
            count = (-(-room // s) if ceil_mode else room // s) + 1
            count -= int(ceil_mode and (count - 1) * s >= n + p)  # windows begin inside, or in the padding before
            counts.append(count)
            behind.append(max((count - 1) * s + d * (k - 1) + 1 - n - p, 0))
        pads = [pad for p, b in zip(reversed(padding), reversed(behind), strict=True) for pad in (p, b)]
        with running_at(level):
            padded = torch.constant_pad_nd(x, pads, torch.finfo(x.dtype).min)
            places = itertools.product(*(range(k) for k in size))
            return torch.stack([window_at(padded, place, stride, dilation, counts) for place in places]).amax(0)

    return in_parts


PARTS.add(aten.max_pool2d_with_indices.default, max_pool(2))
PARTS.add(aten.max_pool3d_with_indices.default, max_pool(3))


def window_at(x: Tensor, place: Sequence[int], stride: Sequence[int], dilation: Any, counts: Sequence[int]) -> Tensor:
    """The numbers at one place of each window."""
    for dim, (at, s, d, count) in enumerate(zip(place, stride, dilation, counts, strict=True), x.dim() - len(place)):
        start = at * d
        x = aten.slice.Tensor(x, dim, start, start + (count - 1) * s + 1, s)
    return x
