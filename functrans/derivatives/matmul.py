"""Derivatives of matrix products.

Weights come after activations: where a product of a batch with one matrix is pulled back to the matrix, the batch is
folded into the contraction, so that no gradient per row is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from functrans.derivatives.helpers import conj, times
from functrans.derivatives.named import named
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def adjoint(x: Tensor) -> Tensor:
    """The conjugate transpose of the last two dimensions."""
    return conj(x.transpose(-2, -1))


def scaled(x: Tensor, factor: Any) -> Tensor:
    """``x`` times the conjugate of a Python number."""
    return x if factor == 1 else x * conj(factor)


def sum_of(terms: list[Tensor | None]) -> Tensor | None:
    """The sum of the terms that are there."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


# ---------------------------------------------------------------------------------------- products, and sums with them

Pull = Callable[[Tensor, Tensor], Tensor]


def product(op: OpOverload, left: Pull, right: Pull, *, broadcasts: bool = False) -> None:
    """Add the entry of ``op(x, y)``: ``left(grad, y)`` is the cotangent of ``x``, ``right(grad, x)`` that of ``y``."""
    x, y = (a.name for a in op._schema.arguments)
    formulas = {x: named(("grad", y), left), y: named(("grad", x), right)}
    derivative(op, tangent="multilinear", broadcasts=broadcasts, **formulas)


def sum_with_product(op: OpOverload, multiply: Callable[[Tensor, Tensor], Tensor], left: Pull, right: Pull) -> None:
    """Add the entry of ``op(self, x, y)``, which is ``beta * self + alpha * multiply(x, y)``."""
    x, y = (a.name for a in op._schema.arguments[1:3])

    def tangent(result: Tensor, alpha: Any, beta: Any, x: Tensor, y: Tensor, self_t: Any, x_t: Any, y_t: Any) -> Any:
        moved = sum_of([None if x_t is None else multiply(x_t, y), None if y_t is None else multiply(x, y_t)])
        if moved is not None:
            moved = times(moved, alpha)
        if self_t is None:
            return moved
        self_t = times(self_t, beta)
        return self_t.expand(result.shape) if moved is None else moved + self_t

    derivative(
        op,
        tangent=named(("result", "alpha", "beta", x, y, "self_t", f"{x}_t", f"{y}_t"), tangent),
        broadcasts=True,  # self does
        self=lambda grad, beta: scaled(grad, beta),
        **{
            x: named(("grad", y, "alpha"), lambda grad, other, alpha: scaled(left(grad, other), alpha)),
            y: named(("grad", x, "alpha"), lambda grad, other, alpha: scaled(right(grad, other), alpha)),
        },
    )


# What follows each operator is how it is pulled back to the left and to the right factor.

_MM = (lambda grad, y: grad.mm(adjoint(y)), lambda grad, x: adjoint(x).mm(grad))
product(aten.mm.default, *_MM)
sum_with_product(aten.addmm.default, torch.mm, *_MM)

_BMM = (lambda grad, y: grad.bmm(adjoint(y)), lambda grad, x: adjoint(x).bmm(grad))
product(aten.bmm.default, *_BMM)
sum_with_product(aten.baddbmm.default, torch.bmm, *_BMM)
sum_with_product(
    aten.addbmm.default,
    lambda x, y: x.bmm(y).sum(0),
    lambda grad, y: grad.expand(y.shape[0], *grad.shape).bmm(adjoint(y)),
    lambda grad, x: adjoint(x).bmm(grad.expand(x.shape[0], *grad.shape)),
)

_MV = (lambda grad, y: grad.unsqueeze(-1) * conj(y), lambda grad, x: adjoint(x).mv(grad))
product(aten.mv.default, *_MV)
sum_with_product(aten.addmv.default, torch.mv, *_MV)

_OUTER = (lambda grad, y: grad.mv(conj(y).to(grad.dtype)), lambda grad, x: grad.t().mv(conj(x).to(grad.dtype)))
product(aten.outer.default, *_OUTER, broadcasts=True)  # outer promotes
product(aten.ger.default, *_OUTER, broadcasts=True)
sum_with_product(aten.addr.default, lambda x, y: x.unsqueeze(-1) * y, *_OUTER)

product(aten.dot.default, lambda grad, y: grad * conj(y), lambda grad, x: grad * conj(x))
# conjugate-linear in the left factor, which "one call per argument" takes as it is
product(aten.vdot.default, lambda grad, y: conj(grad) * y, lambda grad, x: grad * x)


# ---------------------------------------------------------------------------------------------- matmul, linear


def matmul_self(grad: Tensor, other: Tensor) -> Tensor:
    if other.dim() == 1:
        return grad.unsqueeze(-1) * conj(other)
    if grad.dim() < other.dim():  # self is a vector
        return torch.matmul(conj(other), grad.unsqueeze(-1)).squeeze(-1)
    return torch.matmul(grad, adjoint(other))


def matmul_other(grad: Tensor, self: Tensor, other: Tensor) -> Tensor:
    if self.dim() == 1:
        if other.dim() == 1:
            return grad * conj(self)
        return conj(self).unsqueeze(-1) * grad.unsqueeze(-2)
    if other.dim() == 1 and self.dim() == 2:  # it may be sparse
        return adjoint(self).mv(grad)
    if other.dim() == 1:
        return adjoint(self.reshape(-1, self.shape[-1])).mv(grad.reshape(-1))
    if other.dim() == 2 and self.dim() > 2:
        return adjoint(self.flatten(0, -2)).mm(grad.flatten(0, -2))
    return torch.matmul(adjoint(self), grad)


# broadcasts: the batch dimensions do
derivative(aten.matmul.default, tangent="multilinear", broadcasts=True, self=matmul_self, other=matmul_other)


def linear_input(grad: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 1:
        return grad.unsqueeze(-1) * conj(weight)
    return torch.matmul(grad, conj(weight))


def linear_weight(grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 1:
        return matmul_other(grad, input, weight)
    if input.dim() == 1:
        return grad.unsqueeze(-1) * conj(input)
    if input.dim() > 2:
        grad, input = grad.flatten(0, -2), input.flatten(0, -2)
    return grad.t().mm(conj(input))


def linear_tangent(
    input: Tensor,
    weight: Tensor,
    result: Tensor,
    input_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor | None:
    if input_t is not None:
        first = linear(input_t, weight, bias_t)
        return first if weight_t is None else first + linear(input, weight_t)
    if weight_t is not None:
        return linear(input, weight_t, bias_t)
    return None if bias_t is None else bias_t.expand(result.shape)


derivative(
    aten.linear.default,
    tangent=linear_tangent,
    broadcasts=True,  # the bias does
    input=linear_input,
    weight=linear_weight,
    bias=lambda grad: grad,
)


# ---------------------------------------------------------------------------------------------- bilinear layers

# _trilinear multiplies its three arguments, each unsqueezed at its own expanded dimensions, and sums over sumdim.
# Pulling back to one of them is the same product with the cotangent in its place; the dimensions change roles.
derivative(
    aten._trilinear.default,
    tangent="multilinear",
    i1=lambda grad, i2, i3, expand1, expand2, expand3, sumdim: aten._trilinear.default(
        grad, conj(i2), conj(i3), sumdim, expand2, expand3, expand1
    ),
    i2=lambda grad, i1, i3, expand1, expand2, expand3, sumdim: aten._trilinear.default(
        conj(i1), grad, conj(i3), expand1, sumdim, expand3, expand2
    ),
    i3=lambda grad, i1, i2, expand1, expand2, expand3, sumdim: aten._trilinear.default(
        conj(i1), conj(i2), grad, expand1, expand2, sumdim, expand3
    ),
)
