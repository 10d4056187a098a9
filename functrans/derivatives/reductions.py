"""Derivatives of reductions.

What happens at ties and at norms of 0 follows PyTorch's derivatives table (``derivatives.yaml``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import add, cast, conj, reduced_dims, restore_dims, subtrahend, where_or_zero
from functrans.derivatives.table import derivative

aten = torch.ops.aten
Dim = int | Sequence[int] | None


def spread(grad: Tensor, self: Tensor, dim: Dim, keepdim: bool) -> Tensor:
    """The transpose of a sum over ``dim``."""
    return cast(restore_dims(grad, dim, keepdim, self.dim()), self.dtype).expand(self.shape)


def size_of(self: Tensor, dim: Dim) -> int:
    """How many elements a reduction over ``dim`` takes together."""
    return math.prod(self.shape[d] for d in reduced_dims(dim, self.dim()))


def average(grad: Tensor, self: Tensor, dim: Dim) -> Tensor:
    return grad / (size_of(self, dim) or 1)  # of no elements: nothing receives it, but 1 / 0 would make NaN of it


# ------------------------------------------------------------------------------------------- sums and means

derivative(aten.sum.default, tangent="linear", self=lambda grad, self: cast(grad, self.dtype).expand(self.shape))
derivative(aten.sum.dim_IntList, tangent="linear", self=spread)
derivative(aten.sum_to_size.default, tangent="linear", self=lambda grad, self: grad.expand(self.shape))
derivative(
    aten.mean.default,
    tangent="linear",
    self=lambda grad, self: spread(average(grad, self, None), self, None, False),
)
derivative(
    aten.mean.dim,
    tangent="linear",
    self=lambda grad, self, dim, keepdim: spread(average(grad, self, dim), self, dim, keepdim),
)


def nansum_self(grad: Tensor, self: Tensor, dim: Dim, keepdim: bool) -> Tensor:
    return spread(grad, self, dim, keepdim).masked_fill(self.isnan(), 0)


def nansum_tangent(self: Tensor, self_t: Tensor, dim: Any, keepdim: bool, dtype: torch.dtype | None) -> Tensor:
    return aten.sum.dim_IntList(self_t.masked_fill(self.isnan(), 0), dim, keepdim, dtype=dtype)


derivative(aten.nansum.default, tangent=nansum_tangent, self=nansum_self)


def trace_self(grad: Tensor, self: Tensor) -> Tensor:
    rows, columns = self.shape
    on_diagonal = torch.eye(rows, columns, dtype=torch.bool, device=self.device)
    return where_or_zero(on_diagonal, grad)


derivative(aten.trace.default, tangent="linear", self=trace_self)

# ------------------------------------------------------------------------------------------- variance


def deviation(self: Tensor, dim: Dim, correction: float | None) -> Tensor:
    """The gradient of the variance: ``2 * (x - mean) / (n - correction)``."""
    n = size_of(self, dim)
    freedom = n - (1 if correction is None else correction)
    distance = self - self.mean(reduced_dims(dim, self.dim()), keepdim=True)
    if freedom <= 0:  # the variance is nan, or infinite unless it is 0 / 0
        return torch.where(distance == 0, math.nan, torch.full_like(distance, math.inf))
    return distance * (2 / freedom)


def var_self(grad: Tensor, self: Tensor, dim: Dim, correction: float | None, keepdim: bool) -> Tensor:
    return restore_dims(grad, dim, keepdim, self.dim()) * deviation(self, dim, correction)


def var_tangent(self: Tensor, self_t: Tensor, dim: Dim, correction: float | None, keepdim: bool) -> Tensor:
    terms = conj(deviation(self, dim, correction)) * self_t
    return cast(terms, self.dtype.to_real()).sum(reduced_dims(dim, self.dim()), keepdim=keepdim)


def half_over(x: Tensor, std: Tensor) -> Tensor:
    """From the variance to its root: ``x / (2 * std)``, and 0 where ``std`` is 0."""
    return x / (2 * std).masked_fill(std == 0, math.inf)


def std_self(grad: Tensor, self: Tensor, dim: Dim, correction: float | None, keepdim: bool, result: Tensor) -> Tensor:
    return var_self(half_over(grad, result), self, dim, correction, keepdim)


def std_tangent(
    self: Tensor, self_t: Tensor, dim: Dim, correction: float | None, keepdim: bool, result: Tensor
) -> Tensor:
    return half_over(var_tangent(self, self_t, dim, correction, keepdim), result)


def mean_part(grad: Tensor | None, self: Tensor, dim: Dim, keepdim: bool) -> Tensor | None:
    return None if grad is None else spread(average(grad, self, dim), self, dim, keepdim)


def mean_over(self: Tensor, dim: Dim, keepdim: bool) -> Tensor:
    return self.mean(reduced_dims(dim, self.dim()), keepdim=keepdim)


def var_mean_self(grads: Any, self: Tensor, dim: Dim, correction: float | None, keepdim: bool) -> Tensor | None:
    part = None if grads[0] is None else var_self(grads[0], self, dim, correction, keepdim)
    return add(part, mean_part(grads[1], self, dim, keepdim))


def std_mean_self(
    grads: Any, self: Tensor, dim: Dim, correction: float | None, keepdim: bool, results: Any
) -> Tensor | None:
    part = None if grads[0] is None else std_self(grads[0], self, dim, correction, keepdim, results[0])
    return add(part, mean_part(grads[1], self, dim, keepdim))


derivative(aten.var.correction, tangent=var_tangent, self=var_self)
derivative(aten.std.correction, tangent=std_tangent, self=std_self)
derivative(
    aten.var_mean.correction,
    tangent=lambda self, self_t, dim, correction, keepdim: (
        var_tangent(self, self_t, dim, correction, keepdim),
        mean_over(self_t, dim, keepdim),
    ),
    self=var_mean_self,
)
derivative(
    aten.std_mean.correction,
    tangent=lambda self, self_t, dim, correction, keepdim, results: (
        std_tangent(self, self_t, dim, correction, keepdim, results[0]),
        mean_over(self_t, dim, keepdim),
    ),
    self=std_mean_self,
)

# ------------------------------------------------------------------------------------------- logsumexp


def logsumexp_weights(self: Tensor, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    """The gradient of logsumexp: softmax."""
    return (self - restore_dims(subtrahend(result), dim, keepdim, self.dim())).exp()


def logsumexp_self(grad: Tensor, self: Tensor, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    return restore_dims(grad, dim, keepdim, self.dim()) * conj(logsumexp_weights(self, dim, keepdim, result))


def logsumexp_tangent(self: Tensor, self_t: Tensor, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    terms = self_t * logsumexp_weights(self, dim, keepdim, result)
    return terms.sum(reduced_dims(dim, self.dim()), keepdim=keepdim)


derivative(aten.logsumexp.default, tangent=logsumexp_tangent, self=logsumexp_self)

# ------------------------------------------------------------------------------------------- norms


def norm_direction(self: Tensor, norm: Tensor, p: float, dims: list[int]) -> Tensor:
    """The gradient of the p-norm: ``sgn(x) * (|x| / norm) ** (p - 1)``, and 0 where the norm is 0."""
    if p == 0:
        return torch.zeros_like(self)
    if p == 1:
        return self.sgn()
    if p == 2:
        return self / norm.masked_fill(norm == 0, math.inf)
    modulus = self.abs()
    if math.isinf(p):  # ties share evenly
        extreme = (modulus == norm) | (modulus.isnan() & norm.isnan())
        return self.sgn() * (extreme / extreme.sum(dims, keepdim=True))
    empty = norm == 0  # 0 in every order of derivative
    x, norm, modulus = self.masked_fill(empty, 0), norm.masked_fill(empty, 1), modulus.masked_fill(empty, 1)
    if p < 1:
        return (x.sgn() * modulus.pow(p - 1)).masked_fill(self == 0, 0) * norm.pow(1 - p)
    if p < 2:
        return x.sgn() * modulus.pow(p - 1) / norm.pow(p - 1)
    if p % 2 == 0:  # a polynomial, in the real and imaginary parts too
        return x * cast(x * conj(x), norm.dtype).pow(p // 2 - 1) / norm.pow(p - 1)
    zero = x == 0  # the slope of the power below may be infinite there; that of the whole is 0 in every order that there is
    return x.masked_fill(zero, 0) * modulus.masked_fill(zero, 1).pow(p - 2) / norm.pow(p - 1)


def norm_self(grad: Tensor, self: Tensor, p: Any, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    ndim = self.dim()
    x = self.to(result.dtype.to_complex() if self.dtype.is_complex else result.dtype)
    direction = norm_direction(x, restore_dims(result, dim, keepdim, ndim), p, reduced_dims(dim, ndim))
    return cast(restore_dims(grad, dim, keepdim, ndim) * direction, self.dtype)


def norm_tangent(self: Tensor, self_t: Tensor, p: Any, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    ndim = self.dim()
    dtype = result.dtype.to_complex() if self.dtype.is_complex else result.dtype
    dims = reduced_dims(dim, ndim)
    direction = norm_direction(self.to(dtype), restore_dims(result, dim, keepdim, ndim), p, dims)
    return cast(conj(direction) * self_t.to(dtype), result.dtype).sum(dims, keepdim=keepdim)


derivative(
    aten.linalg_vector_norm.default,
    tangent=lambda self, self_t, ord, dim, keepdim, result: norm_tangent(self, self_t, ord, dim, keepdim, result),
    self=lambda grad, self, ord, dim, keepdim, result: norm_self(grad, self, ord, dim, keepdim, result),
)
derivative(
    aten.norm.Scalar,
    tangent=lambda self, self_t, p, result: norm_tangent(self, self_t, p, None, False, result),
    self=lambda grad, self, p, result: norm_self(grad, self, p, None, False, result),
)
derivative(
    aten.norm.ScalarOpt_dim,
    tangent=lambda self, self_t, p, dim, keepdim, result: norm_tangent(
        self, self_t, 2 if p is None else p, dim, keepdim, result
    ),
    self=lambda grad, self, p, dim, keepdim, result: norm_self(grad, self, 2 if p is None else p, dim, keepdim, result),
)
