"""What depends on nothing, or on what stands at its place."""

from __future__ import annotations

from typing import Any

import torch

from functrans.shipped.sparsity_level import OperatorCall, everything, nothing, pattern_of, pointwise

aten = torch.ops.aten


pattern_of(
    aten.detach.default, aten.ceil.default, aten.floor.default, aten.round.default, aten.round.decimals,
    aten.trunc.default, aten.sign.default,
)(nothing)  # fmt: skip
pattern_of(
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default, aten.to.dtype,
    aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.conj.default, aten._conj.default,
    aten.conj_physical.default, aten._conj_physical.default, aten.resolve_conj.default, aten.resolve_neg.default,
    aten._neg_view.default, aten.real.default, aten.imag.default, aten.sigmoid_backward.default,
    aten.native_dropout.default, aten.native_dropout_backward.default, aten.lift_fresh_copy.default,
)(pointwise)  # fmt: skip


@pattern_of(
    aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default,
)  # fmt: skip
def loss(call: OperatorCall) -> Any:
    return pointwise(call) if call["reduction"] == 0 else everything(call)


@pattern_of(aten.where.self)
def where(call: OperatorCall) -> Any:
    """One branch where the condition is the same for all inputs, else both."""
    condition = call.known(call["condition"])
    if condition is None:
        return pointwise(call)
    return torch.where(condition, call.numbers(call["self"]), call.numbers(call["other"]))


@pattern_of(aten.masked_fill.Scalar)
def masked_fill(call: OperatorCall) -> Any:
    mask = call.known(call["mask"])
    return pointwise(call) if mask is None else torch.where(mask, 0, call.numbers(call["self"]))


@pattern_of(aten.copy.default)
def copy(call: OperatorCall) -> Any:
    return call.numbers(call["src"])


@pattern_of(aten.fill.Tensor)
def fill(call: OperatorCall) -> Any:
    return call.numbers(call["value"])
