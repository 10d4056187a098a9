"""Sums, products, quotients and powers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.shipped.interval_rules.level import (
    Ends,
    IntervalLevel,
    both,
    ends,
    hull,
    inverse,
    is_interval,
    plus,
    rule,
    scaled,
    times,
)  # fmt: skip

aten = torch.ops.aten


@rule(aten.add.Tensor, aten.add.Scalar)
def add(level: IntervalLevel, x: Any, y: Any, alpha: Any = 1) -> Any:
    return level.between(*plus(both(x), scaled(both(y), alpha)))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(level: IntervalLevel, x: Any, y: Any, alpha: Any = 1) -> Any:
    return level.between(*plus(both(x), scaled(both(y), -alpha)))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(level: IntervalLevel, x: Any, y: Any, alpha: Any = 1) -> Any:
    return level.between(*plus(scaled(ends(x), -alpha), both(y)))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(level: IntervalLevel, x: Any, y: Any) -> Any:
    if not isinstance(x, Tensor):  # as in torch.mul(2, y)
        x, y = y, x
    if not isinstance(y, Tensor):
        return level.between(*scaled(ends(x), y))
    if x is y:
        return valley_of_power(level, x, 2)
    return level.between(*times(ends(x), ends(y)))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(level: IntervalLevel, x: Any, y: Any) -> Any:
    if not isinstance(y, Tensor):
        low, high = ends(x)
        return level.between(low / y, high / y) if y >= 0 else level.between(high / y, low / y)
    if not is_interval(y):
        low, high = both(x)
        return level.between(*hull(low / ends(y)[0], high / ends(y)[0]))
    return level.between(*times(both(x), inverse(ends(y))))


@rule(aten.reciprocal.default)
def reciprocal(level: IntervalLevel, x: Any) -> Any:
    return level.between(*inverse(ends(x)))


@rule(aten.pow.Tensor_Scalar)
def power(level: IntervalLevel, x: Any, exponent: Any) -> Any:
    if exponent < 0:
        x = power(level, x, -exponent)
        return level.between(*inverse(ends(x)))
    if exponent == 0:
        return level.constant(torch.ones_like(x.value))
    if exponent != int(exponent):
        low, high = ends(x)
        return level.between(low.clamp(min=0) ** exponent, high**exponent)
    return valley_of_power(level, x, int(exponent))


def valley_of_power(level: IntervalLevel, x: Any, exponent: int) -> Any:
    low, high = ends(x)
    if exponent % 2:
        return level.between(low**exponent, high**exponent)
    least = torch.minimum(low.clamp(min=0), high) ** exponent
    return level.between(least, torch.maximum(low**exponent, high**exponent))


@rule(aten.prod.default, aten.prod.dim_int)
def prod(level: IntervalLevel, x: Any, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    low, high = (t if dtype is None else t.to(dtype) for t in ends(x))
    if dim is None:
        low, high, dim = low.flatten(), high.flatten(), 0
    one = torch.ones_like(low.sum(dim))
    found: Ends = (one, one)
    for pair in zip(low.unbind(dim), high.unbind(dim), strict=True) if low.dim() else [(low, high)]:
        found = times(found, pair)
    return level.between(*(t.unsqueeze(dim) if keepdim and x.dim() else t for t in found))
