"""``ctc_loss`` in pieces, and its derivative.

PyTorch's own definition makes a tensor of the lengths and reads it, which inside a transform has no numbers to be read.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative

aten = torch.ops.aten

MEAN, SUM = 1, 2


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = MEAN,
    zero_infinity: bool = False,
) -> Tensor:
    """As PyTorch defines it, by its own kernel on every device; lengths are lists or tensors."""
    batched = log_probs.dim() == 3
    if not batched:
        log_probs = log_probs.unsqueeze(1)
    targets = targets.to(log_probs.device, torch.int64)
    losses = aten._ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
    if zero_infinity:
        losses = torch.where(losses == math.inf, 0, losses)
    if reduction == MEAN:
        if isinstance(target_lengths, Tensor):
            lengths = target_lengths.to(losses.device, losses.dtype).clamp(min=1)
        else:
            lengths = losses.new_tensor([max(n, 1) for n in target_lengths])
        return (losses / lengths).mean()
    if reduction == SUM:
        return losses.sum()
    return losses if batched else losses.squeeze(0)


NAMES = ("log_probs", "targets", "input_lengths", "target_lengths")


def pulled(v: dict[str, Any], grad: Tensor) -> Tensor:
    """PyTorch's kernel gives the gradient of what went into ``log_softmax``, which is more by ``exp(log_probs)``.

    (A. Graves et al., Connectionist temporal classification, 2006, equation 16.) Behind a ``log_softmax`` both are the
    same.
    """
    (losses, log_alpha), options = v["results"], (v["blank"], v["zero_infinity"])
    found = aten._ctc_loss_backward(grad, *(v[n] for n in NAMES), losses, log_alpha, *options)
    log_probs, lengths = v["log_probs"], v["input_lengths"]
    lengths = lengths.to(losses.device) if isinstance(lengths, Tensor) else torch.tensor(lengths, device=losses.device)
    read = torch.arange(log_probs.shape[0], device=losses.device).unsqueeze(1) < lengths
    if v["zero_infinity"]:
        read = read & (losses != math.inf)
    return found - torch.where(read.unsqueeze(2), log_probs.exp() * grad.unsqueeze(1), 0)


def ctc_loss_tangent(v: dict[str, Any]) -> tuple[Tensor, None]:
    """Each loss is of one sequence, and one pullback gives the gradients of all."""
    slopes = pulled(v, torch.ones_like(v["results"][0]))
    return (slopes * v["log_probs_t"]).sum((0, 2)), None


for _op, _lengths in ((aten._ctc_loss.default, aten.ctc_loss.IntList), (aten._ctc_loss.Tensor, aten.ctc_loss.Tensor)):
    DECOMPOSITIONS.add(_lengths, ctc_loss)
    derivative(
        _op,
        tangent=with_names((*NAMES, "blank", "zero_infinity", "results", "log_probs_t"), ctc_loss_tangent),
        log_probs=with_names(
            ("grads", *NAMES, "blank", "zero_infinity", "results"), lambda v: pulled(v, v["grads"][0])
        ),
    )
