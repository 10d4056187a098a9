"""Batching rules of the pure forms of writing through a view, and of the derivatives of views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, with_defaults
from functrans.interpreters.vmap.table import (
    BATCHING_RULES,
    BatchInfo,
    logical_rank,
    materialize,
    to_front,
    wrap_dim,
)
from functrans.operators.rules import caller_place
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten
Dims = Sequence[Any]
Output = tuple[Any, Any]


def view_scatter(op: OpOverload, run: Callable[..., Tensor], *places: int) -> None:
    """``op(x, src, ...)``, run by ``run``: both batched, in front. The arguments at ``places`` name a dimension."""

    def scatter(info: BatchInfo, in_dims: Dims, x: Tensor, src: Tensor, *rest: Any) -> Output:
        rank = logical_rank(x, in_dims[0])
        x, src = materialize(x, in_dims[0], info.batch_size), materialize(src, in_dims[1], info.batch_size)
        arguments = with_defaults(op, (x, src, *rest))
        for place in places:
            arguments[place] = wrap_dim(arguments[place], rank) + 1
        return run(*arguments), 0

    BATCHING_RULES.add(op, scatter, place=caller_place())


view_scatter(aten.select_scatter.default, torch.select_scatter, 2)
view_scatter(aten.slice_scatter.default, torch.slice_scatter, 2)
view_scatter(aten.diagonal_scatter.default, torch.diagonal_scatter, 3, 4)


def view_backward(op: OpOverload, *places: int) -> None:
    """``op(grad, input_sizes, ...)``: zeros of ``input_sizes``, with the gradient in the view's place; likewise."""

    def backward(info: BatchInfo, in_dims: Dims, grad: Tensor, sizes: Any, *rest: Any) -> Output:
        if len(sizes) == 0:
            raise RuleDeclined("an example of rank 0 has no dimensions")
        arguments = [to_front(grad, in_dims[0]), (info.batch_size, *sizes), *rest]
        for place in places:
            arguments[place] = wrap_dim(arguments[place], len(sizes)) + 1
        return op(*arguments), 0

    BATCHING_RULES.add(op, backward, place=caller_place())


view_backward(aten.select_backward.default, 2)
view_backward(aten.slice_backward.default, 2)
view_backward(aten.unfold_backward.default, 2)
view_backward(aten.diagonal_backward.default, 3, 4)
