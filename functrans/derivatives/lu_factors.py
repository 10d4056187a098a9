"""Derivatives of the LU factors that ``aten._linalg_det``, ``_linalg_slogdet`` and ``_linalg_solve_ex`` return.

Of ``M = P L U`` with ``F = L^-1 P^T dM U^-1``: ``dL = L tril(F, -1)`` and ``dU = triu(F) U``, packed into one matrix.
See F. de Hoog, R. Anderssen and M. Lukas, Differentiation of matrix functionals using triangular factorization, 2011.
PyTorch counts the factors as constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.derivatives.matmul import adjoint
from functrans.operators.factors import SEEN, FactorsDropped

aten = torch.ops.aten


def solved(A: Tensor, B: Tensor, left: bool = True) -> Tensor:
    """``torch.linalg.solve``, by the operator itself."""
    with FactorsDropped():
        return aten._linalg_solve_ex(A, B, left=left)[0]


def factors(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    LU, pivots, _ = aten.linalg_lu_factor_ex.default(M)
    return torch.lu_unpack(LU, pivots)


def solved_both(L: Tensor, x: Tensor, U: Tensor) -> Tensor:
    """``L^-1 x U^-1``."""
    half = torch.linalg.solve_triangular(L, x, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(U, half, upper=True, left=False)


def factors_tangent(M: Tensor, M_t: Tensor | None) -> Tensor | None:
    """The tangent of the packed factors of ``M``; None if nobody sees them."""
    if M_t is None or not SEEN.factors:
        return None
    P, L, U = factors(M)
    F = solved_both(L, P.mT @ M_t, U)
    return L @ F.tril(-1) + F.triu() @ U


def factors_pull(grad: Tensor | None, M: Tensor) -> Tensor | None:
    """The cotangent of ``M`` from that of its packed factors."""
    if grad is None:
        return None
    P, L, U = factors(M)
    F = (adjoint(L) @ grad.tril(-1)).tril(-1) + (grad.triu() @ adjoint(U)).triu()
    half = torch.linalg.solve_triangular(adjoint(L), F, upper=True, unitriangular=True)
    return P @ torch.linalg.solve_triangular(adjoint(U), half, upper=False, left=False)


# ---------------------------------------------------------------------------------------------- of determinants


def turned(A: Tensor) -> bool:
    """Whether the determinants factor the transposed matrix, the one that LAPACK finds in memory."""
    return A.is_contiguous() and not A.is_complex()


def determinant_factors_tangent(A: Tensor, A_t: Tensor) -> Tensor | None:
    if not SEEN.factors or not turned(A):
        return factors_tangent(A, A_t)
    return factors_tangent(A.mT, A_t.mT)


def determinant_factors_pull(grad: Tensor | None, A: Tensor) -> Tensor | None:
    if grad is None or not turned(A):
        return factors_pull(grad, A)
    of_m = factors_pull(grad, A.mT)
    return None if of_m is None else of_m.mT
