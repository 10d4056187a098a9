"""Reductions and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import (
    RuleDeclined,
    flat_examples,
    full_reduction,
    full_reduction_over,
    reduced_dims,
    reduction,
    same_dims,
)
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_rank, to_front
from functrans.operators.views import wrap_dim

aten = torch.ops.aten

reduction(
    aten.all.dim,
    aten.amax.default,
    aten.amin.default,
    aten.any.dim,
    aten.count_nonzero.dim_IntList,
    aten.kthvalue.default,
    aten.linalg_vector_norm.default,
    aten.logsumexp.default,
    aten.max.dim,
    aten.mean.dim,
    aten.median.dim,
    aten.min.dim,
    aten.mode.default,
    aten.nanmean.default,
    aten.nanmedian.dim,
    aten.nansum.default,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
    aten.prod.dim_int,
    aten.special_logsumexp.default,
    aten.std.correction,
    aten.std.dim,
    aten.std_mean.correction,
    aten.std_mean.dim,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.var.dim,
    aten.var_mean.correction,
    aten.var_mean.dim,
)

# An empty list of dimensions reduces nothing here.
reduction(aten.all.dims, aten.any.dims, empty_means_all=False)

full_reduction_over(aten._is_all_true.default, aten.all.dims)
full_reduction_over(aten._is_any_true.default, aten.any.dims)
full_reduction_over(aten.all.default, aten.all.dims)
full_reduction_over(aten.any.default, aten.any.dims)
full_reduction_over(aten.max.default, aten.amax.default)
full_reduction_over(aten.mean.default, aten.mean.dim)
full_reduction_over(aten.min.default, aten.amin.default)
full_reduction_over(aten.norm.Scalar, lambda x, dims, p=2: aten.norm.ScalarOpt_dim(x, p, dims))
full_reduction_over(
    aten.norm.ScalarOpt_dtype, lambda x, dims, p, dtype: aten.norm.ScalarOpt_dim_dtype(x, p, dims, False, dtype=dtype)
)
full_reduction_over(aten.std.default, aten.std.dim)
full_reduction_over(aten.std_mean.default, aten.std_mean.dim)
full_reduction_over(aten.sum.default, aten.sum.dim_IntList)
full_reduction_over(aten.var.default, aten.var.dim)
full_reduction_over(aten.var_mean.default, aten.var_mean.dim)
full_reduction(aten.prod.default, lambda flat, **kw: aten.prod.dim_int(flat, 1, **kw))


def median_of_all(op: Any, dim_op: Any) -> None:
    """The median of everything is NaN for no elements, the one along a dimension is an error."""

    @batching_rule(op)
    def median(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[Any, Any]:
        flat = flat_examples(x, in_dims[0])
        if flat.shape[1] == 0:
            raise RuleDeclined(f"{op}: no elements")
        return dim_op(flat.contiguous(), 1)[0], 0  # of an expanded tensor it is of other elements (torch 2.13)


median_of_all(aten.median.default, aten.median.dim)
median_of_all(aten.nanmedian.default, aten.nanmedian.dim)


def arg_reduction(op: Any) -> Callable[..., tuple[Any, Any]]:
    """Without ``dim`` the index counts the elements of the flattened example."""

    def argument(
        info: BatchInfo, in_dims: Sequence[Any], x: Tensor, dim: int | None = None, keepdim: bool = False
    ) -> tuple[Any, Any]:
        bdim, rank = in_dims[0], logical_rank(x, in_dims[0])
        if dim is None or rank == 0:
            if dim is not None:
                wrap_dim(dim, rank)
            return restore_rank(op(flat_examples(x, bdim), 1, False), rank if keepdim else 0), 0
        dim = wrap_dim(dim, rank)
        output = op(x, dim if dim < bdim else dim + 1, keepdim)
        return output, bdim if keepdim else bdim - (dim < bdim)

    return argument


def restore_rank(x: Tensor, rank: int) -> Tensor:
    """``[B]`` as ``[B, 1, ..., 1]``."""
    return x.view([x.shape[0], *([1] * rank)]) if rank else x


batching_rule(aten.argmax.default)(arg_reduction(aten.argmax.default))
batching_rule(aten.argmin.default)(arg_reduction(aten.argmin.default))


@batching_rule(aten.aminmax.default)
def aminmax(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *, dim: int | None = None, keepdim: bool = False
) -> tuple[Any, Any]:
    """Both extremes, of everything or along one dimension."""
    bdim, rank = in_dims[0], logical_rank(x, in_dims[0])
    if dim is None or rank == 0:
        if dim is not None:
            wrap_dim(dim, rank)
        both = aten.aminmax.default(flat_examples(x, bdim), dim=1)
        return tuple(restore_rank(one, rank if keepdim else 0) for one in both), (0, 0)
    dim = wrap_dim(dim, rank)
    output = aten.aminmax.default(x, dim=dim if dim < bdim else dim + 1, keepdim=keepdim)
    return output, same_dims(output, bdim if keepdim else bdim - (dim < bdim))


@batching_rule(aten.count_nonzero.default)
def count_nonzero(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, dim: int | None = None) -> tuple[Any, Any]:
    """Of everything, or along one dimension."""
    dims = [1 + one for one in reduced_dims(dim, logical_rank(x, in_dims[0]))]
    x = to_front(x, in_dims[0])
    if x.dim() == 1:
        x, dims = x.unsqueeze(-1), [1]
    return aten.count_nonzero.dim_IntList(x, dims), 0


@batching_rule(aten.trace.default)
def trace(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[Any, Any]:
    """The sum of the diagonal, in the dtype that ``sum`` has for it."""
    if logical_rank(x, in_dims[0]) != 2:
        raise RuleDeclined("trace: expected a matrix")
    return torch.diagonal(to_front(x, in_dims[0]), 0, 1, 2).sum(-1), 0


@batching_rule(aten.segment_reduce.default)
def segment_reduce(
    info: BatchInfo,
    in_dims: Sequence[Any],
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    **kw: Any,
) -> tuple[Any, Any]:
    """The segments of all examples, for each of them: those of a tensor may differ along its leading dimensions."""
    if indices is not None or not info.batch_size:
        raise RuleDeclined("segment_reduce by indices, or of no examples")
    data = to_front(data, in_dims[0])
    rows = lambda x: None if x is None else x.expand(info.batch_size, *x.shape)
    axis = wrap_dim(axis, data.dim() - 1) + 1
    return aten.segment_reduce.default(data, reduce, lengths=rows(lengths), offsets=rows(offsets), axis=axis, **kw), 0
