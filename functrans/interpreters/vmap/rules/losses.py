"""Losses with a ``reduction``: elementwise below, then reduced within each example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import (
    RuleDeclined,
    argument_place,
    family,
    pad_rank,
    tensor_positions,
    with_defaults,
)
from functrans.interpreters.vmap.rules.folding import fold_n, unfold_n
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, logical_rank, materialize
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

NONE, MEAN, SUM = 0, 1, 2  # values of ``reduction``


def reduce_examples(values: Tensor, reduction: int) -> Tensor:
    """``[B, ...]`` reduced to ``[B]``, as ``reduction`` says."""
    if reduction == NONE:
        return values
    if values.dim() == 1:
        return values.clone()
    dims = list(range(1, values.dim()))
    return values.mean(dims) if reduction == MEAN else values.sum(dims)


# ---------------------------------------------------------------------------------------------------------------
# Elementwise losses


@family
def elementwise_loss(op: OpOverload, promotes: bool = True) -> Callable[..., tuple[Any, Any]]:
    """Losses of tensors that broadcast with each other.

    ``promotes``: the result has not just the dtype of the first one.
    """
    positions = tensor_positions(op)
    reduction_place = argument_place(op, "reduction")
    assert reduction_place is not None

    def loss(info: BatchInfo, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        arguments = with_defaults(op, args)
        dims = [*in_dims, *[None] * len(arguments)]
        align_examples(arguments, dims, positions, info.batch_size, promotes)
        reduction, arguments[reduction_place] = arguments[reduction_place], NONE
        return reduce_examples(op(*arguments), reduction), 0

    return loss


def align_examples(
    arguments: list[Any], in_dims: Sequence[Any], positions: Sequence[int], size: int, promotes: bool
) -> None:
    """Give the tensors at ``positions`` batch dimensions in front and one rank; the first two get one batch size."""
    places = [k for k in positions if arguments[k] is not None]
    mixed = promotes and len({arguments[k].dtype for k in places}) > 1
    if mixed and any(logical_rank(arguments[k], in_dims[k]) == 0 for k in places):
        raise RuleDeclined("a 0-d example takes another part in type promotion than its batch")
    rank = max(logical_rank(arguments[k], in_dims[k]) for k in places)
    for k in places:
        if in_dims[k] is not None:
            arguments[k] = pad_rank(arguments[k], in_dims[k], rank)
        elif k < 2:
            # Some of these losses want input and target in one shape.
            arguments[k] = pad_rank(materialize(arguments[k], None, size), 0, rank)


elementwise_loss(
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
)
elementwise_loss(aten.soft_margin_loss.default, promotes=False)


@family
def elementwise_loss_backward(op: OpOverload) -> Callable[..., tuple[Any, Any]]:
    """Backwards of elementwise losses: ``grad_output`` is one number per example, or elementwise if not reduced."""
    positions = tensor_positions(op)
    reduction_place = argument_place(op, "reduction")
    assert reduction_place is not None

    def loss_backward(info: BatchInfo, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        arguments = with_defaults(op, args)
        dims = [*in_dims, *[None] * len(arguments)]
        grad_output, x, target = arguments[:3]
        rank = logical_rank(x, dims[1])
        if logical_rank(target, dims[2]) != rank or len({grad_output.dtype, x.dtype, target.dtype}) > 1:
            raise RuleDeclined("broadcasting or promotion in the backward of a loss")
        for k in positions[1:]:
            if arguments[k] is not None:
                arguments[k] = pad_rank(materialize(arguments[k], dims[k], info.batch_size), 0, rank)
        cotangent = materialize(grad_output, dims[0], info.batch_size)
        reduction, arguments[reduction_place] = arguments[reduction_place], NONE
        if reduction == MEAN:
            cotangent = cotangent / max(example_numel(arguments[1]), 1)
        arguments[0] = pad_rank(cotangent, 0, rank).expand(arguments[1].shape) if rank else cotangent
        return op(*arguments), 0

    return loss_backward


def example_numel(x: Tensor) -> int:
    """Number of elements of one example of ``[B, ...]``."""
    count = 1
    for extent in x.shape[1:]:
        count = count * extent
    return count


elementwise_loss_backward(
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
    aten.soft_margin_loss_backward.default,
    aten.binary_cross_entropy_backward.default,
)


# ---------------------------------------------------------------------------------------------------------------
# Cross entropy


@batching_rule(aten.cross_entropy_loss.default)
def cross_entropy_loss_rule(
    info: BatchInfo,
    in_dims: Sequence[Any],
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, int]:
    """Folded into N, unreduced. The mean divides by the weights of the example's own targets."""
    size = info.batch_size
    x_dim, target_dim, weight_dim = (*in_dims, None)[:3]
    if weight_dim is not None:
        raise RuleDeclined("cross_entropy_loss with one set of class weights per example")
    rank = logical_rank(x, x_dim)
    class_probabilities = logical_rank(target, target_dim) == rank
    x, target = materialize(x, x_dim, size), materialize(target, target_dim, size)
    if class_probabilities and x.shape != target.shape:
        raise RuleDeclined("cross_entropy_loss refuses probabilities of another shape than the input")
    if not class_probabilities and target.is_floating_point():
        raise RuleDeclined("cross_entropy_loss refuses class indices that are not integers")
    classes = x.shape[1] if rank == 1 else x.shape[2]
    if rank == 1:
        losses = aten.cross_entropy_loss.default(x, target, weight, NONE, ignore_index, label_smoothing)
    else:
        n = x.shape[1]
        folded = fold_n(x, 0, size), fold_n(target, 0, size)
        losses = aten.cross_entropy_loss.default(*folded, weight, NONE, ignore_index, label_smoothing)
        losses = unfold_n(losses, size, n)
    if reduction == NONE:
        return losses, 0
    total = reduce_examples(losses, SUM)
    if reduction == SUM:
        return total, 0
    if class_probabilities:
        return total / (example_numel(x) // classes), 0
    counted = target != ignore_index
    if weight is None:
        shares = counted.to(losses.dtype)
    else:
        indices = torch.where(counted, target, 0)
        shares = torch.where(counted, weight.index_select(0, indices.reshape(-1)).reshape(indices.shape), 0)
    return total / reduce_examples(shares, SUM), 0
