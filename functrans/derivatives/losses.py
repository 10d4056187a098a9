"""Derivatives of losses.

Most losses are a pointwise function of input, target and weights, then a reduction. ``pointwise_loss`` takes the
partial derivatives of the pointwise function alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from functrans.decompositions.table import DECOMPOSITIONS, DEFINED_LATE
from functrans.derivatives.helpers import cast, conj, sum_to_shape, wide
from functrans.derivatives.named import no_cotangent, with_names
from functrans.derivatives.table import derivative
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2

Partial = Callable[..., Tensor]


def pointwise_loss(op: OpOverload, **partials: Partial) -> None:
    """Add an entry for a loss: ``partials`` are the derivatives of one element, by argument.

    Every partial takes the operator's arguments (without ``reduction``) by position.
    """
    names = [a.name for a in op._schema.arguments if a.name != "reduction"]

    def shape_of(values: dict[str, Any]) -> torch.Size:
        return broadcast_shapes(*(v.shape for n in names if isinstance(v := values[n], Tensor)))

    def reverse(name: str, partial: Partial) -> Callable[..., Any]:
        def cotangent(v: dict[str, Any]) -> Tensor:
            grad, slope = v["grad"], conj(partial(*(v[n] for n in names)))
            if v["reduction"] != NONE:
                shape = shape_of(v)
                if v["reduction"] == MEAN:
                    grad = grad / math.prod(shape)
                if slope.shape != shape:
                    grad = grad.expand(shape)
            return cast(sum_to_shape(grad * slope, v[name].shape), v[name].dtype)

        return with_names(("grad", "reduction", *names), cotangent)

    def tangent(v: dict[str, Any]) -> Tensor | None:
        moved = None
        for name, partial in partials.items():
            if v[f"{name}_t"] is not None:
                term = partial(*(v[n] for n in names)) * v[f"{name}_t"]
                moved = term if moved is None else moved + term
        if moved is None or v["reduction"] == NONE:
            return moved
        shape = shape_of(v)
        if moved.shape != shape:
            moved = moved.expand(shape)
        return moved.mean() if v["reduction"] == MEAN else moved.sum()

    derivative(
        op,
        tangent=with_names(("reduction", *names, *(f"{n}_t" for n in partials)), tangent),
        **{name: reverse(name, partial) for name, partial in partials.items()},  # type: ignore[arg-type]
    )


def difference(a: Tensor, b: Tensor) -> Tensor:
    """``a - b``, where one may be truth values, which PyTorch does not subtract."""
    return (a.to(b.dtype) if a.dtype is torch.bool else a) - (b.to(a.dtype) if b.dtype is torch.bool else b)


def of_difference(op: OpOverload, slope: Callable[..., Tensor]) -> None:
    """A loss of ``self - target``."""
    pointwise_loss(
        op,
        self=lambda self, target, *options: slope(difference(self, target), *options),
        target=lambda self, target, *options: slope(difference(target, self), *options),
    )


def smooth_l1_slope(difference: Tensor, beta: float) -> Tensor:
    return difference.sign() if beta == 0 else (difference / beta).clamp(-1, 1)


of_difference(aten.mse_loss.default, lambda difference: 2 * difference)
of_difference(aten.smooth_l1_loss.default, smooth_l1_slope)
of_difference(aten.huber_loss.default, lambda difference, delta: difference.clamp(-delta, delta))

# log(1 + exp(-target self))


def soft_margin_self(self: Tensor, target: Tensor) -> Tensor:
    """Labels may be of a type without signs."""
    self, target = wide(self), wide(target)
    return -target * torch.sigmoid(-target * self)


pointwise_loss(
    aten.soft_margin_loss.default,
    self=soft_margin_self,
    target=lambda self, target: soft_margin_self(target, self),
)


# ---------------------------------------------------------------------------------------------- binary cross entropy


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def bce_self(self: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    return weighted((self - target) / (self * (1 - self)).clamp(1e-12), weight)


def bce_target(self: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    return weighted((-self).log1p().clamp(-100) - self.log().clamp(-100), weight)


def bce_weight(self: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (target - 1) * (-self).log1p().clamp(-100) - target * self.log().clamp(-100)


pointwise_loss(aten.binary_cross_entropy.default, self=bce_self, target=bce_target, weight=bce_weight)


# (1 - target) self - (1 + (pos_weight - 1) target) logsigmoid(self)


def bce_logits_self(self: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
    if pos_weight is None:
        return weighted(self.sigmoid() - target, weight)
    log_weight = 1 + (pos_weight - 1) * target
    return weighted(1 - target - log_weight * (-self).sigmoid(), weight)


def bce_logits_target(self: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None) -> Tensor:
    return weighted(-self if pos_weight is None else -self - (pos_weight - 1) * logsigmoid(self), weight)


def bce_logits_weight(self: Tensor, target: Tensor, weight: Tensor, pos_weight: Tensor | None) -> Tensor:
    log_weight = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    return (1 - target) * self - log_weight * logsigmoid(self)


def bce_logits_pos_weight(self: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor) -> Tensor:
    return weighted(-target * logsigmoid(self), weight)


pointwise_loss(
    aten.binary_cross_entropy_with_logits.default,
    self=bce_logits_self,
    target=bce_logits_target,
    weight=bce_logits_weight,
    pos_weight=bce_logits_pos_weight,
)


# ---------------------------------------------------------------------------------------------- negative log likelihood


def nll_entries(forward: OpOverload, backward: OpOverload) -> None:
    """Entries for an operator that is linear in ``self`` and for its transpose.

    As in PyTorch, the class weights are constants, and so is their total.
    """

    def self_cotangent(grads, self, target, weight, reduction, ignore_index, results):
        if grads[0] is None:
            return None
        return backward(grads[0], self, target, weight, reduction, ignore_index, results[1])

    def tangent(target, weight, reduction, ignore_index, self_t):
        return forward(self_t, target, weight, reduction, ignore_index)[0], None

    def grad_output(grad, target, weight, reduction, ignore_index):
        return forward(grad, target, weight, reduction, ignore_index)[0]

    def backward_tangent(self, target, weight, reduction, ignore_index, total_weight, grad_output_t):
        if grad_output_t is None:
            return None
        return backward(grad_output_t, self, target, weight, reduction, ignore_index, total_weight)

    derivative(forward, tangent=tangent, self=self_cotangent)
    derivative(
        backward, tangent=backward_tangent, grad_output=grad_output, self=no_cotangent, total_weight=no_cotangent
    )


nll_entries(aten.nll_loss_forward.default, aten.nll_loss_backward.default)
nll_entries(aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default)


# The same with class weights that are followed, for which PyTorch has no formula: in forward mode it drops their
# tangent (torch 2.13).


def class_weights(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The targets as an index along the classes of ``x``, and the weight of each, 0 where it is ignored."""
    counted = target != ignore_index
    index = torch.where(counted, target, 0)
    chosen = (
        x.new_ones(target.shape) if weight is None else weight.index_select(0, index.reshape(-1)).reshape(target.shape)
    )
    return index.unsqueeze(class_dim(x)), torch.where(counted, chosen, 0)


def class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def nll(
    self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> tuple[Tensor, Tensor]:
    if self.dim() == 1:
        target = target.reshape(())
    index, weights = class_weights(self, target, weight, ignore_index)
    picked = self.gather(class_dim(self), index).squeeze(class_dim(self))
    losses = -weights * torch.where(target != ignore_index, picked, 0)
    if reduction == NONE and self.dim() > 1:
        return losses, self.new_zeros(())
    total = weights.sum()
    return losses if reduction == NONE else losses.sum() / total if reduction == MEAN else losses.sum(), total


def nll_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Tensor:
    if self.dim() == 1:
        target = target.reshape(())
    index, weights = class_weights(self, target, weight, ignore_index)
    given = -weights * (grad_output / total_weight if reduction == MEAN else grad_output)
    return torch.zeros_like(self).scatter(class_dim(self), index, given.unsqueeze(class_dim(self)))


for _forward, _backward in (
    (aten.nll_loss_forward.default, aten.nll_loss_backward.default),
    (aten.nll_loss2d_forward.default, aten.nll_loss2d_backward.default),
):
    DECOMPOSITIONS.add(_forward, nll)
    DECOMPOSITIONS.add(_backward, nll_backward)


# ---------------------------------------------------------------------------------------------- margins between classes


def multi_margin_loss(
    self: Tensor, target: Tensor, p: Any = 1, margin: Any = 1, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """PyTorch has its gradient by ``self`` alone, and none by the class weights."""
    x, labels = self.reshape(target.numel(), -1), target.reshape(-1, 1)
    gaps = (margin - x.gather(1, labels) + x).relu().pow(p)
    gaps = gaps.scatter(1, labels, 0)
    if weight is not None:
        gaps = gaps * weight.index_select(0, labels.reshape(-1)).unsqueeze(1)
    losses = gaps.mean(1)
    return losses.reshape(target.shape) if reduction == NONE else losses.mean() if reduction == MEAN else losses.sum()


DECOMPOSITIONS.add(aten.multi_margin_loss.default, multi_margin_loss)


# ---------------------------------------------------------------------------------------------- cross entropy

# The chunked forms of F.linear_cross_entropy compute gradients ahead, in their forward, as numbers without a derivative
# of their own.

REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def chunked_reduced(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    *chunking: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = linear(input, linear_weight, linear_bias)
    out = aten.cross_entropy_loss.default(logits, target, weight, REDUCTIONS[reduction], ignore_index, label_smoothing)
    return out, input.new_empty(0), input.new_empty(0), input.new_empty(0)


def chunked_unreduced(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    *chunking: Any,
) -> Tensor:
    logits = linear(input, linear_weight, linear_bias)
    return aten.cross_entropy_loss.default(logits, target, weight, NONE, ignore_index)


DEFINED_LATE["torch_nn::_linear_cross_entropy_batch_chunked"] = chunked_reduced
DEFINED_LATE["torch_nn::_linear_cross_entropy_batch_chunked_no_reduction"] = chunked_unreduced
