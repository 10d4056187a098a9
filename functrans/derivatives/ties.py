"""Derivatives of maxima, minima and clamps, which have a kink where two of their operands are equal.

There the derivative is a choice, and the installed PyTorch's is followed: 2.14 changed it (``versions.SPLITS_TIES``).
Up to 2.13 ``clamp``, ``fmax`` and ``fmin`` give one operand all of it; since then tensors share it, and a bound that is
a number keeps it from ``self``. Where one operand is NaN, ``fmax`` and ``fmin`` of 2.14 give all of it to each, those
of the other versions to the number. Where PyTorch's forward mode is not the transpose of its reverse mode, ours is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import where_or_zero
from functrans.derivatives.table import derivative
from functrans.pytorch.versions import PASSES_NAN_BY, SPLITS_TIES

aten = torch.ops.aten
pointwise = partial(derivative, tangent="elementwise")


def shared(grad: Tensor, tie: Tensor, none: Tensor) -> Tensor:
    """Half of ``grad`` where ``tie`` holds, nothing where ``none`` does, all of it elsewhere."""
    return aten.where.ScalarSelf(none, 0, aten.where.self(tie, grad / 2, grad))


def share_of_larger(grad: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """What ``one`` gets of the larger of two tensors; at NaN each gets all."""
    return shared(grad, one == other, one < other)


def share_of_smaller(grad: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return shared(grad, one == other, one > other)


pointwise(
    aten.maximum.default,
    self=lambda grad, self, other: share_of_larger(grad, self, other),
    other=lambda grad, self, other: share_of_larger(grad, other, self),
)
pointwise(
    aten.minimum.default,
    self=lambda grad, self, other: share_of_smaller(grad, self, other),
    other=lambda grad, self, other: share_of_smaller(grad, other, self),
)


def inside(grad: Tensor, self: Tensor, min: Any, max: Any) -> Tensor:
    """``grad`` where ``self`` lies strictly between the bounds, of which one may be None, and 0 elsewhere."""
    if max is not None:
        grad = where_or_zero(self < max, grad)
    return grad if min is None else where_or_zero(self > min, grad)


def inside_or_at(grad: Tensor, self: Tensor, min: Any, max: Any) -> Tensor:
    """The same where ``self`` lies between the bounds or at one."""
    if max is not None:
        grad = where_or_zero(self <= max, grad)
    return grad if min is None else where_or_zero(self >= min, grad)


# ------------------------------------------------------------------------------------------- since 2.14


def shared_clamp_self(grad: Tensor, self: Tensor, min: Any, max: Any) -> Tensor:
    if min is None or max is None:
        return share_of_smaller(grad, self, max) if min is None else share_of_larger(grad, self, min)
    tie = ((self == min) | (self == max)) & (min < max)
    return shared(grad, tie, (self < min) | (self > max))


def shared_clamp_min(grad: Tensor, self: Tensor, min: Tensor, max: Tensor | None) -> Tensor:
    if max is None:
        return share_of_larger(grad, min, self)
    tie = (self == min) & (min < max)
    return where_or_zero(tie | ((self < min) & (min <= max)), torch.where(tie, grad / 2, grad))


def shared_clamp_max(grad: Tensor, self: Tensor, min: Tensor | None, max: Tensor) -> Tensor:
    if min is None:
        return share_of_smaller(grad, max, self)
    tie = (self == max) & (min < max)
    return where_or_zero(tie | ((self > max) & (min <= max)) | (max < min), torch.where(tie, grad / 2, grad))


def entries_that_share() -> None:
    pointwise(aten.clamp.default, self=inside)
    pointwise(aten.clamp_min.default, self=lambda grad, self, min: where_or_zero(self > min, grad))
    pointwise(aten.clamp_max.default, self=lambda grad, self, max: where_or_zero(self < max, grad))
    pointwise(aten.clamp.Tensor, self=shared_clamp_self, min=shared_clamp_min, max=shared_clamp_max)
    pointwise(
        aten.clamp_min.Tensor,
        self=lambda grad, self, min: share_of_larger(grad, self, min),
        min=lambda grad, self, min: share_of_larger(grad, min, self),
    )
    pointwise(
        aten.clamp_max.Tensor,
        self=lambda grad, self, max: share_of_smaller(grad, self, max),
        max=lambda grad, self, max: share_of_smaller(grad, max, self),
    )


# ------------------------------------------------------------------------------------------- up to 2.13


def whole_clamp_min(grad: Tensor, self: Tensor, min: Tensor, max: Tensor | None) -> Tensor:
    below = self < min
    return where_or_zero(below if max is None else below & (min < max), grad)


def whole_clamp_max(grad: Tensor, self: Tensor, min: Tensor | None, max: Tensor) -> Tensor:
    above = self > max
    return where_or_zero(above if min is None else above | (max < min), grad)


def entries_that_give_all_to_one() -> None:
    pointwise(aten.clamp.default, self=inside_or_at)
    pointwise(aten.clamp_min.default, self=lambda grad, self, min: where_or_zero(self >= min, grad))
    pointwise(aten.clamp_max.default, self=lambda grad, self, max: where_or_zero(self <= max, grad))
    pointwise(aten.clamp.Tensor, self=inside_or_at, min=whole_clamp_min, max=whole_clamp_max)
    pointwise(
        aten.clamp_min.Tensor,
        self=lambda grad, self, min: where_or_zero(self >= min, grad),
        min=lambda grad, self, min: where_or_zero(self < min, grad),
    )
    pointwise(
        aten.clamp_max.Tensor,
        self=lambda grad, self, max: where_or_zero(self <= max, grad),
        max=lambda grad, self, max: where_or_zero(self > max, grad),
    )


if SPLITS_TIES:
    entries_that_share()
else:
    entries_that_give_all_to_one()

# ------------------------------------------------------------------------------------------- fmax and fmin

if SPLITS_TIES and not PASSES_NAN_BY:
    pointwise(
        aten.fmax.default,
        self=lambda grad, self, other: share_of_larger(grad, self, other),
        other=lambda grad, self, other: share_of_larger(grad, other, self),
    )
    pointwise(
        aten.fmin.default,
        self=lambda grad, self, other: share_of_smaller(grad, self, other),
        other=lambda grad, self, other: share_of_smaller(grad, other, self),
    )
else:
    beats, loses = (torch.gt, torch.lt) if SPLITS_TIES else (torch.ge, torch.le)

    def to_chosen(grad: Tensor, chosen: Tensor, tie: Tensor) -> Tensor:
        return where_or_zero(chosen, torch.where(tie, grad / 2, grad) if SPLITS_TIES else grad)

    pointwise(
        aten.fmax.default,
        self=lambda grad, self, other: to_chosen(grad, (self >= other) | other.isnan(), self == other),
        other=lambda grad, self, other: to_chosen(grad, ~(beats(self, other) | other.isnan()), self == other),
    )
    pointwise(
        aten.fmin.default,
        self=lambda grad, self, other: to_chosen(grad, (self <= other) | other.isnan(), self == other),
        other=lambda grad, self, other: to_chosen(grad, ~(loses(self, other) | other.isnan()), self == other),
    )
