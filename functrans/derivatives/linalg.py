"""Derivatives of inverses, solvers, Cholesky factors and logarithms of determinants.

With ``X`` for the result and ``^H`` for the conjugate transpose: M. Giles, Collected matrix derivative results for
forward and reverse mode algorithmic differentiation; for complex matrices, PyTorch's ``FunctionsManual.cpp``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.helpers import add, conj, sum_to_shape
from functrans.derivatives.lu_factors import (
    determinant_factors_pull,
    determinant_factors_tangent,
    factors_pull,
    factors_tangent,
    solved,
)
from functrans.derivatives.matmul import adjoint
from functrans.derivatives.table import derivative
from functrans.functionalization.without_data import refuse_as
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------- inverse


def inverse_self(grads: Any, results: Any) -> Tensor | None:
    if grads[0] is None:
        return None
    turned = adjoint(results[0])
    return -(turned @ grads[0] @ turned)


derivative(
    aten.linalg_inv_ex.default,
    tangent=lambda results, A_t: (-(results[0] @ A_t @ results[0]), None),
    A=inverse_self,
)


# ---------------------------------------------------------------------------------------------- A X = B, or X A = B


def is_vectors(a: Tensor, b: Tensor) -> bool:
    """PyTorch's rule: ``b`` is (a batch of) vectors."""
    return b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])


def solve_right(grads: Any, A: Tensor, B: Tensor, left: bool) -> Tensor | None:
    if grads[0] is None:
        return None
    return sum_to_shape(solved(adjoint(A), grads[0], left), B.shape)


def solve_matrix(of_b: Tensor, x: Tensor, left: bool, vectors: bool) -> Tensor:
    """The cotangent of the matrix from that of the right-hand side."""
    if vectors:
        return -of_b.unsqueeze(-1) * conj(x).unsqueeze(-2)
    return -(of_b @ adjoint(x)) if left else -(adjoint(x) @ of_b)


def solve_both(grads: Any, A: Tensor, B: Tensor, left: bool, results: Any) -> dict[str, Tensor | None]:
    # Multiple outputs: what leading dimensions broadcast is summed here.
    of_factors = factors_pull(grads[1], A)
    if grads[0] is None:
        return {"A": of_factors, "B": None}
    of_b = solved(adjoint(A), grads[0], left)
    of_a = solve_matrix(of_b, results[0], left, is_vectors(A, B))
    return {"A": add(sum_to_shape(of_a, A.shape), of_factors), "B": sum_to_shape(of_b, B.shape)}


def solve_tangent(
    A: Tensor, B: Tensor, left: bool, results: Any, A_t: Tensor | None, B_t: Tensor | None
) -> tuple[Tensor, Tensor | None, None, None]:
    x, of_factors = results[0], factors_tangent(A, A_t)
    vectors = is_vectors(A, B)
    moved = None if B_t is None else B_t
    if A_t is not None:
        changed = (A_t @ x.unsqueeze(-1)).squeeze(-1) if vectors else A_t @ x if left else x @ A_t
        moved = -changed if moved is None else moved - changed
    assert moved is not None
    if vectors:  # A and the tangent may have come to another shape than makes vectors of it
        return solved(A, moved.unsqueeze(-1), left).squeeze(-1), of_factors, None, None
    return solved(A, moved, left), of_factors, None, None


derivative(
    aten._linalg_solve_ex.default,
    tangent=solve_tangent,
    joint=solve_both,
    A=lambda grads, A, B, left, results: solve_both(grads, A, B, left, results)["A"],
    B=solve_right,
)


# ---------------------------------------------------------------------------------------------- triangular solvers


def triangle(x: Tensor, upper: bool, unitriangular: bool) -> Tensor:
    """The part of a matrix that the solver looks at."""
    return x.triu(int(unitriangular)) if upper else x.tril(-int(unitriangular))


def triangular_right(grad: Tensor, self: Tensor, upper: bool, left: bool, unitriangular: bool) -> Tensor:
    options = {"upper": not upper, "left": left, "unitriangular": unitriangular}
    return aten.linalg_solve_triangular.default(adjoint(self), grad, **options)


def triangular_both(
    grad: Tensor, self: Tensor, upper: bool, left: bool, unitriangular: bool, result: Tensor
) -> dict[str, Tensor]:
    of_b = triangular_right(grad, self, upper, left, unitriangular)
    return {"self": triangle(solve_matrix(of_b, result, left, False), upper, unitriangular), "B": of_b}


def triangular_tangent(
    self: Tensor,
    upper: bool,
    left: bool,
    unitriangular: bool,
    result: Tensor,
    self_t: Tensor | None,
    B_t: Tensor | None,
) -> Tensor:
    moved = B_t
    if self_t is not None:
        self_t = triangle(self_t, upper, unitriangular)
        changed = self_t @ result if left else result @ self_t
        moved = -changed if moved is None else moved - changed
    assert moved is not None
    return aten.linalg_solve_triangular.default(self, moved, upper=upper, left=left, unitriangular=unitriangular)


derivative(
    aten.linalg_solve_triangular.default,
    tangent=triangular_tangent,
    broadcasts=True,  # leading dimensions do
    joint=triangular_both,
    self=lambda grad, self, upper, left, unitriangular, result: triangular_both(
        grad, self, upper, left, unitriangular, result
    )["self"],
    B=triangular_right,
)


def triangular_solve(
    self: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Tensor, Tensor]:
    """PyTorch's tangent reads the other triangle too (torch 2.13)."""
    refuse_as(aten.triangular_solve.default, self, A, upper, transpose, unitriangular)
    batch = broadcast_shapes(self.shape[:-2], A.shape[:-2])
    b, a = self.expand(*batch, *self.shape[-2:]), A.expand(*batch, *A.shape[-2:])
    turned, upper = (a.mT, not upper) if transpose else (a, upper)
    return torch.linalg.solve_triangular(turned, b, upper=upper, unitriangular=unitriangular), a.clone()


DECOMPOSITIONS.add(aten.triangular_solve.default, triangular_solve)


# ---------------------------------------------------------------------------------------------- Cholesky


def half_lower(x: Tensor) -> Tensor:
    """The lower triangle with half the diagonal."""
    return x.tril() - torch.diag_embed(x.diagonal(0, -2, -1) / 2)


def cholesky_self(grads: Any, upper: bool, results: Any) -> Tensor | None:
    """Of a matrix that is taken to be Hermitian, as its cotangent is."""
    if grads[0] is None:
        return None
    factor, grad = (adjoint(results[0]), adjoint(grads[0])) if upper else (results[0], grads[0])
    middle = half_lower(adjoint(factor) @ grad)
    middle = (middle + adjoint(middle)) / 2
    middle = aten.linalg_solve_triangular.default(adjoint(factor), middle, upper=True, left=True)
    return aten.linalg_solve_triangular.default(factor, middle, upper=False, left=False)


def cholesky_tangent(self_t: Tensor, upper: bool, results: Any) -> tuple[Tensor, None]:
    """Along the Hermitian part of ``self_t``, so that it is the transpose of ``cholesky_self``; PyTorch's is not."""
    self_t = (self_t + adjoint(self_t)) / 2
    factor = adjoint(results[0]) if upper else results[0]
    middle = aten.linalg_solve_triangular.default(factor, self_t, upper=False, left=True)
    middle = aten.linalg_solve_triangular.default(adjoint(factor), middle, upper=True, left=False)
    moved = factor @ half_lower(middle)
    return adjoint(moved) if upper else moved, None


derivative(aten.linalg_cholesky_ex.default, tangent=cholesky_tangent, self=cholesky_self)


# What takes the factor L of A = L L^H, or the adjoint of it, and looks at its triangle only.


def common(of_a: Tensor, factor: Tensor, upper: bool) -> Tensor:
    """The cotangent of the factor from that of the matrix, taken both ways round."""
    of_a = of_a + adjoint(of_a)
    factor = triangle(factor, upper, False)
    return -triangle(factor @ of_a if upper else of_a @ factor, upper, False)


def of_matrix(factor: Tensor, factor_t: Tensor, upper: bool) -> Tensor:
    """The tangent of the matrix."""
    factor, factor_t = triangle(factor, upper, False), triangle(factor_t, upper, False)
    half = adjoint(factor) @ factor_t if upper else factor_t @ adjoint(factor)
    return half + adjoint(half)


def cholesky_solve_right(grad: Tensor, input2: Tensor, upper: bool) -> Tensor:
    # cut for PyTorch's own autograd, which may record at the base
    return torch.cholesky_solve(grad, triangle(input2, upper, False), upper)


def cholesky_solve_both(grad: Tensor, input2: Tensor, upper: bool, result: Tensor) -> dict[str, Tensor]:
    of_b = cholesky_solve_right(grad, input2, upper)
    return {"self": of_b, "input2": common(of_b @ adjoint(result), input2, upper)}


def cholesky_solve_tangent(
    input2: Tensor, upper: bool, result: Tensor, self_t: Tensor | None, input2_t: Tensor | None
) -> Tensor:
    moved = self_t
    if input2_t is not None:
        changed = of_matrix(input2, input2_t, upper) @ result
        moved = -changed if moved is None else moved - changed
    assert moved is not None
    return cholesky_solve_right(moved, input2, upper)


derivative(
    aten.cholesky_solve.default,
    tangent=cholesky_solve_tangent,
    broadcasts=True,  # leading dimensions do
    joint=cholesky_solve_both,
    self=cholesky_solve_right,
    input2=lambda grad, input2, upper, result: cholesky_solve_both(grad, input2, upper, result)["input2"],
)
derivative(
    aten.cholesky_inverse.default,
    tangent=lambda self, upper, result, self_t: -(result @ of_matrix(self, self_t, upper) @ result),
    self=lambda grad, self, upper, result: common(result @ grad @ result, self, upper),
)


# ---------------------------------------------------------------------------------------------- determinants

# d log(det A) = tr(A^-1 dA), whose real part is that of the logarithm and whose imaginary part is that of the angle.


def nan_if_singular(x: Tensor, status: Tensor) -> Tensor:
    """What was solved for, and NaN in every order of derivative where there is none.

    The logarithm is -inf of a singular matrix, which must not spoil the batch that it is in.
    """
    return x * torch.where(status != 0, math.nan, 1)[..., None, None].to(x.dtype)


def slogdet_self(grads: Any, A: Tensor, results: Any) -> Tensor | None:
    of_sign, scale = grads[0], grads[1]
    if A.dtype.is_complex and of_sign is not None:
        turned = torch.complex(torch.zeros_like(results[1]), -(of_sign.conj() * results[0]).imag)
        scale = turned if scale is None else scale + turned
    if scale is None:
        return determinant_factors_pull(grads[2], A)
    inverse, status = torch.linalg.inv_ex(A)
    found = scale[..., None, None] * adjoint(nan_if_singular(inverse, status))
    return add(found, determinant_factors_pull(grads[2], A))


def slogdet_tangent(A: Tensor, A_t: Tensor, results: Any) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
    solution, status = torch.linalg.solve_ex(A, A_t)
    moved = nan_if_singular(solution, status).diagonal(0, -2, -1).sum(-1)
    if not A.dtype.is_complex:
        return None, moved, determinant_factors_tangent(A, A_t), None
    turned = torch.complex(torch.zeros_like(results[1]), moved.imag)
    return results[0] * turned, moved.real, determinant_factors_tangent(A, A_t), None


derivative(aten._linalg_slogdet.default, tangent=slogdet_tangent, A=slogdet_self)
