"""Derivatives of the incomplete gamma functions, by the shape ``a`` too, for which PyTorch has no formula.

``igamma(a, x)`` is the integral from 0 to ``x`` of the gamma density ``p(t) = t ** (a - 1) * exp(-t) / gamma(a)``. Of
``p`` the n-th derivative by ``a`` is ``p(t) * bell(n, log(t) - psi(a), -psi'(a), -psi''(a), ...)`` with the complete
Bell polynomial (Faa di Bruno's formula). So two operators of our own, of which ``n`` is a parameter, close the table:
that derivative, and its integral. The integral is taken over the shorter side of ``x``, where the terms of the first
order have one sign, by a double exponential rule (Takahasi and Mori 1974), along ``t = x * exp(-u)`` to the left and
``t = x + u`` to the right.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import wide
from functrans.derivatives.own_operators import own_operator
from functrans.derivatives.series import power_series
from functrans.derivatives.table import derivative

aten = torch.ops.aten

STEP = 0.1
#: places and weights on the half-line, for what decays like ``exp(-u)``
PLACES = [math.exp(k - math.exp(-k)) for k in (STEP * i for i in range(-40, 46))]
WEIGHTS = [STEP * math.exp(k - math.exp(-k)) * (1 + math.exp(-k)) for k in (STEP * i for i in range(-40, 46))]

#: of ``lgamma(a) - (a - 1/2) * log(a) + a - log(2 * pi) / 2``, divided by 1 / a, in powers of 1 / a ** 2 (DLMF 5.11.1)
STIRLING = [1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156]
#: of ``log(a) - psi(a) - 1 / (2 * a)``, divided by 1 / a ** 2 (DLMF 5.11.2)
STIRLING_SLOPE = [(2 * k + 1) * c for k, c in enumerate(STIRLING)]
LARGE = 20


def log_over(a: Tensor, x: Tensor) -> Tensor:
    """``log(x / a)``."""
    near = (x - a).abs() < a / 2
    return torch.where(near, torch.log1p(torch.where(near, x - a, 0) / a), x.log() - a.log())


def log_density(a: Tensor, log_ratio: Tensor) -> Tensor:
    """The logarithm of ``t * p(t)``, where ``log_ratio = log(t / a)``; without loss of digits for a large ``a``."""
    large = a >= LARGE
    y = torch.where(large, a, LARGE).reciprocal()
    far = -0.5 * (2 * math.pi * y).log() - y * power_series(y * y, STIRLING)
    b = torch.where(large, 1, a)
    return a * (log_ratio - log_ratio.expm1()) + torch.where(large, far, b * b.log() - b - b.lgamma())


def bell(n: int, a: Tensor, log_ratio: Tensor) -> Tensor:
    """What the ``n``-th derivative by ``a`` multiplies the density by."""
    large = a >= LARGE
    y = torch.where(large, a, LARGE).reciprocal()
    b = torch.where(large, 1, a)
    first = log_ratio + torch.where(large, y / 2 + y * y * power_series(y * y, STIRLING_SLOPE), b.log() - b.digamma())
    # psi's slopes (DLMF 5.15.1); of the first torch.polygamma has 10 digits
    slopes = [first, *((-1) ** k * math.factorial(k) * torch.special.zeta(k + 1, a) for k in range(1, n))]
    found = [torch.ones_like(first)]
    for k in range(n):
        found.append(sum(math.comb(k, i) * found[k - i] * slopes[i] for i in range(k + 1)))
    return found[n]


def integral(n: int, a: Tensor, x: Tensor, relative: bool = False) -> Tensor:
    """Of the ``n``-th derivative of the density by ``a``, from 0 to ``x``; ``relative`` to the density at ``x``."""
    a, x = a.unsqueeze(-1), x.unsqueeze(-1)
    places, weights = (x.new_tensor(numbers) for numbers in (PLACES, WEIGHTS))
    left = x < a
    # left of x the integrand falls like exp(-(a - x) * u), or like a Gaussian of width 1 / sqrt(a)
    below = torch.where(left, x, a / 2)
    width = 1 / (a - below + torch.minimum(a.sqrt(), a))
    ratio = log_over(a, below) - places * width
    terms = (log_density(a, ratio) - relative * log_density(a, log_over(a, below))).exp() * bell(n, a, ratio)
    of_left = (terms * weights * width).sum(-1)
    # right of x it falls like exp(-(1 - (a - 1) / x) * u), or like a Gaussian of width sqrt(x)
    above = torch.where(left, 2 * a, x)
    width = 1 / torch.maximum((1 - (a - 1) / above).clamp(0, 1), above.clamp(min=1).rsqrt())
    t = above + places * width
    ratio = log_over(a, t)
    terms = (log_density(a, ratio) - relative * log_density(a, log_over(a, above))).exp() * bell(n, a, ratio)
    of_right = (terms / t * weights * width).sum(-1)
    return torch.where(left.squeeze(-1), of_left, -of_right)


def prepared(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both in one shape and in double precision, and the dtype of the result."""
    dtype = torch.result_type(a, x)
    a, x = torch.broadcast_tensors(a.double(), x.double())
    return a, x, dtype


def density_by_shape(a: Tensor, x: Tensor, n: int) -> Tensor:
    return gamma_density(a, x, n + 1)


def density_by_x(a: Tensor, x: Tensor, n: int) -> Tensor:
    """The slope of ``gamma_density(a, x, n)`` by ``x``: from ``x * p' = (a - 1 - x) * p``, ``n`` times by ``a``."""
    slope = gamma_density(a, x, n) * ((wide(a) - 1) / x - 1)
    return slope + n * gamma_density(a, x, n - 1) / x if n else slope


@own_operator("gamma_density(Tensor a, Tensor x, int n) -> Tensor", density_by_shape, density_by_x)
def gamma_density(a: Tensor, x: Tensor, n: int) -> Tensor:
    """The ``n``-th derivative by ``a`` of the gamma density at ``x``."""
    a, x, dtype = prepared(a, x)
    inside = (x > 0) & (x < math.inf)
    y = torch.where(inside, x, 1)
    ratio = log_over(a, y)
    found = (log_density(a, ratio) - y.log()).exp() * bell(n, a, ratio)
    at_zero = torch.where(a < 1, math.inf, torch.where(a == 1, 1.0, 0.0)) if n == 0 else torch.where(a > 1, 0, math.nan)
    return torch.where(inside, found, torch.where(x == 0, at_zero, torch.where(x == math.inf, 0, math.nan))).to(dtype)


def next_by_shape(a: Tensor, x: Tensor, n: int) -> Tensor:
    return igamma_by_shape(a, x, n + 1)


@own_operator("igamma_by_shape(Tensor a, Tensor x, int n) -> Tensor", next_by_shape, gamma_density)
def igamma_by_shape(a: Tensor, x: Tensor, n: int) -> Tensor:
    """The ``n``-th derivative of ``igamma(a, x)`` by ``a``, ``n`` at least 1."""
    a, x, dtype = prepared(a, x)
    inside = (x > 0) & (x < math.inf)
    found = integral(n, a, torch.where(inside, x, 1))
    return torch.where(inside, found, torch.where(x >= 0, 0, math.nan)).to(dtype)


def by_shape_and_end(sign: int) -> dict[str, Any]:
    return {
        "self": lambda grad, self, other: grad * (sign * igamma_by_shape(self, other, 1)),
        "other": lambda grad, self, other: grad * (sign * gamma_density(self, other, 0)),
    }


derivative(aten.igamma.default, tangent="elementwise", **by_shape_and_end(1))
derivative(aten.igammac.default, tangent="elementwise", **by_shape_and_end(-1))
derivative(
    igamma_by_shape,
    tangent="elementwise",
    a=lambda grad, a, x, n: grad * next_by_shape(a, x, n),
    x=lambda grad, a, x, n: grad * gamma_density(a, x, n),
)
derivative(
    gamma_density,
    tangent="elementwise",
    a=lambda grad, a, x, n: grad * density_by_shape(a, x, n),
    x=lambda grad, a, x, n: grad * density_by_x(a, x, n),
)

# ------------------------------------------------------------------------------------------- of a draw


def quotient_by_shape(a: Tensor, x: Tensor, n: int) -> Tensor:
    return igamma_quotient(a, x, n + 1) - igamma_quotient(a, x, n) * bell(1, a, log_over(a, x))


def quotient_by_x(a: Tensor, x: Tensor, n: int) -> Tensor:
    return bell(n, a, log_over(a, x)) - igamma_quotient(a, x, n) * ((wide(a) - 1) / x - 1)


@own_operator("igamma_quotient(Tensor a, Tensor x, int n) -> Tensor", quotient_by_shape, quotient_by_x)
def igamma_quotient(a: Tensor, x: Tensor, n: int) -> Tensor:
    """``igamma_by_shape(a, x, n) / gamma_density(a, x, 0)``, also where both are too small for a number."""
    a, x, dtype = prepared(a, x)
    return (integral(n, a, x, relative=True) * x).to(dtype)


derivative(
    igamma_quotient,
    tangent="elementwise",
    a=lambda grad, a, x, n: grad * quotient_by_shape(a, x, n),
    x=lambda grad, a, x, n: grad * quotient_by_x(a, x, n),
)
# the slope of a draw ``output`` by ``self`` at a fixed quantile: minus the quotient for n = 1
derivative(
    aten._standard_gamma_grad.default,
    tangent="elementwise",
    self=lambda grad, self, output: -grad * quotient_by_shape(self, output, 1),
    output=lambda grad, self, output: -grad * quotient_by_x(self, output, 1),
)
