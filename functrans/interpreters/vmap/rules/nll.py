"""Batching rules of the negative log likelihood.

The kernel without a reduction takes the batch as more examples; what it leaves to do is a sum for each. Class weights
of each example's own are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined, flat_examples
from functrans.interpreters.vmap.table import BatchInfo, Dims, Output, batching_rule, logical_shape, materialize

aten = torch.ops.aten
NONE, MEAN = 0, 1


def foldable(info: BatchInfo, in_dims: Dims, x: Tensor, target: Tensor) -> bool:
    """Whether there are examples, of the shapes that PyTorch takes; only inputs of their own are folded."""
    if in_dims[0] is None or in_dims[2] is not None or info.batch_size == 0:
        return False
    shape, kinds = logical_shape(x, in_dims[0]), logical_shape(target, in_dims[1])
    return kinds == (shape[:-1] if len(shape) < 2 else shape[:1] + shape[2:]) and len(shape) in (1, 2, 4)


def folded(x: Tensor, bdim: int | None, size: int, rank: int) -> Tensor:
    """The batch as the first dimension of an example of ``rank``, or in front of one with a dimension less."""
    x = materialize(x, bdim, size)
    return x if x.dim() == rank else x.reshape(size * x.shape[1], *x.shape[2:])


def operators(rank: int) -> tuple[Any, Any]:
    """Forward and backward, for classes alone or with an image behind them."""
    if rank == 4:
        return aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default
    return aten.nll_loss_forward.default, aten.nll_loss_backward.default


def folded_forward(
    info: BatchInfo, in_dims: Dims, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: Any
) -> Output:
    """The losses, their sums, and the sums of their weights."""
    size = info.batch_size
    x, target = materialize(x, in_dims[0], size), materialize(target, in_dims[1], size)
    rank = 4 if x.dim() == 5 else 2
    x, flat = folded(x, 0, size, rank), folded(target, 0, size, rank - 1)
    losses = operators(rank)[0](x, flat, weight, NONE, ignore_index)[0]
    if reduction == NONE and target.dim() > 1:
        return (losses.reshape(target.shape), x.new_zeros(())), (0, None)
    counted = target != ignore_index
    if weight is None:
        total = flat_examples(counted, 0).sum(1, dtype=x.dtype)
    else:
        scale = weight.take(torch.where(counted, target, 0))
        total = flat_examples(torch.where(counted, scale, 0), 0).sum(1)
    loss = losses if target.dim() == 1 else losses.reshape(size, losses.numel() // size).sum(1)
    return (loss / total if reduction == MEAN else loss, total), (0, 0)


def folded_backward(
    info: BatchInfo,
    in_dims: Dims,
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: Any,
    total_weight: Tensor,
) -> Output:
    """The cotangent of an example's loss is that of each of its terms."""
    size = info.batch_size
    grad, target = materialize(grad, in_dims[0], size), materialize(target, in_dims[2], size)
    rank = 4 if x.dim() - (in_dims[1] is not None) == 4 else 2
    if reduction == MEAN:
        grad = grad / materialize(total_weight, in_dims[6], size)
    if grad.dim() < target.dim():
        grad = pad_rank_right(grad, target.dim()).expand(target.shape)
    x, flat, grad = (
        folded(*v) for v in ((x, in_dims[1], size, rank), (target, 0, size, rank - 1), (grad, 0, size, rank - 1))
    )
    total = x.new_ones(())  # not looked at
    out = operators(rank)[1](grad, x, flat, weight, NONE, ignore_index, total)
    return out if target.dim() == rank - 1 else out.unflatten(0, (size, out.shape[0] // size)), 0


def class_weights(
    info: BatchInfo, in_dims: Dims, x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Log-probabilities; targets with a class dimension, their weights, which are ignored; the place of the classes."""
    x, target = materialize(x, in_dims[0], info.batch_size), materialize(target, in_dims[1], info.batch_size)
    place = 1 if x.dim() == 2 else 2
    if x.dim() > 2 and target.dim() != x.dim() - 1 or x.dim() == 2 and target.dim() > 2 or x.dim() < 2:
        raise RuleDeclined("nll_loss: sizes of the input and target do not fit")
    if x.dim() == 2 and target.dim() == 2:
        raise RuleDeclined("nll_loss: one example with a vector of targets")
    target = target.unsqueeze(place)
    if target.shape[:place] != x.shape[:place] or target.shape[place + 1 :] != x.shape[place + 1 :]:
        raise RuleDeclined("nll_loss: sizes of the input and target do not fit")
    ignored = target == ignore_index
    target = target.long().masked_fill(ignored, 0)
    if weight is None:
        scale = x.new_ones(()).expand(target.shape)
    else:
        weight = materialize(weight, in_dims[2], info.batch_size)
        classes = [1] * x.dim()
        classes[0], classes[place] = weight.shape
        scale = weight.view(classes).expand(x.shape).gather(place, target)
    return x, target, scale, ignored, place


@batching_rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def nll_loss_forward(
    info: BatchInfo, in_dims: Dims, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: Any
) -> Output:
    """The weighted sum of the targets' log-probabilities, and the total weight."""
    if foldable(info, in_dims, x, target):
        return folded_forward(info, in_dims, x, target, weight, reduction, ignore_index)
    x, target, scale, ignored, place = class_weights(info, in_dims, x, target, weight, ignore_index)
    # An ignored target adds nothing, not even the nan of an infinite input.
    scale = scale.masked_fill(ignored, 0)
    losses = (-(x.gather(place, target) * scale)).masked_fill(ignored, 0)
    if reduction == NONE and x.dim() > 2:
        return (losses.squeeze(place), x.new_zeros(())), (0, None)
    total, loss = flat_examples(scale, 0).sum(1), flat_examples(losses, 0).sum(1)
    return (loss / total if reduction == MEAN else loss, total), (0, 0)


@batching_rule(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def nll_loss_backward(
    info: BatchInfo,
    in_dims: Dims,
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: Any,
    total_weight: Tensor,
) -> Output:
    """The gradient goes to the targets."""
    if foldable(info, in_dims[1:], x, target):
        given = (grad, x, target, weight, reduction, ignore_index, total_weight)
        return folded_backward(info, in_dims, *given)
    x, target, scale, ignored, place = class_weights(info, in_dims[1:], x, target, weight, ignore_index)
    grad = materialize(grad, in_dims[0], info.batch_size)
    if reduction == NONE:
        grad = grad.unsqueeze(place)
    else:
        if reduction == MEAN:
            grad = grad / materialize(total_weight, in_dims[6], info.batch_size)
        grad = pad_rank_right(grad, x.dim())
    values = (-scale * grad).masked_fill(ignored, 0)
    return torch.scatter(torch.zeros_like(x), place, target, values), 0


def pad_rank_right(x: Tensor, rank: int) -> Tensor:
    """Dimensions of size 1 at the end."""
    return x.reshape(*x.shape, *[1] * (rank - x.dim()))
