"""Derivatives of the distances between all vectors of two sets (``cdist``), or of one (``pdist``).

``|d|`` has the gradient ``slope(d)``. The pullback is PyTorch's kernel, which never builds the differences ``d`` of all
pairs; forward mode and the pullback's own derivative, which PyTorch does not have, do.

At ``d = 0`` the slope is 0, the subgradient that the kernels take.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.helpers import recorded_at_base
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def length(d: Tensor, p: float) -> Tensor:
    return torch.linalg.vector_norm(d, p, -1, keepdim=True)


def over(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, and 0 where ``y`` is, at every order of derivative."""
    empty = y == 0
    return torch.where(empty, 0, x / torch.where(empty, 1, y))


def power(d: Tensor, p: float) -> Tensor:
    """``|d| ** p``, and 0 where ``d`` is, for every ``p``."""
    empty = d == 0
    return torch.where(empty, 0, torch.where(empty, 1, d.abs()) ** p)


def slope(d: Tensor, p: float) -> Tensor:
    if p == 0:
        return torch.zeros_like(d)
    if p == 1:
        return d.sign()
    if p == 2:
        return over(d, length(d, p))
    if p == math.inf:
        return d.sign() * (d.abs() == length(d, p))
    return d.sign() * power(over(d, length(d, p)), p - 1)


# ---------------------------------------------------------------------------------------------- two sets


def differences(x1: Tensor, x2: Tensor) -> Tensor:
    return x1.unsqueeze(-2) - x2.unsqueeze(-3)


def change(x1_t: Tensor | None, x2_t: Tensor | None, like: Tensor) -> Tensor:
    """The tangent of the differences, of which at least one part is given."""
    if x1_t is None:
        assert x2_t is not None
        return (-x2_t).unsqueeze(-3).expand(like.shape)
    moved = x1_t.unsqueeze(-2)
    return (moved if x2_t is None else moved - x2_t.unsqueeze(-3)).expand(like.shape)


def cdist_tangent(x1: Tensor, x2: Tensor, p: float, x1_t: Tensor | None, x2_t: Tensor | None) -> Tensor:
    d = differences(x1, x2)
    return (slope(d, p) * change(x1_t, x2_t, d)).sum(-1)


def cdist_x1(grad: Tensor, x1: Tensor, x2: Tensor, p: float, result: Tensor) -> Tensor:
    if recorded_at_base(grad, x1, x2):
        return cdist_pulled(grad, x1, x2, p, result)
    return run(aten._cdist_backward.default, grad.contiguous(), x1, x2, p, result)


def cdist_x2(grad: Tensor, x1: Tensor, x2: Tensor, p: float, result: Tensor) -> Tensor:
    return cdist_x1(grad.mT, x2, x1, p, result.mT.contiguous())


derivative(
    aten._cdist_forward.default,
    tangent=cdist_tangent,
    broadcasts=True,  # leading dimensions do
    x1=cdist_x1,
    x2=cdist_x2,
)


def cdist_pulled(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    """``_cdist_backward`` in pieces that have derivatives."""
    return (grad.unsqueeze(-1) * slope(differences(x1, x2), p)).sum(-2)


DECOMPOSITIONS.add(aten._cdist_backward.default, cdist_pulled)


# What cdist runs for p = 2 and larger sets: the squares by a matrix product, and so the pullback.


def euclidean_x1(grad: Tensor, x1: Tensor, x2: Tensor, result: Tensor) -> Tensor:
    ratio = over(grad, result)
    return x1 * ratio.sum(-1, keepdim=True) - ratio @ x2


def euclidean_x2(grad: Tensor, x1: Tensor, x2: Tensor, result: Tensor) -> Tensor:
    return euclidean_x1(grad.mT, x2, x1, result.mT)


def euclidean_both(grad: Tensor, x1: Tensor, x2: Tensor, result: Tensor) -> dict[str, Tensor]:
    ratio = over(grad, result)
    of_x2 = x2 * ratio.sum(-2).unsqueeze(-1) - ratio.mT @ x1
    return {"x1": x1 * ratio.sum(-1, keepdim=True) - ratio @ x2, "x2": of_x2}


def euclidean_tangent(
    x1: Tensor, x2: Tensor, result: Tensor, x1_t: Tensor | None, x2_t: Tensor | None
) -> Tensor | None:
    moved = None
    if x1_t is not None:
        moved = (x1 * x1_t).sum(-1, keepdim=True) - x1_t @ x2.mT
    if x2_t is not None:
        of_x2 = (x2 * x2_t).sum(-1).unsqueeze(-2) - x1 @ x2_t.mT
        moved = of_x2 if moved is None else moved + of_x2
    return None if moved is None else over(moved, result)


derivative(
    aten._euclidean_dist.default,
    tangent=euclidean_tangent,
    joint=euclidean_both,
    broadcasts=True,  # leading dimensions do
    x1=euclidean_x1,
    x2=euclidean_x2,
)


# ---------------------------------------------------------------------------------------------- one set


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device).unbind(0)
    return rows, columns


def pdist_pulled(grad: Tensor, self: Tensor, p: float, pdist: Tensor) -> Tensor:
    """``_pdist_backward`` in pieces that have derivatives."""
    rows, columns = pairs(self)
    parts = grad.unsqueeze(-1) * slope(self.index_select(0, rows) - self.index_select(0, columns), p)
    return torch.zeros_like(self).index_add(0, rows, parts).index_add(0, columns, -parts)


DECOMPOSITIONS.add(aten._pdist_backward.default, pdist_pulled)


def pdist_tangent(self: Tensor, p: float, self_t: Tensor) -> Tensor:
    rows, columns = pairs(self)
    d, d_t = (x.index_select(0, rows) - x.index_select(0, columns) for x in (self, self_t))
    return (slope(d, p) * d_t).sum(-1)


def pdist_self(grad: Tensor, self: Tensor, p: float, result: Tensor) -> Tensor:
    if 0 in (*grad.shape, *self.shape):  # for half precision there is no kernel, and of no vectors it crashes
        return torch.zeros_like(self)
    if recorded_at_base(grad, self):
        return pdist_pulled(grad, self, p, result)
    return run(aten._pdist_backward.default, grad.contiguous(), self, p, result)


derivative(aten._pdist_forward.default, tangent=pdist_tangent, self=pdist_self)
