"""Derivatives of reductions.

What happens at ties and at norms of 0 follows PyTorch's derivatives table (``derivatives.yaml``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import identity_for
from functrans.derivatives.helpers import add, cast, conj, reduced_dims, restore_dims, subtrahend, where_or_zero
from functrans.derivatives.named import named
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import holds
from functrans.tensors.sparse import in_layout_of

aten = torch.ops.aten
Dim = int | Sequence[int] | None


def spread(grad: Tensor, self: Tensor, dim: Dim, keepdim: bool) -> Tensor:
    """The transpose of a sum over ``dim``."""
    return cast(restore_dims(grad, dim, keepdim, self.dim()), self.dtype).expand(self.shape)


def size_of(self: Tensor, dim: Dim) -> int:
    """How many elements a reduction over ``dim`` takes together."""
    return math.prod(self.shape[d] for d in reduced_dims(dim, self.dim()))


def average(grad: Tensor, self: Tensor, dim: Dim) -> Tensor:
    n = size_of(self, dim)
    return grad / (1 if holds(n == 0) else n)  # of no elements: nothing receives it, but 1 / 0 would make NaN of it


def even_shares(chosen: Tensor, dim: Dim, dtype: torch.dtype) -> Tensor:
    """1 / how many are chosen along ``dim``, where one is. (Of counts alone the quotient has the default dtype.)"""
    return chosen.to(dtype) / chosen.sum(reduced_dims(dim, chosen.dim()), keepdim=True)


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
    on_diagonal = identity_for(self, rows, columns, dtype=torch.bool)
    return where_or_zero(on_diagonal, grad)


derivative(aten.trace.default, tangent="linear", self=trace_self)

# ------------------------------------------------------------------------------------------- weighted sums


def same(x: Tensor, result: Tensor) -> Tensor:
    return x


def weighted(op: OpOverload, weight: Callable[..., Tensor], outer: Callable[[Tensor, Tensor], Tensor] = same) -> None:
    """Add the entry of a reduction that is a weighted sum to first order; one formula serves both modes.

    The cotangent of ``self`` is ``grad * weight``, the tangent is the sum of ``self_t * conj(weight)``. The parameters
    of ``weight`` are ``self``, then ``dim`` and ``keepdim`` if ``op`` has them, options, and ``result``.
    ``outer(x, result)`` is ``x`` times the slope of a function of that sum.
    """
    names = tuple(inspect.signature(weight).parameters)
    along = 2 if "dim" in names else 0

    def cotangent(grad: Tensor, self: Tensor, *rest: Any) -> Tensor:
        return pulled(outer(grad, rest[-1]), self, weight(self, *rest), *rest[:along])

    def tangent(self_t: Tensor, self: Tensor, *rest: Any) -> Tensor:
        return outer(pushed(self_t, rest[-1], weight(self, *rest), *rest[:along]), rest[-1])

    derivative(op, tangent=named(("self_t", *names), tangent), self=named(("grad", *names), cotangent))


def pulled(grad: Tensor, self: Tensor, weight: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    return cast(restore_dims(grad, dim, keepdim, self.dim()) * weight, self.dtype)


def pushed(self_t: Tensor, result: Tensor, weight: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    parts = in_layout_of(self_t * conj(weight), result)
    return cast(parts.sum(reduced_dims(dim, self_t.dim()), keepdim=keepdim), result.dtype)


# ------------------------------------------------------------------------------------------- variance


def deviation(self: Tensor, dim: Dim, keepdim: bool, correction: float | None, result: Tensor) -> Tensor:
    """The gradient of the variance: ``2 * (x - mean) / (n - correction)``."""
    dims = reduced_dims(dim, self.dim())
    freedom = math.prod([self.shape[d] for d in dims]) - (1 if correction is None else correction)
    distance = self - self.mean(dims, keepdim=True)
    if holds(freedom <= 0):  # the variance is nan, or infinite unless it is 0 / 0
        return torch.where(distance == 0, math.nan, torch.full_like(distance, math.inf))
    return distance * (2 / freedom)


def half_over(x: Tensor, std: Tensor) -> Tensor:
    """From the variance to its root: ``x / (2 * std)``, and 0 where ``std`` is 0."""
    return x / (2 * std).masked_fill(std == 0, math.inf)


def with_mean(op: OpOverload, outer: Callable[[Tensor, Tensor], Tensor] = same) -> None:
    """Add the entry of the variance or its root together with the mean."""

    def cotangent(grads: Any, self: Tensor, dim: Dim, keepdim: bool, correction: float | None, results: Any) -> Any:
        first, mean = grads
        if first is not None:
            weight = deviation(self, dim, keepdim, correction, results[0])
            first = pulled(outer(first, results[0]), self, weight, dim, keepdim)
        return add(first, None if mean is None else spread(average(mean, self, dim), self, dim, keepdim))

    def tangent(self_t: Tensor, self: Tensor, dim: Dim, keepdim: bool, correction: float | None, results: Any) -> Any:
        first = pushed(self_t, results[0], deviation(self, dim, keepdim, correction, results[0]), dim, keepdim)
        return outer(first, results[0]), self_t.mean(reduced_dims(dim, self.dim()), keepdim=keepdim)

    derivative(op, tangent=tangent, self=cotangent)


weighted(aten.var.correction, deviation)
weighted(aten.std.correction, deviation, half_over)
with_mean(aten.var_mean.correction)
with_mean(aten.std_mean.correction, half_over)

# ------------------------------------------------------------------------------------------- logsumexp and norms


def softmax_weight(self: Tensor, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    return conj((self - restore_dims(subtrahend(result), dim, keepdim, self.dim())).exp())


def norm_weight(self: Tensor, dim: Dim, keepdim: bool, p: float, result: Tensor) -> Tensor:
    """``sgn(x) * (|x| / norm) ** (p - 1)``, and 0 where the norm is 0."""
    x = self.to(result.dtype.to_complex() if self.dtype.is_complex else result.dtype)
    norm = restore_dims(result, dim, keepdim, self.dim())
    if p == 0:
        return torch.zeros_like(x)
    if p == 1:
        return x.sgn()
    if p == 2:
        return x / norm.masked_fill(norm == 0, math.inf)
    modulus = x.abs()
    if math.isinf(p):  # ties share evenly
        extreme = (modulus == norm) | (modulus.isnan() & norm.isnan())
        return x.sgn() * even_shares(extreme, dim, norm.dtype)
    empty = norm == 0  # 0 in every order of derivative
    given, x = x, x.masked_fill(empty, 0)
    norm, modulus = norm.masked_fill(empty, 1), modulus.masked_fill(empty, 1)
    if p < 1:
        return (x.sgn() * modulus.pow(p - 1)).masked_fill(given == 0, 0) * norm.pow(1 - p)
    if p < 2:
        return x.sgn() * modulus.pow(p - 1) / norm.pow(p - 1)
    if p % 2 == 0:  # a polynomial, in the real and imaginary parts too
        return x * cast(x * conj(x), norm.dtype).pow(p // 2 - 1) / norm.pow(p - 1)
    # the slope of the power below may be infinite there; that of the whole is 0 in every order that there is
    zero = x == 0
    return x.masked_fill(zero, 0) * modulus.masked_fill(zero, 1).pow(p - 2) / norm.pow(p - 1)


weighted(aten.logsumexp.default, softmax_weight)
weighted(
    aten.linalg_vector_norm.default,
    lambda self, dim, keepdim, ord, result: norm_weight(self, dim, keepdim, ord, result),
)
weighted(aten.norm.Scalar, lambda self, p, result: norm_weight(self, None, False, p, result))
weighted(
    aten.norm.ScalarOpt_dim,
    lambda self, dim, keepdim, p, result: norm_weight(self, dim, keepdim, 2 if p is None else p, result),
)
