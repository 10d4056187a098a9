"""Batching rules of the pure forms of writing through a view, and of the derivatives of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.rules import caller_place
from functrans.core.torch_private import OpOverload
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import (
    BATCHING_RULES,
    BatchInfo,
    batching_rule,
    logical_rank,
    materialize,
    to_front,
    wrap_dim,
)

aten = torch.ops.aten
Dims = Sequence[Any]
Output = tuple[Any, Any]


@batching_rule(aten.select_scatter.default)
def select_scatter(info: BatchInfo, in_dims: Dims, x: Tensor, src: Tensor, dim: int, index: Any) -> Output:
    """Both batched, in front."""
    dim = wrap_dim(dim, logical_rank(x, in_dims[0])) + 1
    x, src = (materialize(v, d, info.batch_size) for v, d in zip((x, src), in_dims))
    return torch.select_scatter(x, src, dim, index), 0


@batching_rule(aten.slice_scatter.default)
def slice_scatter(
    info: BatchInfo, in_dims: Dims, x: Tensor, src: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Output:
    """Both batched, in front."""
    dim = wrap_dim(dim, logical_rank(x, in_dims[0])) + 1
    x, src = (materialize(v, d, info.batch_size) for v, d in zip((x, src), in_dims))
    return aten.slice_scatter.default(x, src, dim, start, end, step), 0


@batching_rule(aten.diagonal_scatter.default)
def diagonal_scatter(
    info: BatchInfo, in_dims: Dims, x: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Output:
    """Both batched, in front."""
    rank = logical_rank(x, in_dims[0])
    dim1, dim2 = wrap_dim(dim1, rank) + 1, wrap_dim(dim2, rank) + 1
    x, src = (materialize(v, d, info.batch_size) for v, d in zip((x, src), in_dims))
    return torch.diagonal_scatter(x, src, offset, dim1, dim2), 0


def view_backward(*ops: OpOverload, dims: int = 1) -> None:
    """``op(grad, input_sizes, dim, ...)``: zeros of ``input_sizes``, with the gradient in the view's place.

    ``dims`` is the number of arguments that name a dimension; those of ``diagonal_backward`` follow its offset.
    """
    place = caller_place()
    for op in ops:
        BATCHING_RULES.add(op, view_backward_rule(op, (2,) if dims == 1 else (3, 4)), place=place)


def view_backward_rule(op: OpOverload, places: tuple[int, ...]) -> Callable[..., Output]:
    """The rule of one of them."""

    def backward(info: BatchInfo, in_dims: Dims, grad: Tensor, sizes: Any, *rest: Any) -> Output:
        if len(sizes) == 0:
            raise RuleDeclined("an example of rank 0 has no dimensions")
        arguments = [to_front(grad, in_dims[0]), (info.batch_size, *sizes), *rest]
        for place in places:
            arguments[place] = wrap_dim(arguments[place], len(sizes)) + 1
        return op(*arguments), 0

    return backward


view_backward(aten.select_backward.default, aten.slice_backward.default, aten.unfold_backward.default)
view_backward(aten.diagonal_backward.default, dims=2)
