"""Derivatives of the margin losses, whose terms are ``max(0, margin - x[own] + x[other])``, at most squared.

Each is given by the slopes of one row's loss: a matrix like the input, constant where the terms are not squared. At the
corner of a term the slope is 0, as in PyTorch's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.losses import MEAN, NONE
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def rows(x: Tensor) -> Tensor:
    """The input or the targets as a matrix, one example a row."""
    return x if x.dim() == 2 else x.reshape(1, -1)


def by_slopes(grad: Tensor, slopes: Tensor, self: Tensor, reduction: int) -> Tensor:
    if reduction == MEAN:
        grad = grad / slopes.shape[0]
    return (grad.reshape(-1, 1) * slopes).reshape(self.shape)


def along(slopes: Tensor, self_t: Tensor, result: Tensor, reduction: int) -> Tensor:
    moved = (slopes * rows(self_t)).sum(1)
    if reduction == NONE:
        return moved.reshape(result.shape)
    return moved.mean() if reduction == MEAN else moved.sum()


def multi_margin_slopes(self: Tensor, target: Tensor, p: Any, margin: Any, weight: Tensor | None) -> Tensor:
    x, own = rows(self), target.reshape(-1, 1)
    gap = torch.relu(margin - x.gather(1, own) + x).scatter(1, own, 0)
    slopes = (2 * gap if p == 2 else (gap > 0).to(x.dtype)) / x.shape[1]
    if weight is not None:
        slopes = slopes * weight.index_select(0, own.flatten()).unsqueeze(1)
    return slopes.scatter(1, own, -slopes.sum(1, keepdim=True))


derivative(
    aten.multi_margin_loss.default,
    tangent=lambda self, target, p, margin, weight, reduction, result, self_t: along(
        multi_margin_slopes(self, target, p, margin, weight), self_t, result, reduction
    ),
    self=lambda grad, self, target, p, margin, weight, reduction: by_slopes(
        grad, multi_margin_slopes(self, target, p, margin, weight), self, reduction
    ),
)


def multilabel_slopes(self: Tensor, target: Tensor) -> Tensor:
    x, labels = rows(self), rows(target)
    listed = (labels >= 0).cumprod(1).bool()  # the list of labels ends at the first -1
    own = labels.where(listed, 0)
    is_label = torch.zeros_like(x).scatter_add(1, own, listed.to(x.dtype)) > 0
    gap = 1 - x.gather(1, own).unsqueeze(2) + x.unsqueeze(1)  # example, label, other class
    counts = ((gap > 0) & listed.unsqueeze(2) & ~is_label.unsqueeze(1)).to(x.dtype)
    return counts.sum(1).scatter_add(1, own, -counts.sum(2)) / x.shape[1]


derivative(
    aten.multilabel_margin_loss_forward.default,
    tangent=lambda self, target, reduction, results, self_t: (
        along(multilabel_slopes(self, target), self_t, results[0], reduction), None,
    ),
    self=lambda grads, self, target, reduction: None if grads[0] is None else by_slopes(
        grads[0], multilabel_slopes(self, target), self, reduction
    ),
)
