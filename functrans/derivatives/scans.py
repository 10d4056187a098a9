"""Derivatives of cumulative sums and products, and of products.

Products are differentiated without a division, so that zeros among the factors are right at every order, with no look
at the data. What that leads to is a linear recurrence; see ``helpers.linear_recurrence``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast, conj, linear_recurrence, restore_dims, shifted, subtrahend
from functrans.derivatives.table import derivative

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------- cumsum


def cumsum_self(grad: Tensor, self: Tensor, dim: int) -> Tensor:
    if self.dim() == 0:
        return cast(grad, self.dtype)
    return cast(grad, self.dtype).flip([dim]).cumsum(dim).flip([dim])


derivative(aten.cumsum.default, tangent="linear", self=cumsum_self)

# ------------------------------------------------------------------------------------------- products


def product_before(x: Tensor, dim: int, *, reverse: bool = False) -> Tensor:
    """The product of all elements before each one (with ``reverse``: after it) along ``dim``."""
    factors = shifted(x, dim, 1, reverse=reverse)
    if reverse:
        return factors.flip([dim]).cumprod(dim).flip([dim])
    return factors.cumprod(dim)


def cumprod_self(grad: Tensor, self: Tensor, dim: int, result: Tensor) -> Tensor:
    """``before[j] * s[j]`` with ``s[j] = grad[j] + x[j + 1] * s[j + 1]``: what follows ``j``, factors and all."""
    if self.dim() == 0:
        return cast(grad, self.dtype)
    x = self.to(result.dtype)
    later = linear_recurrence(conj(shifted(x, dim, 0, reverse=True)), grad, dim, reverse=True)
    return cast(conj(product_before(x, dim)) * later, self.dtype)


def cumprod_tangent(self: Tensor, self_t: Tensor, dim: int, result: Tensor) -> Tensor:
    """``y'[k] = x[k] * y'[k - 1] + before[k] * x'[k]``."""
    if self.dim() == 0:
        return self_t.to(result.dtype)
    x = self.to(result.dtype)
    return linear_recurrence(x, product_before(x, dim) * self_t.to(result.dtype), dim)


derivative(aten.cumprod.default, tangent=cumprod_tangent, self=cumprod_self)


def product_of_others(x: Tensor, dim: int) -> Tensor:
    if x.dim() == 0:
        return torch.ones_like(x)
    return product_before(x, dim) * product_before(x, dim, reverse=True)


def prod_dim_self(grad: Tensor, self: Tensor, dim: int, keepdim: bool, result: Tensor) -> Tensor:
    others = product_of_others(self.to(result.dtype), dim)
    return cast(restore_dims(grad, dim, keepdim, self.dim()) * conj(others), self.dtype)


def prod_dim_tangent(self: Tensor, self_t: Tensor, dim: int, keepdim: bool, result: Tensor) -> Tensor:
    terms = product_of_others(self.to(result.dtype), dim) * self_t.to(result.dtype)
    return terms.sum(dim, keepdim=keepdim)


def prod_self(grad: Tensor, self: Tensor, result: Tensor) -> Tensor:
    return prod_dim_self(grad, self.reshape(-1), 0, False, result).reshape(self.shape)


def prod_tangent(self: Tensor, self_t: Tensor, result: Tensor) -> Tensor:
    return prod_dim_tangent(self.reshape(-1), self_t.reshape(-1), 0, False, result)


derivative(aten.prod.default, tangent=prod_tangent, self=prod_self)
derivative(aten.prod.dim_int, tangent=prod_dim_tangent, self=prod_dim_self)

# ------------------------------------------------------------------------------------------- logcumsumexp


def decay(result: Tensor, dim: int, *, reverse: bool) -> Tensor:
    """``exp(y[k - 1] - y[k])``, at most 1 in modulus; with ``reverse`` the same factors, one place earlier."""
    if reverse:
        return (result - shifted(subtrahend(result), dim, math.inf, reverse=True)).exp()
    return (shifted(result, dim, -math.inf) - subtrahend(result)).exp()


def logcumsumexp_self(grad: Tensor, self: Tensor, dim: int, result: Tensor) -> Tensor:
    """The sum over ``k >= j`` of ``grad[k] * exp(x[j] - y[k])``, as a recurrence whose factors cannot overflow."""
    if self.dim() == 0:
        return grad
    later = linear_recurrence(conj(decay(result, dim, reverse=True)), grad, dim, reverse=True)
    return later * conj((self - subtrahend(result)).exp())


def logcumsumexp_tangent(self: Tensor, self_t: Tensor, dim: int, result: Tensor) -> Tensor:
    if self.dim() == 0:
        return self_t
    return linear_recurrence(decay(result, dim, reverse=False), self_t * (self - subtrahend(result)).exp(), dim)


derivative(aten.logcumsumexp.default, tangent=logcumsumexp_tangent, self=logcumsumexp_self)
