"""Batching rules of the CTC loss: the batch joins the sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BatchInfo, Dims, Output, batching_rule, logical_rank, materialize

aten = torch.ops.aten


def sequences(info: BatchInfo, in_dims: Dims, args: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Log-probabilities ``[T, B * N, C]``, and targets and lengths of as many sequences."""
    size = info.batch_size
    log_probs, targets, *lengths = args
    if size == 0 or logical_rank(log_probs, in_dims[0]) != 3:
        raise RuleDeclined("ctc_loss of no examples, or one without sequences")
    rank = logical_rank(targets, in_dims[1])
    log_probs = materialize(log_probs, in_dims[0], size).transpose(0, 1)
    log_probs = log_probs.reshape(log_probs.shape[0], size * log_probs.shape[2], log_probs.shape[3])
    targets = materialize(targets, in_dims[1], size)
    targets = targets.flatten(0, 1) if rank == 2 else targets.reshape(-1)
    input_lengths, target_lengths = (
        materialize(given, d, size).reshape(-1) if isinstance(given, Tensor) else list(given) * size
        for given, d in zip(lengths, in_dims[2:4])
    )
    return log_probs, targets, input_lengths, target_lengths


@batching_rule(aten._ctc_loss.default, aten._ctc_loss.Tensor)
def ctc_loss(
    info: BatchInfo,
    in_dims: Dims,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    *rest: Any,
) -> Output:
    """Losses, and the forward variables that the backward pass takes up."""
    folded = sequences(info, in_dims, (log_probs, targets, input_lengths, target_lengths))
    losses, log_alpha = aten._ctc_loss(*folded, *rest)
    count = losses.shape[0] // info.batch_size
    return tuple(x.unflatten(0, (info.batch_size, count)) for x in (losses, log_alpha)), (0, 0)


@batching_rule(aten._ctc_loss_backward.default, aten._ctc_loss_backward.Tensor)
def ctc_loss_backward(
    info: BatchInfo,
    in_dims: Dims,
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    losses: Tensor,
    log_alpha: Tensor,
    *rest: Any,
) -> Output:
    """As the loss."""
    size = info.batch_size
    folded = sequences(info, in_dims[1:], (log_probs, targets, input_lengths, target_lengths))
    grad, losses, log_alpha = (
        materialize(x, d, size).flatten(0, 1)
        for x, d in ((grad, in_dims[0]), (losses, in_dims[5]), (log_alpha, in_dims[6]))
    )
    out = aten._ctc_loss_backward(grad, *folded, losses, log_alpha, *rest)
    return out.unflatten(1, (size, out.shape[1] // size)), 1
