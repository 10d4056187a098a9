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

from functrans.boundary.calls import run
from functrans.derivatives.helpers import cast, conj, times
from functrans.derivatives.named import named
from functrans.derivatives.table import derivative
from functrans.operators.products import PRODUCTS, Product

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


def pulls(product: Product) -> tuple[Pull, Pull]:
    """How the cotangent is pulled back to each factor: it is multiplied by the other one."""
    to_x, to_y = product.to_x, product.to_y
    if product.conjugates:
        return lambda grad, y: conj(to_x(grad, conj(y))), lambda grad, x: to_y(x, grad)
    if not product.summed:  # it promotes
        return lambda g, y: to_x(g, conj(y).to(g.dtype)), lambda g, x: to_y(conj(x).to(g.dtype), g)
    return lambda grad, y: to_x(grad, conj(y)), lambda grad, x: to_y(conj(x), grad)


def product_alone(product: Product) -> None:
    """Add the entry of ``op(x, y)``."""
    (x, y), (left, right) = product.names, pulls(product)
    formulas = {x: named(("grad", y), left), y: named(("grad", x), right)}
    # conjugate-linear in a factor that is conjugated, which "one call per argument" takes as it is
    derivative(product.op, tangent="multilinear", broadcasts=not product.summed, **formulas)


def sum_with_product(product: Product) -> None:
    """Add the entry of ``op(self, x, y)``, which is ``beta * self + alpha * product(x, y)``."""
    (x, y), (left, right), multiply = product.names, pulls(product), product.multiply

    def tangent(result: Tensor, alpha: Any, beta: Any, x: Tensor, y: Tensor, self_t: Any, x_t: Any, y_t: Any) -> Any:
        moved = sum_of([None if x_t is None else multiply(x_t, y), None if y_t is None else multiply(x, y_t)])
        if moved is not None:
            moved = cast(times(moved, alpha), result.dtype)  # that of vectors promotes
        if self_t is None:
            return moved
        self_t = cast(times(self_t, beta), result.dtype)
        return self_t.expand(result.shape) if moved is None else moved + self_t

    derivative(
        product.op,
        tangent=named(("result", "alpha", "beta", x, y, "self_t", f"{x}_t", f"{y}_t"), tangent),
        broadcasts=True,  # self does
        self=lambda grad, beta: scaled(grad, beta),
        **{
            x: named(("grad", y, "alpha"), lambda grad, other, alpha: scaled(left(grad, other), alpha)),
            y: named(("grad", x, "alpha"), lambda grad, other, alpha: scaled(right(grad, other), alpha)),
        },
    )


for _product in PRODUCTS.values():
    (sum_with_product if _product.adds else product_alone)(_product)


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
        return adjoint(self.flatten(0, -2)).mv(grad.flatten())
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
    i1=lambda grad, i2, i3, expand1, expand2, expand3, sumdim: run(
        aten._trilinear.default, grad, conj(i2), conj(i3), sumdim, expand2, expand3, expand1
    ),
    i2=lambda grad, i1, i3, expand1, expand2, expand3, sumdim: run(
        aten._trilinear.default, conj(i1), grad, conj(i3), expand1, sumdim, expand3, expand2
    ),
    i3=lambda grad, i1, i2, expand1, expand2, expand3, sumdim: run(
        aten._trilinear.default, conj(i1), conj(i2), grad, expand1, expand2, sumdim, expand3
    ),
)
