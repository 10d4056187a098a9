"""Products of matrices and convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.operators.products import PRODUCTS, Product
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


def product_rule(product: Product) -> Callable[..., Any]:
    def alone(level: IntervalLevel, x: Any, y: Any) -> Any:
        return level.between(*bilinear(product.multiply, x, y))

    def added(level: IntervalLevel, more: Any, x: Any, y: Any, beta: Any = 1, alpha: Any = 1) -> Any:
        return level.between(*plus(scaled(ends(more), beta), scaled(bilinear(product.multiply, x, y), alpha)))

    return added if product.adds else alone


for _product in PRODUCTS.values():
    if _product.summed:  # the others are multiplications of single intervals, whose ends are known
        IntervalLevel.rules.add(_product.op, product_rule(_product))


@rule(aten.convolution.default)
def convolution(level: IntervalLevel, x: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
    found = bilinear(lambda a, b: aten.convolution.default(a, b, None, *geometry), x, weight)
    if bias is not None:
        shape = (-1, *[1] * (weight.dim() - 2))
        low, high = ends(bias)
        found = plus(found, (low.view(shape), high.view(shape)))
    return level.between(*found)
