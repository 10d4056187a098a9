"""Operators along a dimension that keep the rank: softmax, scans, sorting, flips, searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import (
    RuleDeclined,
    along_dim,
    along_dim_rule,
    flat_examples,
    with_defaults,
)
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_rank, materialize, to_front

aten = torch.ops.aten

# Softmax
along_dim(
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten._safe_softmax.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten.log_softmax.int,
    aten.softmax.int,
    aten.special_log_softmax.default,
    aten.special_softmax.default,
)

# Scans
along_dim(
    aten._logcumsumexp.default,
    aten.cummax.default,
    aten.cummaxmin_backward.default,
    aten.cummin.default,
    aten.cumprod.default,
    aten.cumprod_backward.default,
    aten.cumsum.default,
    aten.logcumsumexp.default,
)

# Sorting
along_dim(
    aten.argsort.default,
    aten.argsort.stable,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
)

# Moving elements, halving a dimension
along_dim(
    aten.flip.default,
    aten.glu.default,
    aten.glu_backward.default,
    aten.glu_jvp.default,
    aten.rot90.default,
)

roll_along_dims = along_dim_rule(aten.roll.default, 2)


@batching_rule(aten.roll.default)
def roll(info: BatchInfo, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Without dimensions the flattened example is rolled."""
    x, shifts, dims = with_defaults(aten.roll.default, args)
    if dims:
        return roll_along_dims(info, in_dims, x, shifts, dims)
    x = to_front(x, in_dims[0])
    if len(shifts) != 1:
        raise RuleDeclined("roll: several shifts need as many dims")
    return aten.roll.default(flat_examples(x, 0), shifts, [1]).view(x.shape), 0


# ---------------------------------------------------------------------------------------------------------------
# Searches in sorted sequences


@batching_rule(aten.searchsorted.Tensor)
def searchsorted(
    info: BatchInfo,
    in_dims: Sequence[Any],
    sequence: Tensor,
    values: Tensor,
    *,
    sorter: Tensor | None = None,
    **kw: Any,
) -> tuple[Any, Any]:
    """A one-dimensional sequence serves values of any shape; otherwise the leading dimensions are the same."""
    sequence_dim, values_dim = in_dims
    if logical_rank(sequence, sequence_dim) == 1:
        if sequence_dim is None:
            return aten.searchsorted.Tensor(sequence, values, sorter=sorter, **kw), values_dim
        sequence, sorter = with_sorter(sequence, sequence_dim, sorter, info.batch_size)
        values = materialize(values, values_dim, info.batch_size)
        found = aten.searchsorted.Tensor(sequence, flat_examples(values, 0), sorter=sorter, **kw)
        return found.view(values.shape), 0
    sequence, sorter = with_sorter(sequence, sequence_dim, sorter, info.batch_size)
    values = materialize(values, values_dim, info.batch_size).contiguous()  # else PyTorch warns of the copy
    if sequence.dim() != values.dim() or sequence.dim() == 1:
        raise RuleDeclined("searchsorted: the leading dimensions of sequence and values differ, or there is none")
    return aten.searchsorted.Tensor(sequence, values, sorter=sorter, **kw), 0


def with_sorter(sequence: Tensor, bdim: int | None, sorter: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """The batched sequence, and its sorter, which is the same for all examples."""
    return materialize(sequence, bdim, size), None if sorter is None else materialize(sorter, None, size)


@batching_rule(aten.searchsorted.Scalar)
def searchsorted_number(
    info: BatchInfo, in_dims: Sequence[Any], sequence: Tensor, value: Any, **kw: Any
) -> tuple[Any, Any]:
    """The number takes the dtype of the sequence, as in any binary operator, unless it is of a higher kind."""
    return searchsorted(info, (in_dims[0], None), sequence, number_like(sequence, value), **kw)


@batching_rule(aten.bucketize.Tensor)
def bucketize(
    info: BatchInfo, in_dims: Sequence[Any], values: Tensor, boundaries: Tensor, **kw: Any
) -> tuple[Any, Any]:
    """One list of boundaries for all is the operator itself."""
    if in_dims[1] is None:
        return aten.bucketize.Tensor(values, boundaries, **kw), in_dims[0]
    if logical_rank(boundaries, in_dims[1]) != 1:
        raise RuleDeclined("bucketize: the boundaries are not a vector")
    return searchsorted(info, (in_dims[1], in_dims[0]), boundaries, values, **kw)


@batching_rule(aten.bucketize.Scalar)
def bucketize_number(
    info: BatchInfo, in_dims: Sequence[Any], value: Any, boundaries: Tensor, **kw: Any
) -> tuple[Any, Any]:
    """As ``searchsorted`` of a number."""
    return bucketize(info, (None, in_dims[1]), number_like(boundaries, value), boundaries, **kw)


def number_like(sequence: Tensor, value: Any) -> Tensor:
    """The number as a 0-d tensor with the dtype of the sequence."""
    if not (sequence.dtype.is_floating_point or isinstance(value, int)):
        raise RuleDeclined("the number is of a higher kind than the sequence")
    return torch.full((), value, dtype=sequence.dtype, device=sequence.device)
