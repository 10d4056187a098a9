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
    Dims,
    Output,
    logical_rank,
    materialize,
    to_front,
)
from functrans.operators.views import PARTS, wrap_dim
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def scatter_rule(op: OpOverload, dims: Sequence[int]) -> Callable[..., Output]:
    """``op(x, src, *where)``: both batched, in front. Dimensions are named at the places ``dims`` of ``where``."""
    run = getattr(torch, op._schema.name[6:])

    def scatter(info: BatchInfo, in_dims: Dims, x: Tensor, src: Tensor, *where: Any) -> Output:
        rank = logical_rank(x, in_dims[0])
        x, src = materialize(x, in_dims[0], info.batch_size), materialize(src, in_dims[1], info.batch_size)
        arguments = with_defaults(op, (x, src, *where))
        for place in dims:
            arguments[place + 2] = wrap_dim(arguments[place + 2], rank) + 1
        return run(*arguments), 0

    return scatter


def backward_rule(op: OpOverload, dims: Sequence[int]) -> Callable[..., Output]:
    """``op(grad, sizes, *where)``: zeros of these sizes, with the gradient in the view's place; likewise."""

    def backward(info: BatchInfo, in_dims: Dims, grad: Tensor, sizes: Any, *where: Any) -> Output:
        if len(sizes) == 0:
            raise RuleDeclined("an example of rank 0 has no dimensions")
        arguments = [to_front(grad, in_dims[0]), (info.batch_size, *sizes), *where]
        for place in dims:
            arguments[place + 2] = wrap_dim(arguments[place + 2], len(sizes)) + 1
        return op(*arguments), 0

    return backward


for _part in PARTS.values():
    if _part.backward is not None:
        BATCHING_RULES.add(_part.backward, backward_rule(_part.backward, _part.dims))
    if _part.scatter is not None:
        BATCHING_RULES.add(_part.scatter, scatter_rule(_part.scatter, _part.dims))
