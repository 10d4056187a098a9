"""Tangents of eigenvalues and eigenvectors.

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


derivative(aten._linalg_eigh.default, tangent=eigh_tangent)
derivative(aten.linalg_eig.default, tangent=eig_tangent)
