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
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def adjoint(x: Tensor) -> Tensor:
    """The conjugate transpose of the last two dimensions."""
    return conj(x.transpose(-2, -1))


def scaled(x: Tensor, factor: Any) -> Tensor:
    """``x`` times the conjugate of a Python number."""
    return times(x, conj(factor))


def sum_of(terms: list[Tensor | None]) -> Tensor | None:
    """The sum of the terms that are there."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


# ---------------------------------------------------------------------------------------------- plain products

derivative(
    aten.mm.default,
    tangent="multilinear",
    self=lambda grad, mat2: grad.mm(adjoint(mat2)),
    mat2=lambda grad, self: adjoint(self).mm(grad),
)
derivative(
    aten.bmm.default,
    tangent="multilinear",
    self=lambda grad, mat2: grad.bmm(adjoint(mat2)),
    mat2=lambda grad, self: adjoint(self).bmm(grad),
)
derivative(
    aten.mv.default,
    tangent="multilinear",
    self=lambda grad, vec: grad.unsqueeze(-1) * conj(vec),
    vec=lambda grad, self: adjoint(self).mv(grad),
)
derivative(
    aten.dot.default,
    tangent="multilinear",
    self=lambda grad, tensor: grad * conj(tensor),
    tensor=lambda grad, self: grad * conj(self),
)
derivative(
    aten.vdot.default,  # conjugate-linear in self, which "one call per argument" takes as it is
    tangent="multilinear",
    self=lambda grad, other: conj(grad) * other,
    other=lambda grad, self: grad * self,
)
for _outer in (aten.outer.default, aten.ger.default):
    derivative(
        _outer,
        tangent="multilinear",
        broadcasts=True,  # outer promotes
        self=lambda grad, vec2: grad.mv(conj(vec2).to(grad.dtype)),
        vec2=lambda grad, self: grad.t().mv(conj(self).to(grad.dtype)),
    )


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


# ---------------------------------------------------------------------------------------------- sums with a product


def sum_with_product_tangent(product: Callable[[Tensor, Tensor], Tensor], a: str, b: str) -> Callable[..., Any]:
    """The tangent of ``beta * self + alpha * product(a, b)``."""

    def tangent(v: dict[str, Any]) -> Tensor | None:
        self_t, a_t, b_t, alpha, beta = v["self_t"], v[f"{a}_t"], v[f"{b}_t"], v["alpha"], v["beta"]
        moved = sum_of([None if a_t is None else product(a_t, v[b]), None if b_t is None else product(v[a], b_t)])
        if moved is not None and alpha != 1:
            moved = moved * alpha
        if self_t is None:
            return moved
        if beta != 1:
            self_t = self_t * beta
        return self_t.expand(v["result"].shape) if moved is None else moved + self_t

    return with_names(("self_t", f"{a}_t", f"{b}_t", a, b, "alpha", "beta", "result"), tangent)


# broadcasts: self does
derivative(
    aten.addmm.default,
    tangent=sum_with_product_tangent(torch.mm, "mat1", "mat2"),
    broadcasts=True,
    self=lambda grad, beta: scaled(grad, beta),
    mat1=lambda grad, mat2, alpha: scaled(grad.mm(adjoint(mat2)), alpha),
    mat2=lambda grad, mat1, alpha: scaled(adjoint(mat1).mm(grad), alpha),
)
derivative(
    aten.baddbmm.default,
    tangent=sum_with_product_tangent(torch.bmm, "batch1", "batch2"),
    broadcasts=True,
    self=lambda grad, beta: scaled(grad, beta),
    batch1=lambda grad, batch2, alpha: scaled(grad.bmm(adjoint(batch2)), alpha),
    batch2=lambda grad, batch1, alpha: scaled(adjoint(batch1).bmm(grad), alpha),
)
derivative(
    aten.addbmm.default,
    tangent=sum_with_product_tangent(lambda a, b: a.bmm(b).sum(0), "batch1", "batch2"),
    broadcasts=True,
    self=lambda grad, beta: scaled(grad, beta),
    batch1=lambda grad, batch2, alpha: scaled(grad.expand(batch2.shape[0], *grad.shape).bmm(adjoint(batch2)), alpha),
    batch2=lambda grad, batch1, alpha: scaled(adjoint(batch1).bmm(grad.expand(batch1.shape[0], *grad.shape)), alpha),
)
derivative(
    aten.addmv.default,
    tangent=sum_with_product_tangent(torch.mv, "mat", "vec"),
    broadcasts=True,
    self=lambda grad, beta: scaled(grad, beta),
    mat=lambda grad, vec, alpha: scaled(grad.unsqueeze(-1) * conj(vec), alpha),
    vec=lambda grad, mat, alpha: scaled(adjoint(mat).mv(grad), alpha),
)
derivative(
    aten.addr.default,
    tangent=sum_with_product_tangent(lambda a, b: a.unsqueeze(-1) * b, "vec1", "vec2"),
    broadcasts=True,
    self=lambda grad, beta: scaled(grad, beta),
    vec1=lambda grad, vec2, alpha: scaled(grad.mv(conj(vec2).to(grad.dtype)), alpha),
    vec2=lambda grad, vec1, alpha: scaled(grad.t().mv(conj(vec1).to(grad.dtype)), alpha),
)


# ---------------------------------------------------------------------------------------------- bilinear layers

# _trilinear multiplies its three arguments, each unsqueezed at its own expanded dimensions, and sums over sumdim. Pulling
# back to one of them is the same product with the cotangent in its place; the dimensions change roles.
derivative(
    aten._trilinear.default,
    tangent="multilinear",
    i1=lambda grad, i2, i3, expand1, expand2, expand3, sumdim: aten._trilinear(
        grad, conj(i2), conj(i3), sumdim, expand2, expand3, expand1
    ),
    i2=lambda grad, i1, i3, expand1, expand2, expand3, sumdim: aten._trilinear(
        conj(i1), grad, conj(i3), expand1, sumdim, expand3, expand2
    ),
    i3=lambda grad, i1, i2, expand1, expand2, expand3, sumdim: aten._trilinear(
        conj(i1), conj(i2), grad, expand1, expand2, sumdim, expand3
    ),
)
