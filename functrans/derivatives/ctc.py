"""``ctc_loss`` in pieces, and its derivatives.

PyTorch's own definition makes a tensor of the lengths and reads it, which inside a transform has no numbers to be read;
and its gradient, a kernel, has no derivative.
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


# ------------------------------------------------------------------------------------- second and higher orders

#: The logarithm of a probability of 0 that has a derivative, 0.
NEVER = -1e30


class Paths:
    """The states of each sequence, which are its labels with a blank around each, and the steps between them.

    Attributes:
        labels: ``[N, S]``, the label of each state.
        first: ``[S]``, whether a path may begin in this state.
        last: ``[N, S]``, whether a path may end in this state.
        skips: ``[N, S]``, whether a path may come from two states before.
    """

    def __init__(self, targets: Tensor, target_lengths: Any, blank: int) -> None:
        counts = counted(target_lengths, targets).unsqueeze(1)
        if targets.dim() == 1:  # one sequence after the other
            longest = targets.shape[0] if isinstance(target_lengths, Tensor) else max(target_lengths, default=0)
            places = counts.cumsum(0) - counts + torch.arange(longest, device=targets.device)
            padded = torch.cat([targets, targets.new_full((1,), blank)])
            targets = padded[places.clamp(max=targets.shape[0])]
        blanks = torch.full_like(targets, blank)
        self.labels = torch.cat([torch.stack([blanks, targets], 2).flatten(1), torch.full_like(counts, blank)], 1)
        states = torch.arange(self.labels.shape[1], device=targets.device)
        self.last = (states == 2 * counts) | (states == 2 * counts - 1)
        self.first = states < 2
        self.skips = (states > 1) & (self.labels != blank) & (self.labels != self.labels.roll(2, 1))


def counted(lengths: Any, like: Tensor) -> Tensor:
    return (
        lengths.to(like.device, torch.int64)
        if isinstance(lengths, Tensor)
        else torch.tensor(list(lengths), device=like.device)
    )


def shifted(x: Tensor, by: int) -> Tensor:
    """``x[:, s - by]``, and never where there is no such state."""
    never = torch.full_like(x[:, : abs(by)], NEVER)
    return torch.cat([never, x[:, : x.shape[1] - by]], 1) if by > 0 else torch.cat([x[:, -by:], never], 1)


def frequencies(log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int) -> Tensor:
    """``[T, N, C]``: how often each label is read at each time, over all paths, by forward and backward sums.

    That is the derivative of the logarithm of the sum over all paths.
    """
    paths, ends = Paths(targets, target_lengths, blank), counted(input_lengths, targets).unsqueeze(1)
    times = log_probs.shape[0]
    labels = paths.labels.expand(times, *paths.labels.shape)
    emitted = log_probs.clamp(min=NEVER).gather(2, labels)
    before = [torch.where(paths.first, emitted[0], NEVER)]
    for t in range(1, times):
        x = before[-1]
        steps = torch.stack([x, shifted(x, 1), torch.where(paths.skips, shifted(x, 2), NEVER)])
        before.append(emitted[t] + steps.logsumexp(0))
    ending = torch.where(paths.last, torch.zeros_like(emitted[0]), NEVER)
    after = [ending]
    for t in range(times - 2, -1, -1):
        x = emitted[t + 1] + after[-1]
        steps = torch.stack([x, shifted(x, -1), shifted(torch.where(paths.skips, x, NEVER), -2)])
        after.append(torch.where(ends == t + 1, ending, steps.logsumexp(0)))
    states = (torch.stack(before) + torch.stack(after[::-1])).softmax(2)
    return torch.zeros_like(log_probs).scatter_add(2, labels, states)


def ctc_loss_backward(
    grad: Tensor,
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    neg_log_likelihood: Tensor,
    log_alpha: Tensor,
    blank: int,
    zero_infinity: bool = False,
) -> Tensor:
    """The kernel's gradient in differentiable operators.

    Like the kernel it is the gradient for log-probabilities that are normalized: ``exp(log_probs)`` is what
    ``log_softmax`` takes out.
    """
    slopes = log_probs.exp() - frequencies(log_probs, targets, input_lengths, target_lengths, blank)
    slopes = torch.where(neg_log_likelihood.unsqueeze(1) == math.inf, 0 if zero_infinity else math.nan, slopes)
    times = torch.arange(log_probs.shape[0], device=log_probs.device)[:, None, None]
    return torch.where(times < counted(input_lengths, targets).unsqueeze(1), grad.unsqueeze(1) * slopes, 0)


DECOMPOSITIONS.add(aten._ctc_loss_backward.default, ctc_loss_backward)
DECOMPOSITIONS.add(aten._ctc_loss_backward.Tensor, ctc_loss_backward)
