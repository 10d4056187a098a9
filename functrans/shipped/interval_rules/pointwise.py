"""Functions of one number, element by element, and what does not decrease in any of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.extension.missing_rule import missing_rule_error
from functrans.operators.views import RESHAPES
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.interval_rules.level import IntervalLevel, ends, high_of, is_interval, low_of, rule
from functrans.shipped.sparsity_rules.moves import MOVES
from functrans.tensors.pytrees import tree_map

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------- monotone functions


def increasing(*ops: OpOverload, where: Callable[..., bool] = lambda *args, **kwargs: True) -> None:
    """These do not decrease in any of their floating-point tensors, if ``where`` says so of the call."""
    for op in ops:
        IntervalLevel.rules.add(op, end_by_end(op, where))


def end_by_end(op: OpOverload, where: Callable[..., bool]) -> Callable[..., Any]:
    def by_ends(level: IntervalLevel, *args: Any, **kwargs: Any) -> Any:
        def check(x: Any) -> Any:
            if is_interval(x) and not x.dtype.is_floating_point:
                raise missing_rule_error(level, op)  # a place or a mask that is not known
            return x

        tree_map(check, list(args[1:]))
        if not where(*args, **kwargs):
            raise missing_rule_error(level, op)
        low, high = (op(*tree_map(end, list(args)), **tree_map(end, kwargs)) for end in (low_of, high_of))
        if isinstance(low, Tensor):
            return level.between(low, high)
        if "List[" in str(op._schema.returns[0].type):
            return [level.between(a, b) for a, b in zip(low, high, strict=True)]
        return tuple(level.between(a, b) for a, b in zip(low, high, strict=True))

    return by_ends


increasing(
    *RESHAPES, *MOVES, aten.expand_as.default, aten.alias.default, aten.clone.default, aten.contiguous.default,
    aten.detach.default, aten.copy.default, aten.fill.Tensor, aten.constant_pad_nd.default, aten.scatter.src,
    aten.scatter.value, aten.scatter_add.default, aten.index_copy.default, aten.index_put.default,
    aten.index_fill.int_Scalar, aten.lift_fresh_copy.default, aten.positive.default,
    aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.exp2.default, aten.expm1.default,
    aten.atan.default, aten.sinh.default, aten.asinh.default, aten.erf.default,
    aten.hardsigmoid.default, aten.softshrink.default, aten.hardshrink.default, aten.floor.default, aten.ceil.default,
    aten.round.default, aten.trunc.default, aten.sign.default, aten.log_sigmoid.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.max.default, aten.min.default, aten.cumsum.default, aten.logsumexp.default, aten.logcumsumexp.default,
    aten.maximum.default, aten.minimum.default, aten.logaddexp.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default,
    aten.hardtanh.default, aten.trace.default, aten._sparse_coo_tensor_with_dims_and_tensors.default,
    aten._to_dense.default, aten._coalesced.default, aten._values.default, aten.values.default,
)  # fmt: skip


@rule(aten.indices.default, aten._indices.default)
def places_of_values(level: IntervalLevel, x: Any) -> Any:
    return level.constant(aten._indices.default(ends(x)[0]))


increasing(aten.leaky_relu.default, where=lambda x, negative_slope=0.01: negative_slope >= 0)
increasing(
    aten.elu.default,
    where=lambda x, alpha=1.0, scale=1.0, input_scale=1.0: min(alpha, scale, input_scale) >= 0,
)
increasing(
    aten.avg_pool2d.default, aten.avg_pool3d.default,
    where=lambda x, size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None:
        divisor_override is None or divisor_override > 0,
)  # fmt: skip
increasing(aten._to_copy.default, where=lambda x, dtype=None, **options: dtype is None or dtype.is_floating_point)
increasing(aten.index_add.default, where=lambda x, dim, index, source, alpha=1: alpha >= 0)


@rule(aten.softplus.default)
def softplus(level: IntervalLevel, x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    """It increases, but for a step where it becomes the identity."""
    low, high = ends(x)
    place = torch.full_like(low, threshold / beta)
    step, inside = aten.softplus.default(place, beta, threshold), (low <= place) & (place <= high)
    low, high = (aten.softplus.default(end, beta, threshold) for end in (low, high))
    return level.between(
        torch.where(inside, torch.minimum(low, torch.minimum(step, place)), low),
        torch.where(inside, torch.maximum(high, torch.maximum(step, place)), high),
    )


def increasing_from(op: OpOverload, start: float) -> None:
    """``op`` increases, and is not defined below ``start``."""

    @rule(op)
    def defined(level: IntervalLevel, x: Any) -> Any:
        low, high = ends(x)
        return level.between(op(low.clamp(min=start)), op(high))


for _op, _start in (
    (aten.sqrt.default, 0.0), (aten.log.default, 0.0), (aten.log2.default, 0.0), (aten.log10.default, 0.0),
    (aten.log1p.default, -1.0), (aten.asin.default, -1.0), (aten.acosh.default, 1.0), (aten.atanh.default, -1.0),
):  # fmt: skip
    increasing_from(_op, _start)


def decreasing(*ops: OpOverload) -> None:
    for op in ops:

        def swapped(level: IntervalLevel, x: Any, op: OpOverload = op) -> Any:
            low, high = ends(x)
            return level.between(op(high), op(low))

        IntervalLevel.rules.add(op, swapped)


decreasing(aten.neg.default, aten.erfc.default)


@rule(aten.rsqrt.default)
def rsqrt(level: IntervalLevel, x: Any) -> Any:
    low, high = ends(x)
    return level.between(high.rsqrt(), low.clamp(min=0).rsqrt())


# ------------------------------------------------------------------------------------------- one minimum, and waves


def one_minimum(op: OpOverload, *places: tuple[float, Callable[..., bool]]) -> None:
    """``op`` falls until the first of ``places`` whose condition holds, and rises from there."""

    @rule(op)
    def valley(level: IntervalLevel, x: Any, *args: Any, **kwargs: Any) -> Any:
        low, high = ends(x)
        lowest = next(place for place, holds in places if holds(*args, **kwargs))
        least = op(torch.minimum(low.clamp(min=lowest), high), *args, **kwargs)
        return level.between(least, torch.maximum(op(low, *args, **kwargs), op(high, *args, **kwargs)))


one_minimum(aten.abs.default, (0.0, lambda: True))
one_minimum(aten.square.default, (0.0, lambda: True))
one_minimum(aten.cosh.default, (0.0, lambda: True))
one_minimum(aten.silu.default, (-1.278464542761074, lambda: True))
one_minimum(aten.mish.default, (-1.1924312145154954, lambda: True))
one_minimum(aten.hardswish.default, (-1.5, lambda: True))
one_minimum(
    aten.gelu.default,
    (-0.7517915246935645, lambda approximate="none": approximate == "none"),
    (-0.7524614220710162, lambda approximate="none": True),
)


def wave(op: OpOverload, top: float) -> None:
    """A sine of period 2 pi, which is 1 at ``top``."""

    @rule(op)
    def sine(level: IntervalLevel, x: Any) -> Any:
        low, high = ends(x)
        a, b = op(low), op(high)

        def reached(place: float) -> Tensor:
            """Whether one of the places ``place + 2 k pi`` lies in the interval."""
            return ((high - place) / (2 * math.pi)).floor() > ((low - place) / (2 * math.pi)).ceil() - 1

        least = torch.where(reached(top + math.pi), -1.0, torch.minimum(a, b))
        return level.between(least, torch.where(reached(top), 1.0, torch.maximum(a, b)))


wave(aten.sin.default, math.pi / 2)
wave(aten.cos.default, 0.0)
