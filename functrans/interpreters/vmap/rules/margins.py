"""Batching rules of the margin losses over classes: the kernels without a reduction take the batch as more examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import (
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_rank,
    logical_shape,
    materialize,
)

aten = torch.ops.aten
NONE, MEAN = 0, 1


def rows(info: BatchInfo, x: Tensor, bdim: int | None, rank: int) -> Tensor:
    """The examples, which are of ``rank`` or of one less, as one of ``rank``."""
    if logical_rank(x, bdim) not in (rank - 1, rank) or info.batch_size == 0:
        raise RuleDeclined("a margin loss takes one example, or a batch of them")
    x = materialize(x, bdim, info.batch_size)
    return x if x.dim() == rank else x.flatten(0, 1)


def vector(x: Tensor, bdim: int | None) -> Tensor:
    """The kernels take an example without dimensions for one of one class."""
    return x if logical_rank(x, bdim) else x.unsqueeze(-1)


def like(out: Tensor, x: Tensor, bdim: int | None) -> Tensor:
    """The result of an example of which ``vector`` made one."""
    return out if logical_rank(x, bdim) else out.squeeze(-1)


def expect_fit(x: Tensor, x_dim: int | None, target: Tensor, target_dim: int | None, rank: int) -> None:
    """Decline targets that the kernel would take for those of other examples, or refuse."""
    shape, kinds = logical_shape(x, x_dim), logical_shape(target, target_dim)
    if kinds != (shape if rank == 2 else shape[:-1]):
        raise RuleDeclined("targets that do not fit")


def reduced(info: BatchInfo, losses: Tensor, rank: int, reduction: int) -> Tensor:
    """Per example, of ``rank``, what the reduction makes of its losses."""
    if rank == 1:
        return losses
    losses = losses.unflatten(0, (info.batch_size, losses.shape[0] // info.batch_size))
    return losses if reduction == NONE else losses.mean(1) if reduction == MEAN else losses.sum(1)


def spread(info: BatchInfo, grad: Tensor, bdim: int | None, count: int, rank: int, reduction: int) -> Tensor:
    """The cotangent of each loss."""
    grad = materialize(grad, bdim, info.batch_size)
    if rank == 2 and reduction != NONE:
        grad = (grad / count if reduction == MEAN else grad).unsqueeze(1).expand(info.batch_size, count)
    return grad.reshape(-1)


def unfolded(info: BatchInfo, x: Tensor, rank: int) -> Tensor:
    """The inverse of ``rows``, for examples of ``rank``."""
    return x if rank == 1 else x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size))


@batching_rule(aten.multi_margin_loss.default)
def multi_margin_loss(
    info: BatchInfo,
    in_dims: Dims,
    x: Tensor,
    target: Tensor,
    p: Any = 1,
    margin: Any = 1,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Output:
    """Class weights are shared."""
    if weight is not None and in_dims[4] is not None:
        raise RuleDeclined("class weights of each example's own")
    x = vector(x, in_dims[0])
    expect_fit(x, in_dims[0], target, in_dims[1], 1)
    rank = logical_rank(x, in_dims[0])
    inputs = rows(info, x, in_dims[0], 2), rows(info, target, in_dims[1], 1)
    return reduced(info, aten.multi_margin_loss.default(*inputs, p, margin, weight, NONE), rank, reduction), 0


@batching_rule(aten.multi_margin_loss_backward.default)
def multi_margin_loss_backward(
    info: BatchInfo,
    in_dims: Dims,
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    p: Any,
    margin: Any,
    weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Output:
    """As the loss."""
    if weight is not None and in_dims[5] is not None:
        raise RuleDeclined("class weights of each example's own")
    given, x = x, vector(x, in_dims[1])
    expect_fit(x, in_dims[1], target, in_dims[2], 1)
    rank = logical_rank(x, in_dims[1])
    inputs = rows(info, x, in_dims[1], 2), rows(info, target, in_dims[2], 1)
    each = spread(info, grad, in_dims[0], inputs[0].shape[0] // info.batch_size, rank, reduction)
    out = aten.multi_margin_loss_backward.default(each, *inputs, p, margin, weight, NONE)
    return like(unfolded(info, out, rank), given, in_dims[1]), 0


@batching_rule(aten.multilabel_margin_loss_forward.default)
def multilabel_margin_loss(info: BatchInfo, in_dims: Dims, x: Tensor, target: Tensor, reduction: int) -> Output:
    """Losses, and which classes are targets."""
    x, given, target = vector(x, in_dims[0]), target, vector(target, in_dims[1])
    expect_fit(x, in_dims[0], target, in_dims[1], 2)
    rank = logical_rank(x, in_dims[0])
    inputs = rows(info, x, in_dims[0], 2), rows(info, target, in_dims[1], 2)
    losses, chosen = aten.multilabel_margin_loss_forward.default(*inputs, NONE)
    return (reduced(info, losses, rank, reduction), like(unfolded(info, chosen, rank), given, in_dims[1])), (0, 0)


@batching_rule(aten.multilabel_margin_loss_backward.default)
def multilabel_margin_loss_backward(
    info: BatchInfo, in_dims: Dims, grad: Tensor, x: Tensor, target: Tensor, reduction: int, chosen: Tensor
) -> Output:
    """As the loss."""
    given, x, target, chosen = x, vector(x, in_dims[1]), vector(target, in_dims[2]), vector(chosen, in_dims[4])
    expect_fit(x, in_dims[1], target, in_dims[2], 2)
    rank = logical_rank(x, in_dims[1])
    inputs = [rows(info, v, d, 2) for v, d in ((x, in_dims[1]), (target, in_dims[2]), (chosen, in_dims[4]))]
    each = spread(info, grad, in_dims[0], inputs[0].shape[0] // info.batch_size, rank, reduction)
    out = aten.multilabel_margin_loss_backward.default(each, *inputs[:2], NONE, inputs[2])
    return like(unfolded(info, out, rank), given, in_dims[1]), 0
