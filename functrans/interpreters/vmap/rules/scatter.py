"""Batching rules of ``gather``, ``scatter`` and the operators with one vector of positions along a dimension.

A batched vector of positions along the first dimension is one long vector of positions, into the examples laid end to
end. Along other dimensions it is a ``gather`` or a ``scatter`` whose positions are expanded over the rest: like the
operators they stand for, these check that a position is inside its own example.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import range_for
from functrans.interpreters.vmap.families import RuleDeclined, family, tensor_positions
from functrans.interpreters.vmap.table import (
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_rank,
    logical_shape,
    materialize,
    to_front,
)
from functrans.operators.views import wrap_dim
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


@family
def along_positions(op: OpOverload) -> Callable[..., Output]:
    """``op(self, dim, index, src?, ...)``, all tensors of one rank: all batched, in front.

    Rank 0 is taken as rank 1, and undone in the output, which has the rank of the index for ``gather`` and of the
    tensor itself for ``scatter``.
    """
    positions = tensor_positions(op)
    like = 2 if op is aten.gather.default else 0

    def gather_or_scatter(info: BatchInfo, in_dims: Dims, *args: Any, **kwargs: Any) -> Output:
        arguments = list(args)
        ranks = {place: logical_rank(args[place], in_dims[place]) for place in positions}
        rank = max(ranks.values())
        if any(max(r, 1) != max(rank, 1) for r in ranks.values()):
            raise RuleDeclined(f"{op} takes tensors of one rank")
        for place in positions:
            x = materialize(args[place], in_dims[place], info.batch_size)
            arguments[place] = x.unsqueeze(-1) if ranks[place] == 0 else x
        arguments[1] = wrap_dim(args[1], rank) + 1
        out = op(*arguments, **kwargs)
        return out.squeeze(-1) if ranks[like] == 0 else out, 0

    return gather_or_scatter


along_positions(
    aten.gather.default,
    aten.scatter.value,
    aten.scatter.src,
    aten.scatter.reduce,
    aten.scatter.value_reduce,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
)


# ---------------------------------------------------------------------------------------------------------------
# One vector of positions


@batching_rule(aten.index_select.default)
def index_select(info: BatchInfo, in_dims: Dims, x: Tensor, dim: int, index: Tensor) -> Output:
    """Batched positions of an unbatched tensor are one long vector of positions."""
    x_dim, index_dim = in_dims[0], in_dims[2]
    rank = logical_rank(x, x_dim)
    dim = wrap_dim(dim, rank)
    if logical_rank(index, index_dim) > 1:
        raise RuleDeclined("index_select by a matrix")
    if rank == 0:
        return index_select_one(info, x_dim, index_dim, x, index)
    if index_dim is None:
        return torch.index_select(to_front(x, x_dim), dim + 1, index), 0
    index = vector(index, index_dim)
    if x_dim is None:
        out = torch.index_select(x, dim, index.reshape(index.shape[0] * index.shape[1]))
        return out.unflatten(dim, index.shape), dim
    x = to_front(x, x_dim)
    if rows_pay(x, dim + 1):
        out = torch.index_select(end_to_end(x), 0, own_rows(index, x.shape[1]))
        return out.reshape(*index.shape, *x.shape[2:]), 0
    return torch.gather(x, dim + 1, over_dims(index, x, dim + 1)), 0


def index_select_one(info: BatchInfo, x_dim: int | None, index_dim: int | None, x: Tensor, index: Tensor) -> Output:
    """Of a scalar it takes the one element, and returns a scalar."""
    count = math.prod(logical_shape(index, index_dim))
    if count != 1:
        raise RuntimeError(f"index_select(): Index to scalar can have only 1 value, got {count} value(s)")
    out, _ = index_select(info, (x_dim, None, index_dim), x.unsqueeze(-1), 0, index)
    return out.squeeze(1), 0


# Rows shorter than this are moved one element at a time as quickly.
SHORT_ROW = 4


def long_rows(x: Tensor, dim: int) -> bool:
    """Whether there is enough behind the physical dimension ``dim`` to be moved at once."""
    return math.prod(x.shape[dim + 1 :]) >= SHORT_ROW


def rows_pay(x: Tensor, dim: int) -> bool:
    """Whether positions along the physical dimension ``dim`` had better be positions of rows of ``end_to_end(x)``."""
    return dim == 1 and long_rows(x, dim)


def end_to_end(x: Tensor) -> Tensor:
    """``[B, n, ...]`` as ``[B * n, ...]``."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def own_rows(index: Tensor, extent: int) -> Tensor:
    """Positions ``[B, ...]`` in examples of ``extent`` rows as positions in the examples laid end to end, flat.

    What is outside of its own example is outside of them all, so that the operator refuses it.
    """
    size = index.shape[0]
    first = range_for(index, size) * extent
    first = first.view(size, *[1] * (index.dim() - 1))
    inside = (index >= 0) & (index < extent)
    return torch.where(inside, index + first, size * extent).reshape(-1)


def vector(index: Tensor, bdim: int) -> Tensor:
    """Batched positions as ``[B, n]``: a scalar is one position."""
    return index.unsqueeze(1) if index.dim() == 1 else to_front(index, bdim)


def over_dims(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """Positions ``[B, n]`` expanded over all dimensions of ``x`` but ``dim``, without a copy."""
    shape = list(x.shape)
    shape[dim] = index.shape[1]
    ones = [1] * x.dim()
    ones[0], ones[dim] = index.shape
    return index.long().view(ones).expand(shape)


def writing_positions_rule(op: OpOverload, scatter: Callable[..., Tensor]) -> Callable[..., Output]:
    """``op(self, dim, index, source, ...)``; ``scatter`` does the same with expanded positions."""

    def write(
        info: BatchInfo, in_dims: Dims, x: Tensor, dim: int, index: Tensor, source: Tensor, *args: Any, **kwargs: Any
    ) -> Output:
        size, index_dim = info.batch_size, in_dims[2]
        rank = logical_rank(x, in_dims[0])
        dim = wrap_dim(dim, rank) + 1
        if logical_rank(source, in_dims[3]) != rank or logical_rank(index, index_dim) > 1:
            raise RuleDeclined(f"{op} takes tensors of one rank, and a vector of positions")
        x, source = materialize(x, in_dims[0], size), materialize(source, in_dims[3], size)
        if rank == 0:
            x, source = x.unsqueeze(1), source.unsqueeze(1)
        if index_dim is None:
            out = op(x, dim, index, source, *args, **kwargs)
        elif rows_pay(x, dim):
            index = vector(index, index_dim)
            if source.shape != (*index.shape, *x.shape[2:]):
                raise RuleDeclined(f"{op} takes a slice for each position")
            rows = own_rows(index, x.shape[1])
            out = op(end_to_end(x), 0, rows, end_to_end(source), *args, **kwargs).reshape(x.shape)
        else:
            index = over_dims(vector(index, index_dim), x, dim)
            if source.shape != index.shape or source.dtype is not x.dtype:
                raise RuleDeclined(f"{op} takes a slice for each position")
            out = scatter(x, dim, index, source, *args, **kwargs)
        return out.squeeze(1) if rank == 0 else out, 0

    return write


writing_positions = family(writing_positions_rule)


def scatter_scaled(x: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Tensor:
    """``index_add`` as ``scatter_add``."""
    if x.dtype is torch.bool:
        raise RuleDeclined("scatter_add of truth values is not index_add")
    return torch.scatter_add(x, dim, index, source if alpha == 1 else source * alpha)


def scatter_reduced(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """``index_reduce`` as ``scatter_reduce``."""
    if reduce == "mean" and not x.is_floating_point():
        raise RuleDeclined("the two may round integers in different ways")
    return torch.scatter_reduce(x, dim, index, source, reduce, include_self=include_self)


writing_positions(aten.index_add.default, scatter=scatter_scaled)
writing_positions(aten.index_copy.default, scatter=torch.scatter)
writing_positions(aten.index_reduce.default, scatter=scatter_reduced)


@batching_rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(info: BatchInfo, in_dims: Dims, x: Tensor, dim: int, index: Tensor, value: Any) -> Output:
    """Negative positions count from the end, which ``scatter`` does not know."""
    size, index_dim, value_dim = info.batch_size, in_dims[2], in_dims[3]
    rank = logical_rank(x, in_dims[0])
    dim = wrap_dim(dim, rank) + 1
    if logical_rank(index, index_dim) > 1 or (isinstance(value, Tensor) and logical_rank(value, value_dim) > 0):
        raise RuleDeclined("index_fill takes a vector of positions and a scalar")
    x = materialize(x, in_dims[0], size)
    x = x.unsqueeze(1) if rank == 0 else x
    if index_dim is None and value_dim is None:
        out = torch.index_fill(x, dim, index, value)
    else:
        index = vector(materialize(index, index_dim, size), 0)
        index = torch.where(index < 0, index + x.shape[dim], index)
        if not isinstance(value, Tensor) and rows_pay(x, dim):
            return torch.index_fill(end_to_end(x), 0, own_rows(index, x.shape[1]), value).reshape(x.shape), 0
        index = over_dims(index, x, dim)
        if isinstance(value, Tensor):
            value = materialize(value, value_dim, size).to(x.dtype)
            value = value.view(size, *[1] * (x.dim() - 1))
            # not by scatter of the value: a position that occurs twice would count twice in its derivative
            out = torch.where(torch.zeros_like(x, dtype=torch.bool).scatter(dim, index, True), value, x)
        else:
            out = torch.scatter(x, dim, index, value)
    return out.squeeze(1) if rank == 0 else out, 0
