"""Maxima and minima with their places."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import IntervalLevel, ends, rule

aten = torch.ops.aten


def with_places(op: OpOverload, last: Callable[..., int]) -> None:
    """``op`` returns values that do not decrease, and places, which may be any from 0 to ``last``."""

    @rule(op)
    def values_and_places(level: IntervalLevel, x: Any, *args: Any) -> Any:
        low, high = ends(x)
        (a, places), (b, _) = op(low, *args), op(high, *args)
        most = max(last(x, *args), 0)
        return level.between(a, b), level.between(torch.zeros_like(places), torch.full_like(places, most))


def size_along(x: Any, dim: int, *_: Any) -> int:
    return (x.shape[dim] if x.dim() else 1) - 1


for _op in (aten.max.dim, aten.min.dim, aten.cummax.default, aten.cummin.default):
    with_places(_op, size_along)
with_places(aten.max_pool2d_with_indices.default, lambda x, *_: math.prod(x.shape[-2:]) - 1)
with_places(aten.adaptive_max_pool2d.default, lambda x, *_: math.prod(x.shape[-2:]) - 1)
with_places(aten.max_pool3d_with_indices.default, lambda x, *_: math.prod(x.shape[-3:]) - 1)
