"""Derivatives of the pointwise operators of two and three tensors.

Every entry is pointwise: the table sums a cotangent down to its argument's shape and casts it to its dtype. An operand
may also be a Python number. What happens at ties and poles follows PyTorch's derivatives table (``derivatives.yaml``).
"""

from __future__ import annotations

import cmath
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast, conj, times, where_or_zero, wide
from functrans.derivatives.table import derivative

aten = torch.ops.aten
pointwise = partial(derivative, tangent="elementwise")

LN2 = math.log(2)

# ------------------------------------------------------------------------------------------- sums

pointwise(aten.add.Tensor, self=lambda grad: grad, other=lambda grad, alpha: times(grad, conj(alpha)))
pointwise(aten.add.Scalar, self=lambda grad: grad)
pointwise(aten.sub.Tensor, self=lambda grad: grad, other=lambda grad, alpha: -times(grad, conj(alpha)))
pointwise(aten.sub.Scalar, self=lambda grad: grad)
# but for its last digit it is ``self``, also where both are equal
pointwise(aten.nextafter.default, self=lambda grad: grad, other=lambda grad: torch.zeros_like(grad))
pointwise(aten.rsub.Tensor, self=lambda grad, alpha: -times(grad, conj(alpha)), other=lambda grad: grad)
pointwise(aten.rsub.Scalar, self=lambda grad, alpha: -times(grad, conj(alpha)))

pointwise(
    aten.lerp.Scalar,
    self=lambda grad, weight: grad * (1 - conj(weight)),
    end=lambda grad, weight: grad * conj(weight),
)
pointwise(
    aten.lerp.Tensor,
    self=lambda grad, weight: grad * conj(1 - weight),
    end=lambda grad, weight: grad * conj(weight),
    weight=lambda grad, self, end: grad * conj(end - self),
)

# ------------------------------------------------------------------------------------------- products

pointwise(
    aten.mul.Tensor,
    self=lambda grad, other: grad * conj(other),
    other=lambda grad, self: grad * conj(self),
)
pointwise(aten.mul.Scalar, self=lambda grad, other: grad * conj(other))

pointwise(
    aten.addcmul.default,
    self=lambda grad: grad,
    tensor1=lambda grad, tensor2, value: grad * conj(times(tensor2, value)),
    tensor2=lambda grad, tensor1, value: grad * conj(times(tensor1, value)),
)
pointwise(
    aten.addcdiv.default,
    self=lambda grad: grad,
    tensor1=lambda grad, tensor2, value: grad * conj(value / tensor2),
    tensor2=lambda grad, tensor1, tensor2, value: -grad * conj(times(tensor1, value) / (tensor2 * tensor2)),
)


def ldexp_self(grad: Tensor, other: Tensor) -> Tensor:
    if not (other.dtype.is_floating_point or other.dtype.is_complex):
        other = other.to(torch.promote_types(grad.dtype, torch.float32))
    return cast(grad * conj(torch.pow(2.0, other)), grad.dtype)


pointwise(
    aten.ldexp.Tensor,
    self=ldexp_self,
    other=lambda grad, result: grad * conj(result) * LN2,
)

# ------------------------------------------------------------------------------------------- quotients


def div_tangent(other: Any, result: Tensor, self_t: Tensor | None, other_t: Tensor | None) -> Tensor:
    if other_t is None:
        return self_t / other
    change = other_t * result
    return (-change if self_t is None else self_t - change) / other


derivative(
    aten.div.Tensor,
    broadcasts=True,
    tangent=div_tangent,
    self=lambda grad, other: grad / conj(other),
    other=lambda grad, other, result: -grad * conj(result / other),
)
pointwise(aten.div.Scalar, self=lambda grad, other: grad / conj(other))


def rounded_div_self(grad: Tensor, other: Any, rounding_mode: str | None) -> Tensor:
    return grad / conj(other) if rounding_mode is None else torch.zeros_like(grad)


def rounded_div_other(grad: Tensor, self: Any, other: Any, rounding_mode: str | None) -> Tensor:
    return -grad * conj(self / other / other) if rounding_mode is None else torch.zeros_like(grad)


pointwise(aten.div.Tensor_mode, self=rounded_div_self, other=rounded_div_other)
pointwise(aten.div.Scalar_mode, self=rounded_div_self)

pointwise(
    aten.fmod.Tensor,
    self=lambda grad: grad,
    other=lambda grad, self, other: -grad * torch.div(self, other, rounding_mode="trunc"),
)
pointwise(aten.fmod.Scalar, self=lambda grad: grad)
pointwise(
    aten.remainder.Tensor,
    self=lambda grad: grad,
    other=lambda grad, self, other: -grad * torch.div(self, other, rounding_mode="floor"),
)
pointwise(aten.remainder.Scalar, self=lambda grad: grad)
pointwise(
    aten.remainder.Scalar_Tensor,
    other=lambda grad, self, other: -grad * torch.div(torch.full_like(other, self), other, rounding_mode="floor"),
)

# ------------------------------------------------------------------------------------------- powers


def pow_base(grad: Tensor, self: Tensor, exponent: Any) -> Tensor:
    """``p * x ** (p - 1)``, also where ``p`` is 0 and ``x`` too: there 0."""
    if isinstance(exponent, Tensor):
        base = torch.where((exponent == 0) & (self == 0), 1, self)
        exponent = wide(exponent)
        return grad * conj(exponent * base.pow(exponent - 1))
    if exponent == 0:
        return torch.zeros_like(grad)
    if exponent == 1:
        return grad
    if exponent == 2:
        return grad * conj(2 * self)
    return grad * conj(exponent * self.pow(exponent - 1))


def pow_exponent(grad: Tensor, self: Any, exponent: Tensor, result: Tensor) -> Tensor:
    """``result * log(x)``, and 0 where ``x`` is 0 and ``p`` is not negative.

    The mixed second derivative is there what the slope by ``x`` has, in whichever order they are taken: 0 if ``p > 1``,
    and 1 at ``p`` of 1 (and of 0, where ``pow_base`` takes 1 for ``x``). Between 0 and 1 it is infinite, and comes out
    as NaN.
    """
    real = torch.real(exponent)
    positive = (torch.imag(exponent) == 0) & (real >= 0) if exponent.dtype.is_complex else real >= 0
    if isinstance(self, Tensor):
        at_zero = (self == 0) & positive
        base = self.to(result.dtype)
        slope_of_1 = at_zero & ((real == 1) | (real == 0))
        slope = result * torch.where(slope_of_1 | (at_zero & (real > 1)), 1, base).log()
        return grad * conj(torch.where(slope_of_1, base, slope.masked_fill(at_zero, 0)))
    if self == 0:
        return grad * conj(result * torch.full_like(exponent, -math.inf).masked_fill(positive, 0))
    if result.dtype.is_complex:
        log = cmath.log(self)
    else:
        log = math.log(self) if self > 0 else math.nan
    return grad * conj(result * log)


pointwise(aten.pow.Tensor_Scalar, self=pow_base)
pointwise(aten.pow.Tensor_Tensor, self=pow_base, exponent=pow_exponent)
pointwise(aten.pow.Scalar, exponent=pow_exponent)

# ------------------------------------------------------------------------------------------- logarithms


def sigmoid_of(x: Tensor) -> Tensor:
    """With higher derivatives that neither overflow nor lose a small result."""
    if x.dtype.is_complex:
        return torch.sigmoid(x)
    positive = x >= 0
    right, left = (-torch.where(positive, x, 0)).exp(), torch.where(positive, 0, x).exp()
    return torch.where(positive, 1 / (1 + right), left / (1 + left))


def share(a: Tensor, b: Tensor, base: float = 1.0) -> Tensor:
    """``exp(a) / (exp(a) + exp(b))``; NaN where both are the same infinity, as in PyTorch."""
    a, b = (x.to(torch.uint8) if x.dtype is torch.bool else x for x in (a, b))
    return sigmoid_of(times(a - b, base))


pointwise(
    aten.logaddexp.default,
    self=lambda grad, self, other: grad * conj(share(self, other)),
    other=lambda grad, self, other: grad * conj(share(other, self)),
)
pointwise(
    aten.logaddexp2.default,
    self=lambda grad, self, other: grad * share(self, other, LN2),
    other=lambda grad, self, other: grad * share(other, self, LN2),
)


def xlogy_self(grad: Tensor, self: Tensor, other: Any) -> Tensor:
    return torch.xlogy(grad, torch.where((self == 0) & (other <= 0), 1, cast(other, grad.dtype)))


def xlog1py_self(grad: Tensor, self: Tensor, other: Any) -> Tensor:
    return torch.special.xlog1py(grad, torch.where((self == 0) & (other <= -1), 0, cast(other, grad.dtype)))


pointwise(aten.xlogy.Tensor, self=xlogy_self, other=lambda grad, self, other: grad * self / other)
pointwise(aten.xlogy.Scalar_Self, other=lambda grad, self, other: grad * self / other)
pointwise(
    aten.special_xlog1py.default,
    self=xlog1py_self,
    other=lambda grad, self, other: grad * self / (other + 1),
)
pointwise(aten.special_xlog1py.self_scalar, other=lambda grad, self, other: grad * self / (other + 1))


def xlogy_scalar_self(grad: Tensor, self: Tensor, other: float) -> Tensor:
    return torch.xlogy(grad, other if other > 0 else torch.full_like(grad, other).masked_fill(self == 0, 1))


def xlog1py_scalar_self(grad: Tensor, self: Tensor, other: float) -> Tensor:
    return torch.special.xlog1py(grad, other if other > -1 else torch.full_like(grad, other).masked_fill(self == 0, 0))


pointwise(aten.xlogy.Scalar_Other, self=xlogy_scalar_self)
pointwise(aten.special_xlog1py.other_scalar, self=xlog1py_scalar_self)

# ------------------------------------------------------------------------------------------- plane geometry


def square_radius(self: Tensor, other: Tensor) -> Tensor:
    """``x ** 2 + y ** 2``, and infinity at the origin, so that a quotient by it is 0 there."""
    self, other = wide(self), wide(other)
    square = self * self + other * other
    return square.masked_fill(square == 0, math.inf)


pointwise(
    aten.atan2.default,
    self=lambda grad, self, other: grad * (other / square_radius(self, other)),
    other=lambda grad, self, other: -grad * (self / square_radius(self, other)),
)
pointwise(
    aten.hypot.default,
    self=lambda grad, self, result: grad * (self / result),
    other=lambda grad, other, result: grad * (other / result),
)


def copysign_self(grad: Tensor, self: Tensor, result: Tensor) -> Tensor:
    return grad * (self.sgn() * result.sgn())


pointwise(aten.copysign.Tensor, self=copysign_self, other=lambda grad: torch.zeros_like(grad))
pointwise(aten.copysign.Scalar, self=copysign_self)


def complex_tangent(real: Tensor, imag: Tensor, real_t: Tensor | None, imag_t: Tensor | None) -> Tensor:
    return torch.complex(
        torch.zeros_like(real) if real_t is None else real_t,
        torch.zeros_like(imag) if imag_t is None else imag_t,
    )


derivative(
    aten.complex.default,
    broadcasts=True,
    tangent=complex_tangent,
    real=lambda grad: torch.real(grad),
    imag=lambda grad: torch.imag(grad),
)

# ------------------------------------------------------------------------------------------- choices


def where_tangent(condition: Tensor, result: Tensor, self_t: Tensor | None, other_t: Tensor | None) -> Tensor:
    # one `where` for both tangents; a 0 in place of a missing one would not broadcast or promote as the operand does
    zero = torch.zeros_like(result)
    return torch.where(condition, zero if self_t is None else self_t, zero if other_t is None else other_t)


derivative(
    aten.where.self,
    broadcasts=True,
    tangent=where_tangent,
    self=lambda grad, condition: where_or_zero(condition, grad),
    other=lambda grad, condition: aten.where.ScalarSelf(condition, 0, grad),
)
pointwise(aten.where.ScalarOther, self=lambda grad, condition: where_or_zero(condition, grad))
pointwise(aten.where.ScalarSelf, other=lambda grad, condition: aten.where.ScalarSelf(condition, 0, grad))

# PyTorch takes heaviside for a constant, but at 0 it is the second operand
pointwise(
    aten.heaviside.default,
    self=lambda grad: torch.zeros_like(grad),
    values=lambda grad, self: where_or_zero(self == 0, grad),
)

# ------------------------------------------------------------------------------------------- overwriting

pointwise(aten.masked_fill.Scalar, self=lambda grad, mask: grad.masked_fill(mask, 0))
pointwise(
    aten.masked_fill.Tensor,
    self=lambda grad, mask: grad.masked_fill(mask, 0),
    value=lambda grad, mask: where_or_zero(mask, grad),
)
pointwise(aten.fill.Scalar, self=lambda grad: torch.zeros_like(grad))
pointwise(aten.fill.Tensor, self=lambda grad: torch.zeros_like(grad), value=lambda grad: grad)
pointwise(aten.copy.default, self=lambda grad: torch.zeros_like(grad), src=lambda grad: grad)
