"""Derivatives of the Bessel functions, most of which PyTorch calls non-differentiable, and of ``sin(x) / x``.

The formulas are the recurrences of DLMF 10.6, 10.29 and 10.51. Where these lose digits they are replaced by series that
lose none, so that higher derivatives are right as well: a quotient by a small ``x`` by its power series, the difference
of scaled functions of a large ``x`` by the slope of their asymptotic series (DLMF 10.40.1, 10.40.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from functrans.derivatives.helpers import conj
from functrans.derivatives.series import even_or, power_series
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten
special = torch.special
pointwise = partial(derivative, tangent="elementwise")

TERMS = 16


#: of J₁(x) / x, and, without the signs, of I₁(x) / x (DLMF 10.2.2, 10.25.2)
J1_OVER_X = [(-1) ** k / (2 * 4**k * math.factorial(k) * math.factorial(k + 1)) for k in range(TERMS)]
I1_OVER_X = [abs(c) for c in J1_OVER_X]
#: of j₀'(x) / x, where j₀(x) = sin(x) / x
SPHERICAL_SLOPE_OVER_X = [(-1) ** (k + 1) * (2 * k + 2) / math.factorial(2 * k + 3) for k in range(TERMS)]

# ------------------------------------------------------------------------------------------- J and Y


def bessel_j1_self(grad: Tensor, self: Tensor) -> Tensor:
    return grad * (special.bessel_j0(self) - even_or(lambda x: special.bessel_j1(x) / x, self, J1_OVER_X))


def pole_or(away: Callable[[Tensor], Tensor], x: Tensor, leading: Tensor) -> Tensor:
    """``away(x)``; at the pole 0, where that is a difference of infinities, its ``leading`` term."""
    pole = x == 0
    return torch.where(pole, leading, away(torch.where(pole, 1, x)))


def bessel_y1_self(grad: Tensor, self: Tensor) -> Tensor:
    return grad * pole_or(
        lambda x: special.bessel_y0(x) - special.bessel_y1(x) / x, self, 2 / math.pi * self.reciprocal().square()
    )


pointwise(aten.special_bessel_j0.default, self=lambda grad, self: -grad * special.bessel_j1(self))
pointwise(aten.special_bessel_j1.default, self=bessel_j1_self)
pointwise(aten.special_bessel_y0.default, self=lambda grad, self: -grad * special.bessel_y1(self))
pointwise(aten.special_bessel_y1.default, self=bessel_y1_self)

# ------------------------------------------------------------------------------------------- I and K


def i1_slope(i0: Callable[[Tensor], Tensor], i1: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return i0(x) - even_or(lambda x: i1(x) / x, x, I1_OVER_X)


def modified(i0: OpOverload, i1: OpOverload) -> None:
    pointwise(i0, self=lambda grad, self: grad * i1(self))
    pointwise(i1, self=lambda grad, self: grad * i1_slope(i0, i1, self))


modified(aten.i0.default, aten.special_i1.default)
modified(aten.special_modified_bessel_i0.default, aten.special_modified_bessel_i1.default)

pointwise(aten.special_modified_bessel_k0.default, self=lambda grad, self: -grad * special.modified_bessel_k1(self))
pointwise(
    aten.special_modified_bessel_k1.default,
    self=lambda grad, self, result: -grad * (special.modified_bessel_k0(self) + result / self),
)

# --------------------------------------------------------------------------------------- scaled by exp(-abs(x)), exp(x)


def asymptotic_slope(nu: int, sign: int) -> list[float]:
    """Coefficients, in powers of ``1 / x``, of the slope of a series, divided by ``x ** -1.5``.

    The series is ``x ** -0.5 * sum(sign ** k * a[k] / x ** k)``.
    """
    found, a = [], 1.0
    for k in range(TERMS + 5):
        found.append(-(k + 0.5) * sign**k * a)
        a *= (4 * nu * nu - (2 * k + 1) ** 2) / (8 * (k + 1))
    return found


I_SLOPES = [[c / math.sqrt(2 * math.pi) for c in asymptotic_slope(nu, -1)] for nu in (0, 1)]
K_SLOPES = [[c * math.sqrt(math.pi / 2) for c in asymptotic_slope(nu, 1)] for nu in (0, 1)]


def far_or(near: Callable[[Tensor], Tensor], x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``near(x)``; for large ``x`` the slope of the asymptotic series, which ends at the precision of the dtype."""
    far = x > (30 if x.dtype == torch.float64 else 10)
    y = torch.where(far, x, 30).reciprocal()
    return torch.where(far, y * y.sqrt() * power_series(y, coefficients), near(torch.where(far, 1, x)))


def i0e_self(grad: Tensor, self: Tensor) -> Tensor:
    slope = self.sgn() * far_or(lambda x: special.i1e(x) - special.i0e(x), self.abs(), I_SLOPES[0])
    return grad * torch.where(self == 0, special.i1e(self), slope)  # the choice of PyTorch at the kink, of every order


def i1e_near(x: Tensor) -> Tensor:
    return special.i0e(x) - special.i1e(x) - torch.exp(-x) * even_or(lambda x: special.i1(x) / x, x, I1_OVER_X)


def k0e_near(x: Tensor) -> Tensor:
    k0e, k1e = special.scaled_modified_bessel_k0, special.scaled_modified_bessel_k1
    return pole_or(lambda x: k0e(x) - k1e(x), x, -x.reciprocal())


def k1e_near(x: Tensor) -> Tensor:
    k0e, k1e = special.scaled_modified_bessel_k0, special.scaled_modified_bessel_k1
    return pole_or(lambda x: k1e(x) - k0e(x) - k1e(x) / x, x, -x.reciprocal().square())


pointwise(aten.special_i0e.default, self=i0e_self)
pointwise(aten.special_i1e.default, self=lambda grad, self: grad * far_or(i1e_near, self.abs(), I_SLOPES[1]))
pointwise(aten.special_scaled_modified_bessel_k0.default, x=lambda grad, x: grad * far_or(k0e_near, x, K_SLOPES[0]))
pointwise(aten.special_scaled_modified_bessel_k1.default, x=lambda grad, x: grad * far_or(k1e_near, x, K_SLOPES[1]))

# ------------------------------------------------------------------------------------------- sin(x) / x


def spherical_slope(x: Tensor) -> Tensor:
    """The slope of ``sin(x) / x``, 0 at infinity."""
    inside = x.abs() < math.inf
    x = torch.where(inside, x, 0)
    return x * even_or(lambda x: (x.cos() - x.sin() / x) / (x * x), x, SPHERICAL_SLOPE_OVER_X)


pointwise(aten.special_spherical_bessel_j0.default, x=lambda grad, x: grad * spherical_slope(x))
pointwise(aten.sinc.default, self=lambda grad, self: grad * conj(math.pi * spherical_slope(math.pi * self)))
