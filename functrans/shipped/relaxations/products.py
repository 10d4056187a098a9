"""Products of two intervals.

    x y = x c + b y - b c + (x - b)(y - c),   where |(x - b)(y - c)| is at most the product of the two radii

with the middles ``b`` and ``c``: the mean of the two planes of McCormick (1976) on either side, for whatever is linear
in each of two factors with coefficients of one sign.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.operators.products import PRODUCTS
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import Ends, ends
from functrans.shipped.relaxations.level import RELAXATIONS, Affine, OperatorCall, Relaxation
from functrans.shipped.relaxations.lines import convex

aten = torch.ops.aten

#: the positions of the two factors
FACTORS: dict[OpOverload, tuple[int, int]] = {
    aten.mul.Tensor: (0, 1),
    aten.convolution.default: (0, 1),
    **{product.op: (1, 2) if product.adds else (0, 1) for product in PRODUCTS.values() if product.summed},
}


@RELAXATIONS.register(aten.detach.default)
def detached(call: OperatorCall, out: Ends) -> Relaxation:
    """The same number; only its derivative is gone."""
    itself = Affine(lambda x: x)
    return itself, itself


@RELAXATIONS.register(*FACTORS)
def product(call: OperatorCall, out: Ends) -> Relaxation | None:
    first, second = (call.places.index(i) for i in FACTORS[call.op])
    if call.op is aten.mul.Tensor and call.args[0] is call.args[1]:
        lines = convex(torch.square, lambda x: 2 * x)(*ends(call.args[0]))
        of_square = [Affine(lambda x, _, line=line: line.at(x), pointwise=True) for line in lines]
        return of_square[0], of_square[1]
    boxes = [ends(x) for x in call.intervals]
    middles = [(low + high) / 2 for low, high in boxes]
    zeros = [torch.zeros_like(low) for low, _ in boxes]

    def of_factors(a: Tensor, b: Tensor, others: Any = zeros) -> Tensor:
        values = list(others)
        values[first], values[second] = a, b
        return call.f(0, *values)

    b, c = middles[first], middles[second]
    radius, other_radius = ((high - low) / 2 for low, high in (boxes[first], boxes[second]))
    far = (of_factors(radius, other_radius) - of_factors(zeros[first], zeros[second])).abs()
    known = of_factors(b, c)

    def middle(*values: Tensor) -> Tensor:
        return of_factors(values[first], c, values) + of_factors(b, values[second]) - known

    return Affine(lambda *values: middle(*values) - far), Affine(lambda *values: middle(*values) + far)
