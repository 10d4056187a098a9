"""Batching rules of ``bincount`` and ``histc``: numbers of values in bins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import range_for
from functrans.interpreters.vmap.families import RuleDeclined, flat_examples
from functrans.interpreters.vmap.table import BatchInfo, Dims, Output, batching_rule, logical_rank, materialize

aten = torch.ops.aten

# The arithmetic of histc in operators of their own goes through memory ten times, its kernel once.
LONG = 2048


@batching_rule(aten.bincount.default)
def bincount(info: BatchInfo, in_dims: Dims, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Output:
    """One count for all examples, with a bin for each pair of a value and an example.

    A value of ``minlength`` or more makes its example's result longer, which only the loop can tell.
    """
    size, weights_dim = info.batch_size, None if weights is None else in_dims[1]
    if logical_rank(x, in_dims[0]) != 1 or x.is_floating_point() or x.dtype is torch.bool or size == 0:
        raise RuleDeclined("bincount takes a vector of integers")
    if weights is not None and logical_rank(weights, weights_dim) != 1:
        raise RuleDeclined("bincount takes a vector of weights")
    x = materialize(x, in_dims[0], size).long()
    bins = (x * size + range_for(x, size).unsqueeze(1)).reshape(-1)
    if weights is not None:
        weights = materialize(weights, weights_dim, size)
        if weights.shape != x.shape:
            raise RuleDeclined("bincount takes as many weights as values")
        weights = weights.reshape(-1)
    counts = aten.bincount.default(bins, weights, minlength * size)
    if counts.shape[0] != minlength * size:
        raise RuleDeclined("the size of the result depends on the data")
    return counts.view(minlength, size), 1


@batching_rule(aten.histc.default)
def histc(info: BatchInfo, in_dims: Dims, x: Tensor, bins: int = 100, min: Any = 0, max: Any = 0) -> Output:
    """The kernels' own arithmetic for the bin of a value; equal bounds stand for those of each example's data."""
    if x.dtype not in (torch.float32, torch.float64) or bins <= 0 or min > max:
        raise RuleDeclined("integers, which some kernels do not count, and errors")
    x = flat_examples(x, in_dims[0])
    if x.device.type == "cpu" and x.shape[1] >= LONG and info.batch_size:
        return torch.stack([aten.histc.default(one, bins, min, max) for one in x.unbind(0)]), 0
    low, high = x.new_full((1, 1), min), x.new_full((1, 1), max)
    if min == max and x.shape[1]:
        low, high = torch.aminmax(x, dim=1, keepdim=True)
    same = low == high
    low, high = torch.where(same, low - 1, low), torch.where(same, high + 1, high)
    inside = (x >= low) & (x <= high)
    place = ((x - low) * bins / (high - low)).clamp(max=bins - 1)
    # A range that is not finite is an error: there is no such bin.
    finite = low.isfinite() & high.isfinite()
    place = torch.where(inside, place, 0).long().masked_fill(~finite, -1)
    return x.new_zeros(x.shape[0], bins).scatter_add(1, place, inside.to(x.dtype)), 0
