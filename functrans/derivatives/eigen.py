"""Tangents of eigenvalues and eigenvectors, and of singular ones.

For reverse mode PyTorch's formulas are right. Its tangents divide by a difference that is 0 on the diagonal and
overwrite the quotient afterwards, which leaves a NaN for reverse mode to find (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import identity_for
from functrans.derivatives.helpers import cast
from functrans.derivatives.matmul import adjoint
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def turned(P: Tensor, values: Tensor) -> Tensor:
    """``P[i, j] / (values[j] - values[i])``, and 0 on the diagonal."""
    diagonal = identity_for(values, values.shape[-1], dtype=torch.bool)
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    return (P / gaps.masked_fill(diagonal, 1)).masked_fill(diagonal, 0)


def eigh_tangent(A: Tensor, UPLO: str, A_t: Tensor, compute_v: bool, results: Any) -> tuple[Tensor, Tensor | None]:
    """Along the Hermitian part of the tangent, which is the transpose of PyTorch's reverse formula."""
    values, V = results if compute_v else torch.linalg.eigh(A, UPLO)
    P = adjoint(V) @ A_t @ V
    P = (P + adjoint(P)) / 2
    values_t = cast(P.diagonal(0, -2, -1), values.dtype)
    return values_t, V @ turned(P, values) if compute_v else None


def eig_tangent(self_t: Tensor, results: Any) -> tuple[Tensor, Tensor]:
    """The columns of ``V`` keep their norm of 1, and turn no phase."""
    values, V = results
    P = torch.linalg.solve(V, self_t.to(V.dtype) @ V)
    moved = V @ turned(P, values)
    return P.diagonal(0, -2, -1), moved - V * (V.conj() * moved).sum(-2, keepdim=True).real


def svd_tangent(
    A: Tensor, full_matrices: bool, compute_uv: bool, A_t: Tensor, results: Any
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Of distinct singular values (Townsend, Differentiating the singular value decomposition, 2016).

    Of complex vectors the diagonals of Uᴴ·U' and Vᴴ·V' share what the equation leaves open, as in PyTorch.
    """
    if full_matrices and compute_uv and A.shape[-1] != A.shape[-2]:
        raise RuntimeError(
            "the derivative of linalg.svd of a matrix that is not square needs full_matrices=False: the further "
            "singular vectors are not determined"
        )
    U, S, Vh = results if compute_uv else aten._linalg_svd(A, False, True)
    P = adjoint(U) @ A_t @ adjoint(Vh)
    diagonal = P.diagonal(0, -2, -1)
    S_t = cast(diagonal, S.dtype)
    if not compute_uv:
        return None, S_t, None
    Q = P - torch.diag_embed(diagonal)
    right, left = Q * S.unsqueeze(-2), S.unsqueeze(-1) * Q
    squares = S * S
    K, L = turned(right + adjoint(right), squares), turned(left + adjoint(left), squares)
    if P.is_complex():
        phases = torch.diag_embed(torch.complex(torch.zeros_like(S), diagonal.imag / (2 * S)))
        K, L = K + phases, L - phases
    U_t, V_t = U @ K, adjoint(Vh) @ L
    rows, columns = A.shape[-2:]
    if rows > columns:
        moved = A_t @ adjoint(Vh)
        U_t = U_t + (moved - U @ P) / S.unsqueeze(-2)
    if columns > rows:
        moved = adjoint(A_t) @ U
        V_t = V_t + (moved - adjoint(Vh) @ adjoint(P)) / S.unsqueeze(-2)
    return U_t, S_t, adjoint(V_t)


derivative(aten._linalg_eigh.default, tangent=eigh_tangent)
derivative(aten._linalg_svd.default, tangent=svd_tangent)
derivative(aten.linalg_eig.default, tangent=eig_tangent)
