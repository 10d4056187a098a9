"""Derivatives of ``linalg.pinv`` and ``linalg.lstsq``, also where their tolerance drops singular values.

With ``X`` for the result: G. Golub and V. Pereyra, The differentiation of pseudo-inverses and nonlinear least squares
problems whose variables separate, 1973, whose matrix has the rank of its pseudo-inverse. PyTorch takes that for granted
(torch 2.13); where singular values are dropped that are no rounding errors, a tangent also turns what is kept into what
is dropped, by the gaps between their squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import add, cast, sum_to_shape
from functrans.derivatives.matmul import adjoint
from functrans.derivatives.table import derivative

aten = torch.ops.aten


class Split:
    """A matrix in two parts: what its pseudo-inverse ``X`` inverts, and the ``rest`` (None: rounding errors)."""

    def __init__(self, A: Tensor, X: Tensor, explicit: bool) -> None:
        self.A, self.X = A, X
        self.rest: Tensor | None = A - A @ X @ A if explicit else None
        if self.rest is None:
            return
        noise = 10 * max(A.shape[-2:]) * torch.finfo(A.dtype).eps
        norms = [torch.linalg.matrix_norm(m.detach(), keepdim=True) for m in (self.rest, A)]
        self.cut = norms[0] > noise * norms[1]
        # no singular vectors of a matrix that is not cut: they have no derivative where singular values are equal
        distinct = torch.arange(1, min(A.shape[-2:]) + 1, device=A.device).to(A.dtype)
        plain = torch.zeros(A.shape[-2:], dtype=A.dtype, device=A.device).diagonal_scatter(distinct)
        self.U, s, Vh = torch.linalg.svd(torch.where(self.cut, A, plain), full_matrices=False)
        self.V = adjoint(Vh)
        kept = (Vh @ X @ self.U).diagonal(0, -2, -1).real * s > 0.5
        turns = kept.unsqueeze(-1) & ~kept.unsqueeze(-2)
        squares = torch.where(kept, s, 0) ** 2, torch.where(kept, 0, s) ** 2
        gaps = squares[0].unsqueeze(-1) - squares[1].unsqueeze(-2)
        #: by kept (rows) and dropped singular value
        self.shares = torch.where(turns, 1 / torch.where(turns, gaps, 1), 0)
        self.alone = torch.where(kept, 1 / torch.where(kept, s, 1) ** 2, 0).unsqueeze(-1)

    def kept_to_dropped(self, Y: Tensor) -> Tensor:
        """The part of ``Y`` whose rows are kept and whose columns are dropped, divided by the gaps."""
        Y = Y - Y @ self.X @ self.A
        plain = adjoint(self.X) @ (self.X @ Y)
        if self.rest is None:
            return plain
        inside = adjoint(self.U) @ Y
        between = inside @ self.V
        cut = self.U @ ((between * self.shares) @ adjoint(self.V) + self.alone * (inside - between @ adjoint(self.V)))
        return torch.where(self.cut, cut, plain)

    def mirrored(self) -> Split:
        """That of the adjoint."""
        other = Split.__new__(Split)
        other.__dict__.update(self.__dict__)
        other.A, other.X = adjoint(self.A), adjoint(self.X)
        if self.rest is not None:
            other.rest, other.U, other.V = adjoint(self.rest), self.V, self.U
        return other


def pinv_tangent(self: Tensor, atol: Any, rtol: Any, result: Tensor, self_t: Tensor) -> Tensor:
    split = Split(self, result, atol is not None or rtol is not None)
    moved = -(result @ self_t @ result)
    for part, t in ((split, self_t), (split.mirrored(), adjoint(self_t))):
        turned = t if part.rest is None else t + adjoint(part.X) @ adjoint(t) @ part.rest
        found = part.kept_to_dropped(turned)
        moved = moved + (adjoint(found) if part is split else found)
    return moved


def pinv_self(grad: Tensor, self: Tensor, atol: Any, rtol: Any, result: Tensor) -> Tensor:
    split = Split(self, result, atol is not None or rtol is not None)
    X = adjoint(result)
    pulled = -(X @ grad @ X)
    for part, g in ((split, adjoint(grad)), (split.mirrored(), grad)):
        found = part.kept_to_dropped(g)
        if part.rest is not None:
            found = found + part.rest @ adjoint(found) @ adjoint(part.X)
        pulled = pulled + (found if part is split else adjoint(found))
    return pulled


# leading dimensions broadcast with those of the tolerances
derivative(aten.linalg_pinv.atol_rtol_tensor, tangent=pinv_tangent, broadcasts=True, self=pinv_self)


# ---------------------------------------------------------------------------------------------- least squares

# The solution is pinv(A) B, with what ``rcond`` drops. The driver gelsy drops columns of a pivoted QR decomposition
# instead, and does not say which; it may be others in the next run, since PyTorch does not set LAPACK's ``jpvt`` (torch
# 2.13). Where that is no rounding error the derivative is NaN. PyTorch's takes nothing for dropped, by any driver.


class LeastSquares:
    """One call of ``linalg.lstsq``, with a right-hand side that is a matrix."""

    def __init__(self, A: Tensor, b: Tensor, rcond: float | None, driver: str | None, results: Any) -> None:
        self.A, self.vectors = A, b.dim() < A.dim()
        self.B, self.X = self.matrix(b), self.matrix(results[0])
        drops, by_svd = rcond is not None and driver != "gels", driver in ("gelss", "gelsd")
        self.rtol = torch.tensor(rcond, dtype=torch.float64, device=A.device) if drops and by_svd else None
        self.P = torch.linalg.pinv(A, rtol=self.rtol)
        #: a factor of all that is said of the solution: 1, or NaN, which the derivatives of a constant NaN are not
        self.known: Tensor | None = None
        if drops and not by_svd:
            unknown = torch.linalg.matrix_rank(A.detach()) > results[2]
            self.known = torch.where(unknown, torch.nan, 1.0).to(A.dtype)[..., None, None]
        #: there are some of tall matrices of full rank
        self.has_residuals = results[1].numel() > 0

    def matrix(self, t: Tensor) -> Tensor:
        return t.unsqueeze(-1) if self.vectors else t

    def vector(self, t: Tensor) -> Tensor:
        return t.squeeze(-1) if self.vectors else t

    def misfit(self) -> Tensor:
        return self.A @ self.X - self.B

    def if_known(self, t: Tensor) -> Tensor:
        return t if self.known is None else t * self.known


def lstsq_tangent(
    self: Tensor, b: Tensor, rcond: float | None, driver: str | None, results: Any,
    self_t: Tensor | None, b_t: Tensor | None,
) -> tuple[Tensor, Tensor | None, None, None]:
    call = LeastSquares(self, b, rcond, driver, results)
    moved, of_misfit = None if b_t is None else call.P @ call.matrix(b_t), None if b_t is None else -call.matrix(b_t)
    if self_t is not None:
        moved = add(moved, pinv_tangent(self, None, call.rtol, call.P, self_t) @ call.B)
        of_misfit = add(of_misfit, self_t @ call.X)
    assert moved is not None
    assert of_misfit is not None
    residuals = cast(2 * (call.misfit().conj() * of_misfit).sum(-2), results[1].dtype) if call.has_residuals else None
    return call.vector(call.if_known(moved)), residuals, None, None


def lstsq_both(
    grads: Any, self: Tensor, b: Tensor, rcond: float | None, driver: str | None, results: Any
) -> dict[str, Any]:
    call = LeastSquares(self, b, rcond, driver, results)
    of_a, of_b = None, None
    if grads[0] is not None:
        grad = call.if_known(call.matrix(grads[0]))
        of_a = pinv_self(grad @ adjoint(call.B), self, None, call.rtol, call.P)
        of_b = adjoint(call.P) @ grad
    if grads[1] is not None and call.has_residuals:
        turned = 2 * call.misfit() * grads[1].unsqueeze(-2)
        of_a, of_b = add(of_a, turned @ adjoint(call.X)), add(of_b, -turned)
    return {
        "self": None if of_a is None else sum_to_shape(of_a, self.shape),
        "b": None if of_b is None else sum_to_shape(call.vector(of_b), b.shape),
    }


derivative(
    aten.linalg_lstsq.default,
    tangent=lstsq_tangent,
    joint=lstsq_both,
    self=lambda grads, self, b, rcond, driver, results: lstsq_both(grads, self, b, rcond, driver, results)["self"],
    b=lambda grads, self, b, rcond, driver, results: lstsq_both(grads, self, b, rcond, driver, results)["b"],
)
