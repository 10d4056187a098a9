"""Operators as plain ``torch`` code of simpler ones, for ``jet`` and ``laplacian`` alike: where the derivatives of what
they are made of take less than those of their own tangent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import reduced_dims
from functrans.derivatives.linalg import triangular_solve
from functrans.derivatives.matmul import adjoint as turned
from functrans.pytorch.torch_private import OpOverload
from functrans.pytorch.versions import present
from functrans.shipped.by_derivatives import code_at_level
from functrans.shipped.jet_level import JetInterpreter
from functrans.shipped.laplacian_level import LaplacianInterpreter

aten = torch.ops.aten


def in_code(*ops: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As ``code_at_level``, for both transforms."""

    def register(code: Callable[..., Any]) -> Callable[..., Any]:
        for cls in (JetInterpreter, LaplacianInterpreter):
            code_at_level(cls, *ops)(code)
        return code

    return register


def keeps_dtype(x: Tensor, rest: tuple[Any, ...]) -> bool:
    """By what follows the dimension of a softmax: whether its result has the dtype of its argument."""
    return rest in ((), (None,), (False,), (x.dtype,))


@in_code(aten.prod.default, aten.prod.dim_int)
def prod(op: OpOverload, x: Tensor, *where: Any, dtype: Any = None) -> Any:
    """Of two halves, as often as there are some: a few products of many numbers each."""
    if dtype not in (None, x.dtype) or not x.dim() or not x.numel():
        return NotImplemented
    dim, keepdim = (*where, False)[:2] if where else (0, False)
    x = x if where else x.reshape(-1)
    while (size := x.shape[dim]) > 1:
        half = size // 2
        found = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat([found, x.narrow(dim, 2 * half, 1)], dim) if size % 2 else found
    return x if keepdim else x.squeeze(dim)


@in_code(aten.dist.default)
def dist(op: OpOverload, x: Tensor, y: Tensor, p: Any = 2) -> Any:
    return torch.linalg.vector_norm(x - y, p)


@in_code(aten.linalg_vector_norm.default, aten.norm.Scalar, aten.norm.ScalarOpt_dim)
def norm(op: OpOverload, x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """For powers above 2 of real numbers. The slope of the power is 0 at 0, and of the whole 0 where that is 0."""
    if p is None or p <= 2 or p == math.inf or x.is_complex() or dtype not in (None, x.dtype) or not x.numel():
        return NotImplemented
    dims = reduced_dims(dim, x.dim())
    most = x.detach().abs().amax(dims, keepdim=True)
    most = torch.where((most == 0) | most.isinf(), 1, most)
    x = x / most
    zero = x == 0
    parts = (x * x).pow(p // 2) if p % 2 == 0 else torch.where(zero, 0, torch.where(zero, 1, x).abs().pow(p))
    total = parts.sum(dims, keepdim=True)
    empty = total == 0
    found = torch.where(empty, 0, torch.where(empty, 1, total).pow(1 / p)) * most
    return found if keepdim else found.squeeze(dims)


@in_code(aten.group_norm.default)
def group_norm(
    op: OpOverload, x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Any:
    if not x.numel():
        return NotImplemented
    rows = x.reshape(x.shape[0], groups, -1)
    out = torch.nn.functional.layer_norm(rows, rows.shape[2:], eps=eps).reshape(x.shape)
    shape = [-1, *[1] * (x.dim() - 2)]
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


@in_code(aten.rms_norm.default)
def rms_norm(op: OpOverload, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if x.dtype.itemsize < 4:  # it is computed in more than half precision
        return NotImplemented
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    out = x * ((x * x).mean([*range(-len(shape), 0)], keepdim=True) + eps).rsqrt()
    return out if weight is None else out * weight


@in_code(aten.polar.default)
def polar(op: OpOverload, length: Tensor, angle: Tensor) -> Any:
    return torch.complex(length * angle.cos(), length * angle.sin())


in_code(aten.triangular_solve.default)(lambda op, *args: triangular_solve(*args))
in_code(*present("cholesky"))(lambda op, x, upper=False: torch.linalg.cholesky(x, upper=upper))


@in_code(aten.linalg_lu_solve.default)
def lu_solve(op: OpOverload, lu: Tensor, pivots: Tensor, b: Tensor, *, left: bool = True, adjoint: bool = False) -> Any:
    """Two triangular solutions; (P·L·U)ᴴ·X = B has them in the other order, and X·A = B is Aᴴ·Xᴴ = Bᴴ."""
    if not left:
        found = lu_solve(op, lu, pivots, turned(b), adjoint=not adjoint)
        return turned(found)
    permutation = torch.lu_unpack(lu.detach(), pivots, unpack_data=False)[0]
    solve = torch.linalg.solve_triangular
    if adjoint:
        half = solve(turned(lu), b, upper=False)
        return permutation @ solve(turned(lu), half, upper=True, unitriangular=True)
    half = solve(lu, permutation.mT @ b, upper=False, unitriangular=True)
    return solve(lu, half, upper=True)


def reflectors(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """V and T of (I - τ₁v₁v₁ᴴ)(I - τ₂v₂v₂ᴴ)... = I - V·T·Vᴴ, where v₁, v₂, ... stand in ``x`` below the diagonal, and
    are 1 on it.

    (Schreiber and Van Loan, A storage-efficient WY representation, SIAM J. Sci. Stat. Comput. 10, 1989.)
    """
    count = tau.shape[-1]
    x = x[..., :count]
    v = x.tril(-1) + torch.eye(x.shape[-2], count, dtype=x.dtype, device=x.device)
    one = torch.eye(count, dtype=x.dtype, device=x.device)
    scale = tau.unsqueeze(-1)
    system = one + scale * (turned(v) @ v).triu(1)
    return v, torch.linalg.solve_triangular(system, scale * one, upper=True, unitriangular=True)


@in_code(aten.linalg_householder_product.default)
def householder_product(op: OpOverload, x: Tensor, tau: Tensor) -> Any:
    v, t = reflectors(x, tau)
    rows, columns = x.shape[-2:]
    first = torch.eye(rows, columns, dtype=x.dtype, device=x.device)
    return first - v @ (t @ turned(v)[..., :columns])


@in_code(aten.ormqr.default)
def ormqr(op: OpOverload, x: Tensor, tau: Tensor, other: Tensor, left: bool = True, transpose: bool = False) -> Any:
    v, t = reflectors(x, tau)
    t = turned(t) if transpose else t
    return other - v @ (t @ (turned(v) @ other)) if left else other - ((other @ v) @ t) @ turned(v)


@in_code(aten.linalg_qr.default)
def wide_qr(op: OpOverload, x: Tensor, mode: str = "reduced") -> Any:
    """That of the square part in front has all of Q."""
    rows, columns = x.shape[-2:]
    if rows >= columns or not x.numel() or mode == "r":
        return NotImplemented
    q, r = torch.linalg.qr(x[..., :rows], mode)
    return q, torch.cat([r, turned(q) @ x[..., rows:]], -1)


def exponentials(x: Tensor, *terms: Tensor | None) -> tuple[Tensor, ...]:
    """The matrix exponential of x + terms[0]·t + terms[1]·t² + ..., as its coefficients.

    They are the first line of blocks of the exponential of the matrix whose every line of blocks has these, one place
    further to the right each time (Najfeld and Havel, Advances in Applied Mathematics 16, 1995).
    """
    zero = torch.zeros_like(x)
    blocks = [x, *(zero if t is None else t for t in terms)]
    lines = [torch.cat([zero] * i + blocks[: len(blocks) - i], -1) for i in range(len(blocks))]
    whole = torch.linalg.matrix_exp(torch.cat(lines, -2))
    return whole[..., : x.shape[-1], :].split(x.shape[-1], -1)
