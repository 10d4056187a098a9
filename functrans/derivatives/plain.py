"""Operators whose derivative in PyTorch is wrong or missing somewhere, and right if written in plain operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.losses import MEAN, SUM
from functrans.derivatives.matmul import adjoint

aten = torch.ops.aten


def polar(abs: Tensor, angle: Tensor) -> Tensor:
    """PyTorch's formula needs the direction of the result, which is lost where ``abs`` is 0."""
    if abs.dtype is not angle.dtype or abs.dtype not in (torch.float16, torch.float32, torch.float64):
        raise RuntimeError(f"polar: got {abs.dtype} and {angle.dtype}; expected one float dtype of both.")
    return torch.complex(abs * angle.cos(), abs * angle.sin())


def dist(self: Tensor, other: Tensor, p: Any = 2) -> Tensor:
    """PyTorch's second derivative is NaN where the two are equal; a norm's is 0."""
    return torch.linalg.vector_norm(self - other, p)


def renorm(self: Tensor, p: Any, dim: int, maxnorm: Any) -> Tensor:
    """The norm is taken of those slices only that are too long: at 0 it has no second derivative, and is not needed."""
    if not (self.dim() > 1 and p > 0 and maxnorm >= 0 and -self.dim() <= dim < self.dim()):
        return aten.renorm.default(self.detach(), p, dim, maxnorm)  # it says what is wrong
    dims = [d for d in range(self.dim()) if d != dim % self.dim()]
    dtype = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else None
    too_long = torch.linalg.vector_norm(self.detach(), p, dims, keepdim=True, dtype=dtype) > maxnorm
    norm = torch.linalg.vector_norm(torch.where(too_long, self, 1), p, dims, keepdim=True, dtype=dtype)
    return torch.where(too_long, self * (maxnorm / (norm + 1e-7)).to(self.dtype), self)


def poisson_nll_loss(self: Tensor, target: Tensor, log_input: bool, full: bool, eps: float, reduction: int) -> Tensor:
    """Stirling's term is taken of targets above 1 only: the logarithm of the others has no derivative at 0."""
    if full and target.dtype is torch.bool:
        torch.sub(target, target)  # which PyTorch's formula does, and refuses
    loss = self.exp() - target * self if log_input else self - target * (self + eps).log()
    if full:
        counts = target > 1
        t = torch.where(counts, target, 2)
        loss = loss + torch.where(counts, t * t.log() - t + 0.5 * (2 * math.pi * t).log(), 0)
    return loss.mean() if reduction == MEAN else loss.sum() if reduction == SUM else loss


def svd(A: Tensor, full_matrices: bool = True, *, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch takes the vectors beyond the singular values for constants, but they stay orthogonal to the others."""
    U, S, Vh = aten._linalg_svd.default(A, False, True, driver=driver)
    if full_matrices and A.shape[-2] != A.shape[-1]:
        whole = aten._linalg_svd.default(A.detach(), True, True, driver=driver)
        k = S.shape[-1]
        if A.shape[-2] > k:
            U = torch.cat([U, orthogonal(whole[0][..., k:], U)], -1)
        else:
            Vh = adjoint(torch.cat([adjoint(Vh), orthogonal(adjoint(whole[2][..., k:, :]), adjoint(Vh))], -1))
    return U, S, Vh


def orthogonal(others: Tensor, vectors: Tensor) -> Tensor:
    """``others``, a constant basis of all that is orthogonal to ``vectors``, moved along with them."""
    moved = others - vectors @ (adjoint(vectors) @ others)
    factor = torch.linalg.cholesky(adjoint(moved) @ moved, upper=True)
    return torch.linalg.solve_triangular(factor, moved, upper=True, left=False)


DECOMPOSITIONS.add(aten.linalg_svd.default, svd)
DECOMPOSITIONS.add(aten.dist.default, dist)
DECOMPOSITIONS.add(aten.polar.default, polar)
DECOMPOSITIONS.add(aten.renorm.default, renorm)
DECOMPOSITIONS.add(aten.poisson_nll_loss.default, poisson_nll_loss)
