"""The nuclear norm, with the derivatives that it has where singular values are repeated.

``A = Q H`` with ``Q^H Q = I`` and ``H`` Hermitian, positive (for a tall A; a wide one is turned): the norm is ``tr H``
and its gradient is ``Q``. PyTorch differentiates ``Q`` by the singular vectors, which have no derivative at repeated
values, and one of little precision near them; ``Q`` itself is smooth as long as no singular value is 0. At 0 the norm
has a kink, and its gradient counts as constant there, as that of ``abs`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.matmul import adjoint
from functrans.derivatives.own_operators import own_matrix_operator
from functrans.derivatives.table import derivative
from functrans.operators.schemas import taken_apart

aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------- H X + X H = C


def lyapunov_pull(grad: Tensor, H: Tensor, C: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
    of_c = lyapunov(H, grad)
    turned = adjoint(result)
    return -(of_c @ turned + turned @ of_c), of_c


def lyapunov_tangent(H: Tensor, result: Tensor, H_t: Tensor | None, C_t: Tensor | None) -> Tensor:
    moved = None if H_t is None else H_t @ result + result @ H_t
    change = C_t if moved is None else -moved if C_t is None else C_t - moved
    assert change is not None
    return lyapunov(H, change)


@own_matrix_operator("lyapunov(Tensor H, Tensor C) -> Tensor", lyapunov_pull, lambda H, C: torch.empty_like(C))
def lyapunov(H: Tensor, C: Tensor) -> Tensor:
    """``X`` with ``H X + X H = C``, of a Hermitian ``H`` without negative eigenvalues; 0 where both eigenvalues are."""
    values, V = torch.linalg.eigh(H)
    sums = values.unsqueeze(-1) + values.unsqueeze(-2)
    none = sums <= 2 * values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:, None]
    inner = (adjoint(V) @ C @ V / sums.masked_fill(none, 1)).masked_fill(none, 0)
    return V @ inner @ adjoint(V)


derivative(
    lyapunov,
    tangent=lyapunov_tangent,
    H=lambda grad, H, C, result: lyapunov_pull(grad, H, C, result)[0],
    C=lambda grad, H: lyapunov(H, grad),
)


# ---------------------------------------------------------------------------------------------- the polar factor


def stretch(A: Tensor, Q: Tensor) -> Tensor:
    H = adjoint(Q) @ A
    return (H + adjoint(H)) / 2


def outside(x: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """What of ``x`` is not in the range of ``Q``, times the inverse of ``H``."""
    return torch.linalg.solve(H, x - Q @ (adjoint(Q) @ x), left=False)


def polar_pull(grad: Tensor, A: Tensor, result: Tensor) -> Tensor:
    H = stretch(A, result)
    inner = lyapunov(H, adjoint(result) @ grad)
    found = result @ (inner - adjoint(inner))
    return found if A.shape[-2] == A.shape[-1] else found + outside(grad, result, H)


def polar_tangent(A: Tensor, result: Tensor, A_t: Tensor) -> Tensor:
    H, inner = stretch(A, result), adjoint(result) @ A_t
    found = result @ lyapunov(H, inner - adjoint(inner))
    return found if A.shape[-2] == A.shape[-1] else found + outside(A_t, result, H)


@own_matrix_operator("polar(Tensor A) -> Tensor", polar_pull, torch.empty_like)
def polar(A: Tensor) -> Tensor:
    """The orthogonal factor of a matrix that has no more columns than rows."""
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh


derivative(polar, tangent=polar_tangent, A=lambda grad, A, result: polar_pull(grad, A, result))


# ---------------------------------------------------------------------------------------------- the norm


def slope(A: Tensor) -> Tensor:
    return polar(A) if A.shape[-2] >= A.shape[-1] else adjoint(polar(adjoint(A)))


def nuclear_pull(grad: Tensor, A: Tensor, result: Tensor) -> Tensor:
    return grad[..., None, None] * slope(A)


@own_matrix_operator(
    "nuclear(Tensor A) -> Tensor", nuclear_pull, lambda A: A.new_empty(A.shape[:-2], dtype=A.dtype.to_real())
)
def nuclear(A: Tensor) -> Tensor:
    """The sum of the singular values."""
    return torch.linalg.svdvals(A).sum(-1)


derivative(
    nuclear,
    tangent=lambda A, A_t: (slope(A).conj() * A_t).real.sum((-2, -1)),
    A=lambda grad, A: grad[..., None, None] * slope(A),
)


def acceptable(x: Tensor, dim: Any) -> bool:
    """Whether ``x`` has matrices along ``dim``; PyTorch says what is wrong if not, and what the norm of none is."""
    n = x.dim()
    return len(dim) == 2 <= n and x.numel() > 0 and all(-n <= d < n for d in dim) and dim[0] % n != dim[1] % n


def nuclear_along(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    out = nuclear(x.movedim(tuple(dim), (-2, -1)))
    return out.unsqueeze(-1).unsqueeze(-1).movedim((-2, -1), tuple(dim)) if keepdim else out


@DECOMPOSITIONS.register(aten.linalg_matrix_norm.str_ord)
def matrix_norm(
    self: Tensor, ord: str = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """The rest is left to PyTorch."""
    if ord != "nuc" or dtype is not None or not acceptable(self, dim):
        return taken_apart(aten.linalg_matrix_norm.str_ord, self, ord, dim, keepdim, dtype=dtype)
    return nuclear_along(self, dim, keepdim)


@DECOMPOSITIONS.register(aten.nuclear_norm.default)
def nuclear_norm(self: Tensor, keepdim: bool = False) -> Tensor:
    return aten.nuclear_norm.dim(self, [0, 1], keepdim)


@DECOMPOSITIONS.register(aten.nuclear_norm.dim)
def nuclear_norm_of_dims(self: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    return (
        nuclear_along(self, dim, keepdim)
        if acceptable(self, dim)
        else taken_apart(aten.nuclear_norm.dim, self, dim, keepdim)
    )
