"""Products of matrices and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import Ends, IntervalLevel, ends, plus, rule, scaled

aten = torch.ops.aten


def middle_and_radius(x: Any) -> tuple[Tensor, Tensor | None]:
    low, high = ends(x)
    return (low, None) if x.upper is None else ((low + high) / 2, (high - low) / 2)


def bilinear(product: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Ends:
    """Of a product of two intervals: its middle, and how far it may be from there."""
    (middle, radius), (other, other_radius) = middle_and_radius(x), middle_and_radius(y)
    center = product(middle, other)
    far = torch.zeros_like(center)
    if other_radius is not None:
        far = far + product(middle.abs(), other_radius)
    if radius is not None:
        far = far + product(radius, other.abs() if other_radius is None else other.abs() + other_radius)
    return center - far, center + far


for _op in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default):

    def _product(level: IntervalLevel, x: Any, y: Any, op: OpOverload = _op) -> Any:
        return level.between(*bilinear(op, x, y))

    IntervalLevel.rules.add(_op, _product)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def addmm(level: IntervalLevel, x: Any, left: Any, right: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return level.between(*plus(scaled(ends(x), beta), scaled(bilinear(torch.matmul, left, right), alpha)))


@rule(aten.convolution.default)
def convolution(level: IntervalLevel, x: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
    found = bilinear(lambda a, b: aten.convolution.default(a, b, None, *geometry), x, weight)
    if bias is not None:
        shape = (-1, *[1] * (weight.dim() - 2))
        low, high = ends(bias)
        found = plus(found, (low.view(shape), high.view(shape)))
    return level.between(*found)
