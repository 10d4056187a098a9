"""Derivative of ``embedding_bag``: rows of a table, summed, averaged or maximized within bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.table import derivative

aten = torch.ops.aten

SUM, MEAN, MAX = 0, 1, 2


def bags_of(indices: Tensor, offsets: Tensor, include_last_offset: bool) -> Tensor:
    """The bag of each index: the last one that begins at or before it."""
    starts = offsets[:-1] if include_last_offset else offsets
    places = torch.arange(len(indices), device=indices.device, dtype=starts.dtype)
    return torch.searchsorted(starts, places, right=True) - 1


def shares(
    like: Tensor,
    indices: Tensor,
    bags: Tensor,
    count: int,
    mode: int,
    per_sample_weights: Tensor | None,
    padding_idx: int,
) -> Tensor:
    """How much of its row each index adds to its bag."""
    counted = (indices != padding_idx).to(like.dtype)
    if mode == MEAN:
        sizes = like.new_zeros(count).index_add(0, bags, counted)
        return counted / sizes.clamp(1).index_select(0, bags)
    return counted if per_sample_weights is None else counted * per_sample_weights


def filled(results: Any, bags: Tensor, indices: Tensor, padding_idx: int) -> Tensor:
    """Which bags hold anything, as a column."""
    counted = (indices != padding_idx).to(results[0].dtype).unsqueeze(1)
    return torch.zeros_like(results[0][:, :1]).index_add(0, bags, counted) > 0


def weight_cotangent(
    grads: Any, results: Any, weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool, mode: int,
    per_sample_weights: Tensor | None, include_last_offset: bool, padding_idx: int,
) -> Tensor | None:  # fmt: skip
    grad = grads[0]
    if grad is None:
        return None
    bags = bags_of(indices, offsets, include_last_offset)
    if mode == MAX:
        chosen = torch.where(filled(results, bags, indices, padding_idx), grad, 0)
        return grad.new_zeros(weight.shape).scatter_add(0, results[3].long(), chosen)
    share = shares(grad, indices, bags, grad.shape[0], mode, per_sample_weights, padding_idx)
    if scale_grad_by_freq:
        seen = grad.new_zeros(weight.shape[0]).index_add(0, indices, torch.ones_like(share))
        share = share / seen.index_select(0, indices)
    return grad.new_zeros(weight.shape).index_add(0, indices, grad.index_select(0, bags) * share.unsqueeze(1))


def sample_weights_cotangent(
    grads: Any, weight: Tensor, indices: Tensor, offsets: Tensor, include_last_offset: bool, padding_idx: int
) -> Tensor | None:
    # only sums have weights
    if grads[0] is None:
        return None
    bags = bags_of(indices, offsets, include_last_offset)
    found = (grads[0].index_select(0, bags) * weight.index_select(0, indices)).sum(1)
    return torch.where(indices == padding_idx, 0, found)


def embedding_bag_tangent(
    results: Any, weight: Tensor, indices: Tensor, offsets: Tensor, mode: int, per_sample_weights: Tensor | None,
    include_last_offset: bool, padding_idx: int, weight_t: Tensor | None, per_sample_weights_t: Tensor | None,
) -> tuple[Tensor | None, None, None, None]:  # fmt: skip
    bags = bags_of(indices, offsets, include_last_offset)
    out = results[0]
    if mode == MAX:
        if weight_t is None:
            return None, None, None, None
        chosen = weight_t.gather(0, results[3].long())
        return torch.where(filled(results, bags, indices, padding_idx), chosen, 0), None, None, None
    added = torch.zeros_like(out)
    for rows, samples in ((weight_t, per_sample_weights), (weight, per_sample_weights_t)):
        if rows is None or (rows is weight and samples is None):
            continue
        share = shares(out, indices, bags, out.shape[0], mode, samples, padding_idx)
        added = added.index_add(0, bags, rows.index_select(0, indices) * share.unsqueeze(1))
    return added, None, None, None


derivative(
    aten._embedding_bag.default,
    tangent=embedding_bag_tangent,
    weight=weight_cotangent,
    per_sample_weights=sample_weights_cotangent,
)
