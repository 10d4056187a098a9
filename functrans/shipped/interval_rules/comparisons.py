"""Comparisons, whose results lie between False and True, and what is chosen by them."""

from __future__ import annotations

from typing import Any

import torch

from functrans.extension.missing_rule import missing_rule_error
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import IntervalLevel, both, ends, rule
from functrans.shipped.interval_rules.pointwise import increasing

aten = torch.ops.aten


def comparing(op: OpOverload, greater: bool) -> None:
    @rule(op)
    def compare(level: IntervalLevel, x: Any, y: Any) -> Any:
        (a, b), (c, d) = ends(x), both(y)
        surely, maybe = (op(a, d), op(b, c)) if greater else (op(b, c), op(a, d))
        return level.between(surely, maybe)


for _op in (aten.gt.Tensor, aten.gt.Scalar, aten.ge.Tensor, aten.ge.Scalar):
    comparing(_op, greater=True)
for _op in (aten.lt.Tensor, aten.lt.Scalar, aten.le.Tensor, aten.le.Scalar):
    comparing(_op, greater=False)


@rule(aten.eq.Tensor, aten.eq.Scalar)
def equal(level: IntervalLevel, x: Any, y: Any) -> Any:
    (a, b), (c, d) = both(x), both(y)
    if x is y:
        return level.constant(~(a.isnan() | b.isnan()))
    return level.between((a == b) & (c == d) & (a == c), (a <= d) & (b >= c))


@rule(aten._local_scalar_dense.default)
def number(level: IntervalLevel, x: Any) -> Any:
    """A number that is read, as by ``if x > 0``, is known where both ends agree."""
    low, high = (aten._local_scalar_dense.default(end) for end in ends(x))
    if low != high:
        raise missing_rule_error(level, aten._local_scalar_dense.default)
    return low


increasing(aten._is_all_true.default, aten._is_any_true.default)


def of_all(op: OpOverload) -> None:
    """A truth value of many, or of numbers that are not 0."""

    @rule(op)
    def of_these(level: IntervalLevel, x: Any, *args: Any) -> Any:
        surely, maybe = ends(x if x.dtype is torch.bool else unequal(level, x, 0))
        return level.between(op(surely, *args), op(maybe, *args))


for _op in (
    aten.all.default, aten.any.default, aten.all.dim, aten.any.dim, aten.all.dims, aten.any.dims,
):  # fmt: skip
    of_all(_op)


@rule(aten.ne.Tensor, aten.ne.Scalar)
def unequal(level: IntervalLevel, x: Any, y: Any) -> Any:
    surely, maybe = ends(equal(level, x, y))
    return level.between(~maybe, ~surely)


def of_truth_values(op: OpOverload) -> None:
    """``op`` is monotone in truth values; of other integers nothing is said."""

    @rule(op)
    def connective(level: IntervalLevel, x: Any, y: Any) -> Any:
        if x.dtype != torch.bool or y.dtype != torch.bool:
            raise missing_rule_error(level, op)
        (a, b), (c, d) = ends(x), ends(y)
        return level.between(op(a, c), op(b, d))


for _op in (aten.logical_and.default, aten.logical_or.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor):
    of_truth_values(_op)


@rule(aten.logical_not.default, aten.bitwise_not.default)
def negation(level: IntervalLevel, x: Any) -> Any:
    if x.dtype != torch.bool:
        raise missing_rule_error(level, aten.logical_not.default)
    surely, maybe = ends(x)
    return level.between(~maybe, ~surely)


@rule(aten.where.self)
def where(level: IntervalLevel, condition: Any, x: Any, y: Any) -> Any:
    """Both where the condition may be true or false."""
    surely, maybe = ends(condition)
    (a, b), (c, d) = ends(x), ends(y)
    least, most = torch.minimum(a, c), torch.maximum(b, d)
    return level.between(
        torch.where(surely, a, torch.where(maybe, least, c)), torch.where(surely, b, torch.where(maybe, most, d))
    )


@rule(aten.masked_fill.Scalar)
def masked_fill(level: IntervalLevel, x: Any, mask: Any, value: Any) -> Any:
    return where(level, mask, level.constant(torch.full_like(x.value, value)), x)


@rule(aten.threshold_backward.default)
def threshold_backward(level: IntervalLevel, grad: Any, x: Any, threshold: Any) -> Any:
    low, high = ends(x)
    a, b = ends(grad)
    passes, may_pass = low > threshold, high > threshold
    return level.between(
        torch.where(passes, a, torch.where(may_pass, a.clamp(max=0), 0)),
        torch.where(passes, b, torch.where(may_pass, b.clamp(min=0), 0)),
    )


@rule(aten.fmax.default)
def fmax(level: IntervalLevel, x: Any, y: Any) -> Any:
    """Where one end is NaN nothing is known of that number: it may be the greater one."""
    (a, b), (c, d) = ends(x), ends(y)
    return level.between(torch.fmax(a, c), torch.maximum(b, d))


@rule(aten.fmin.default)
def fmin(level: IntervalLevel, x: Any, y: Any) -> Any:
    (a, b), (c, d) = ends(x), ends(y)
    return level.between(torch.minimum(a, c), torch.fmin(b, d))
