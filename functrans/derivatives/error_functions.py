"""Derivatives of ``erfcx``, ``log_ndtr`` and ``ndtri``.

The textbook formulas of the first two subtract what is almost equal where the tail is long, so that at -1000 the third
derivative of ``log_ndtr`` is noise. There the asymptotic series take over, which every order is derived from.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from functrans.derivatives.series import power_series
from functrans.derivatives.table import derivative

aten = torch.ops.aten
pointwise = partial(derivative, tangent="elementwise")

TERMS = 16
TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)

#: of Mills' ratio times x, in powers of 1 / x ** 2 (DLMF 7.12.1)
MILLS = [(-1.0) ** k * math.prod(range(1, 2 * k, 2)) for k in range(TERMS)]


def reciprocal_series(a: list[float]) -> list[float]:
    """The coefficients of ``1 / sum(a[k] * x ** k)``."""
    found = [1 / a[0]]
    for k in range(1, len(a)):
        found.append(-sum(a[i] * found[k - i] for i in range(1, k + 1)) / a[0])
    return found


INVERSE_MILLS = reciprocal_series(MILLS)
#: of the slope of ``erfcx(x)``, divided by 1 / x ** 2, in powers of 1 / x ** 2
ERFCX_SLOPE = [-(2 * k + 1) * c / 2**k / math.sqrt(math.pi) for k, c in enumerate(MILLS)]


def erfcx_self(grad: Tensor, self: Tensor) -> Tensor:
    far = self > 10
    y = torch.where(far, self, 10).reciprocal().square()
    x = torch.where(far, 1, self)
    return grad * torch.where(far, y * power_series(y, ERFCX_SLOPE), 2 * x * torch.special.erfcx(x) - TWO_OVER_SQRT_PI)


def log_ndtr_self(grad: Tensor, self: Tensor) -> Tensor:
    """The density divided by the distribution, which is one over Mills' ratio of ``-x``."""
    right, far = self > 0, self < -20
    x, t = torch.where(right, self, 0), torch.where(far, -self, 20)
    dense = torch.exp(-(torch.special.log_ndtr(x) + x.square() / 2)) / math.sqrt(2 * math.pi)
    middle = math.sqrt(2 / math.pi) / torch.special.erfcx(torch.where(right | far, 0, self) * -math.sqrt(0.5))
    series = t * power_series(t.reciprocal().square(), INVERSE_MILLS)
    return grad * torch.where(right, dense, torch.where(far, series, middle))


pointwise(aten.special_erfcx.default, self=erfcx_self)
pointwise(aten.special_log_ndtr.default, self=log_ndtr_self)
pointwise(
    aten.special_ndtri.default,
    self=lambda grad, result: grad * math.sqrt(2 * math.pi) * (result.square() / 2).exp(),
)
