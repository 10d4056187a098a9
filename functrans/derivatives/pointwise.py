"""Derivatives of the pointwise operators of one tensor.

The formulas are those of the textbooks; what happens at kinks and poles follows PyTorch's derivatives table
(``derivatives.yaml``).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from functrans.derivatives.helpers import add, conj, where_or_zero
from functrans.derivatives.table import derivative

aten = torch.ops.aten
pointwise = partial(derivative, tangent="elementwise")

LN2 = math.log(2)
LN10 = math.log(10)
TWO_OVER_SQRT_PI = 2 / math.sqrt(math.pi)

# ------------------------------------------------------------------------------------------- constant pieces

for op in (
    aten.ceil.default,
    aten.floor.default,
    aten.round.default,
    aten.round.decimals,
    aten.trunc.default,
    aten.sign.default,
):
    pointwise(op, self=lambda grad: torch.zeros_like(grad))

for op in (aten.positive.default, aten.frac.default):
    pointwise(op, self=lambda grad: grad)

pointwise(aten.neg.default, self=lambda grad: -grad)
pointwise(aten.deg2rad.default, self=lambda grad: torch.deg2rad(grad))
pointwise(aten.rad2deg.default, self=lambda grad: torch.rad2deg(grad))

# ------------------------------------------------------------------------------------------- powers, exp, log

pointwise(aten.square.default, self=lambda grad, self: grad * (2 * conj(self)))
pointwise(aten.reciprocal.default, self=lambda grad, result: -grad * conj(result * result))
pointwise(aten.sqrt.default, self=lambda grad, result: grad / (2 * conj(result)))
pointwise(aten.rsqrt.default, self=lambda grad, result: -0.5 * grad * conj(result.pow(3)))
pointwise(aten.exp.default, self=lambda grad, result: grad * conj(result))
pointwise(aten.exp2.default, self=lambda grad, result: grad * conj(result) * LN2)
pointwise(aten.expm1.default, self=lambda grad, result: grad * (conj(result) + 1))
pointwise(aten.log.default, self=lambda grad, self: grad / conj(self))
pointwise(aten.log2.default, self=lambda grad, self: grad / (conj(self) * LN2))
pointwise(aten.log10.default, self=lambda grad, self: grad / (conj(self) * LN10))
pointwise(aten.log1p.default, self=lambda grad, self: grad / (conj(self) + 1))

# ------------------------------------------------------------------------------------------- trigonometry

pointwise(aten.sin.default, self=lambda grad, self: grad * conj(self.cos()))
pointwise(aten.cos.default, self=lambda grad, self: grad * -conj(self.sin()))
pointwise(aten.tan.default, self=lambda grad, result: grad * conj(1 + result * result))
pointwise(aten.asin.default, self=lambda grad, self: grad * conj((1 - self * self).rsqrt()))
pointwise(aten.acos.default, self=lambda grad, self: grad * -conj((1 - self * self).rsqrt()))
pointwise(aten.atan.default, self=lambda grad, self: grad / conj(self * self + 1))
pointwise(aten.sinh.default, self=lambda grad, self: grad * conj(self.cosh()))
pointwise(aten.cosh.default, self=lambda grad, self: grad * conj(self.sinh()))
pointwise(aten.tanh.default, self=lambda grad, result: aten.tanh_backward.default(grad, result))
pointwise(aten.asinh.default, self=lambda grad, self: grad * conj((self * self + 1).rsqrt()))
pointwise(aten.atanh.default, self=lambda grad, self: grad / conj(1 - self * self))


def tanh_backward_tangent(
    grad_output: Tensor, output: Tensor, grad_output_t: Tensor | None, output_t: Tensor | None
) -> Tensor | None:
    first = None if grad_output_t is None else aten.tanh_backward.default(grad_output_t, output)
    return add(first, None if output_t is None else grad_output * conj(-2 * output * output_t))


# ``g * conj(1 - y ** 2)``, which is not holomorphic in ``y``
derivative(
    aten.tanh_backward.default,
    broadcasts=True,
    tangent=tanh_backward_tangent,
    grad_output=lambda grad, output: aten.tanh_backward.default(grad, conj(output)),
    # the factors without grad first: where only grad is batched, they are small
    output=lambda grad, grad_output, output: conj(grad) * (grad_output * conj(-2 * output)),
)


def acosh_self(grad: Tensor, self: Tensor) -> Tensor:
    if self.dtype.is_complex:  # the product of roots keeps the branch that the root of the product would lose
        return grad * conj((self + 1).rsqrt() * (self - 1).rsqrt())
    return grad * (self * self - 1).rsqrt()


pointwise(aten.acosh.default, self=acosh_self)

# ------------------------------------------------------------------------------------------- modulus and phase


def abs_tangent(self: Tensor, self_t: Tensor) -> Tensor:
    if self.dtype.is_complex:
        return torch.real(conj(self_t) * self.sgn())
    return self_t * self.sgn()


derivative(aten.abs.default, tangent=abs_tangent, self=lambda grad, self: grad * self.sgn())


def square_or_infinity(x: Tensor) -> Tensor:
    """``|x| ** 2`` to divide by: at 0 the quotient is 0 in every order of derivative."""
    return torch.real(x * conj(x)).masked_fill(x == 0, math.inf)


def angle_self(grad: Tensor, self: Tensor) -> Tensor:
    if not self.dtype.is_complex:
        return torch.zeros_like(self)
    return grad * (self / square_or_infinity(self)) * 1j


def angle_tangent(self: Tensor, self_t: Tensor) -> Tensor:
    if not self.dtype.is_complex:
        return torch.zeros_like(self)
    return torch.imag(self_t * (conj(self) / square_or_infinity(self)))


derivative(aten.angle.default, tangent=angle_tangent, self=angle_self)


def sgn_self(grad: Tensor, self: Tensor, result: Tensor) -> Tensor:
    """Turning ``x / |x|``: only the part of ``grad`` across ``x`` counts. The map is its own adjoint."""
    if not self.dtype.is_complex:
        return torch.zeros_like(grad)
    modulus = self.abs()
    across = grad - torch.real(grad * conj(result)) * result
    return across / modulus.masked_fill(modulus == 0, math.inf)


derivative(
    aten.sgn.default,
    tangent=lambda self, self_t, result: sgn_self(self_t, self, result),
    self=sgn_self,
)


def frexp_slope(moved: Tensor, exponent: Tensor) -> Tensor:
    return moved * (-exponent).to(moved.dtype).exp2()  # a large power of 2 would not be finite


derivative(
    aten.frexp.Tensor,
    tangent=lambda self_t, results: (frexp_slope(self_t, results[1]), None),
    self=lambda grads, results: None if grads[0] is None else frexp_slope(grads[0], results[1]),
)

pointwise(aten.nan_to_num.default, self=lambda grad, self: where_or_zero(self.isfinite(), grad))

# ------------------------------------------------------------------------------------------- special functions

pointwise(aten.erf.default, self=lambda grad, self: TWO_OVER_SQRT_PI * (-self * self).exp() * grad)
pointwise(aten.erfc.default, self=lambda grad, self: -TWO_OVER_SQRT_PI * (-self * self).exp() * grad)
pointwise(aten.erfinv.default, self=lambda grad, result: (result * result).exp() * grad / TWO_OVER_SQRT_PI)
pointwise(aten.special_entr.default, self=lambda grad, self: grad * (-1 - self.log()))
pointwise(aten.lgamma.default, self=lambda grad, self: grad * torch.digamma(self))
pointwise(aten.digamma.default, self=lambda grad, self: grad * torch.polygamma(1, self))
pointwise(aten.polygamma.default, self=lambda grad, n, self: grad * torch.polygamma(n + 1, self))


def mvlgamma_self(grad: Tensor, self: Tensor, p: int) -> Tensor:
    halves = torch.arange(p, dtype=self.dtype, device=self.device) / 2
    return grad * torch.digamma(self.unsqueeze(-1) - halves).sum(-1)


pointwise(aten.mvlgamma.default, self=mvlgamma_self)


def logit_self(grad: Tensor, self: Tensor, eps: float | None) -> Tensor:
    if eps is None or eps < 0:
        return torch.where((self >= 0) & (self <= 1), grad / (self * (1 - self)), math.nan)
    inside = (self >= eps) & (self <= 1 - eps)
    x = torch.where(inside, self, 0.5)
    return where_or_zero(inside, grad / (x * (1 - x)))


pointwise(aten.logit.default, self=logit_self)
