"""Operators on intervals, by family. An operator without a rule is taken apart by PyTorch's decomposition, if it has
one; else it is an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.core.pytrees import tree_map
from functrans.core.rules import RuleTable
from functrans.core.tensor import WrapperTensor
from functrans.core.torch_private import OpOverload
from functrans.extension.missing_rule import missing_rule_error
from functrans.extension.table_interpreter import TableInterpreter
from functrans.functionalization.write_back import RESHAPES
from functrans.shipped.sparsity_rules import MOVES

aten = torch.ops.aten

Ends = tuple[Tensor, Tensor]


class IntervalLevel(TableInterpreter):
    """Its wrappers stand for all numbers between ``value`` and ``upper``; between False and True are both."""

    kind = "bounds"
    payload = ("upper",)
    rules = RuleTable("interval rules", default="decompose")

    @staticmethod
    def ends(x: Any) -> Ends:
        return (x.value, x.value) if x.upper is None else (x.value, x.upper)

    def between(self, low: Tensor, high: Tensor) -> WrapperTensor:
        return self.carry(low, upper=high)


rule = IntervalLevel.rules.register
ends = IntervalLevel.ends


def is_interval(x: Any) -> bool:
    return type(x) is WrapperTensor and isinstance(x.interpreter, IntervalLevel) and x.upper is not None


def low_of(x: Any) -> Any:
    return x.value if type(x) is WrapperTensor and isinstance(x.interpreter, IntervalLevel) else x


def high_of(x: Any) -> Any:
    return x.upper if is_interval(x) else low_of(x)


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

        tree_map(check, list(args))
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
    aten.index_fill.int_Scalar, aten.masked_fill.Scalar, aten.lift_fresh_copy.default, aten.positive.default,
    aten.relu.default, aten.tanh.default, aten.sigmoid.default, aten.exp.default, aten.exp2.default, aten.expm1.default,
    aten.atan.default, aten.sinh.default, aten.asinh.default, aten.erf.default, aten.softplus.default,
    aten.hardsigmoid.default, aten.softshrink.default, aten.hardshrink.default, aten.floor.default, aten.ceil.default,
    aten.round.default, aten.trunc.default, aten.sign.default, aten.log_sigmoid.default,
    aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.max.default, aten.min.default, aten.cumsum.default, aten.logsumexp.default, aten.logcumsumexp.default,
    aten.maximum.default, aten.minimum.default, aten.logaddexp.default, aten.clamp.default, aten.clamp_min.default,
    aten.clamp_max.default, aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor, aten.avg_pool2d.default,
    aten.avg_pool3d.default, aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default,
    aten.hardtanh.default, aten.trace.default,
)  # fmt: skip
increasing(aten.leaky_relu.default, where=lambda x, negative_slope=0.01: negative_slope >= 0)
increasing(
    aten.elu.default,
    where=lambda x, alpha=1.0, scale=1.0, input_scale=1.0: min(alpha, scale, input_scale) >= 0,
)
increasing(
    aten._to_copy.default, where=lambda x, dtype=None, **options: dtype is None or dtype.is_floating_point
)
increasing(aten.index_add.default, where=lambda x, dim, index, source, alpha=1: alpha >= 0)


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
one_minimum(aten.mish.default, (-1.192454294821533, lambda: True))
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

# ------------------------------------------------------------------------------------------- arithmetic


def hull(*ends_: Tensor) -> Ends:
    """From the least to the greatest."""
    low, high = ends_[0], ends_[0]
    for end in ends_[1:]:
        low, high = torch.minimum(low, end), torch.maximum(high, end)
    return low, high


def times(x: Ends, y: Ends) -> Ends:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.where((a == 0) | (b == 0), 0, a * b)  # 0 times infinity: no number in between is infinite

    if x[0] is x[1]:
        x, y = y, x
    if y[0] is y[1]:
        return hull(product(x[0], y[0]), product(x[1], y[0]))
    return hull(*(product(a, b) for a in x for b in y))


def inverse(x: Ends) -> Ends:
    """1/x; everything, if 0 is inside."""
    low, high = x
    inside = (low < 0) & (high > 0)
    safe_low, safe_high = torch.where(high == 0, -0.0, high), torch.where(low == 0, 0.0, low)
    return (
        torch.where(inside, -math.inf, torch.where(inside, 1.0, safe_low).reciprocal()),
        torch.where(inside, math.inf, torch.where(inside, 1.0, safe_high).reciprocal()),
    )


def both(x: Any) -> Any:
    """The ends of an argument, which may be a number."""
    return ends(x) if isinstance(x, Tensor) else (x, x)


def scaled(x: Ends, factor: Any) -> Ends:
    if factor == 1:
        return x
    return (x[0] * factor, x[1] * factor) if factor >= 0 else (x[1] * factor, x[0] * factor)


def plus(x: Ends, y: Ends) -> Ends:
    return x[0] + y[0], x[1] + y[1]


@rule(aten.add.Tensor, aten.add.Scalar)
def add(level: IntervalLevel, x: Any, y: Any, alpha: Any = 1) -> Any:
    return level.between(*plus(ends(x), scaled(both(y), alpha)))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(level: IntervalLevel, x: Any, y: Any, alpha: Any = 1) -> Any:
    return level.between(*plus(ends(x), scaled(both(y), -alpha)))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(level: IntervalLevel, x: Any, y: Any, alpha: Any = 1) -> Any:
    return level.between(*plus(scaled(ends(x), -alpha), both(y)))


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(level: IntervalLevel, x: Any, y: Any) -> Any:
    if not isinstance(y, Tensor):
        return level.between(*scaled(ends(x), y))
    if x is y:
        return valley_of_power(level, x, 2)
    return level.between(*times(ends(x), ends(y)))


@rule(aten.div.Tensor, aten.div.Scalar)
def div(level: IntervalLevel, x: Any, y: Any) -> Any:
    if not isinstance(y, Tensor):
        low, high = ends(x)
        return level.between(low / y, high / y) if y >= 0 else level.between(high / y, low / y)
    if not is_interval(y):
        low, high = ends(x)
        return level.between(*hull(low / ends(y)[0], high / ends(y)[0]))
    return level.between(*times(ends(x), inverse(ends(y))))


@rule(aten.reciprocal.default)
def reciprocal(level: IntervalLevel, x: Any) -> Any:
    return level.between(*inverse(ends(x)))


@rule(aten.pow.Tensor_Scalar)
def power(level: IntervalLevel, x: Any, exponent: Any) -> Any:
    if exponent < 0:
        x = power(level, x, -exponent)
        return level.between(*inverse(ends(x)))
    if exponent == 0:
        return level.constant(torch.ones_like(x.value))
    if exponent != int(exponent):
        low, high = ends(x)
        return level.between(low.clamp(min=0) ** exponent, high**exponent)
    return valley_of_power(level, x, int(exponent))


def valley_of_power(level: IntervalLevel, x: Any, exponent: int) -> Any:
    low, high = ends(x)
    if exponent % 2:
        return level.between(low**exponent, high**exponent)
    least = torch.minimum(low.clamp(min=0), high) ** exponent
    return level.between(least, torch.maximum(low**exponent, high**exponent))


@rule(aten.prod.default, aten.prod.dim_int)
def prod(level: IntervalLevel, x: Any, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    low, high = (t if dtype is None else t.to(dtype) for t in ends(x))
    if dim is None:
        low, high, dim = low.flatten(), high.flatten(), 0
    one = torch.ones_like(low.sum(dim))
    found: Ends = (one, one)
    for pair in zip(low.unbind(dim), high.unbind(dim), strict=True) if low.dim() else [(low, high)]:
        found = times(found, pair)
    return level.between(*(t.unsqueeze(dim) if keepdim else t for t in found))


# ------------------------------------------------------------------------------------------- comparisons


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
    return level.between((a == b) & (c == d) & (a == c), (a <= d) & (b >= c))


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


@rule(aten.threshold_backward.default)
def threshold_backward(level: IntervalLevel, grad: Any, x: Any, threshold: Any) -> Any:
    low, high = ends(x)
    a, b = ends(grad)
    passes, may_pass = low > threshold, high > threshold
    return level.between(
        torch.where(passes, a, torch.where(may_pass, a.clamp(max=0), 0)),
        torch.where(passes, b, torch.where(may_pass, b.clamp(min=0), 0)),
    )


# ------------------------------------------------------------------------------------------- products of matrices


def middle_and_radius(x: Any) -> tuple[Tensor, Tensor | None]:
    low, high = ends(x)
    return (low, None) if x.upper is None else ((low + high) / 2, (high - low) / 2)


def bilinear(product: Callable[[Tensor, Tensor], Tensor], x: Any, y: Any) -> Ends:
    """Of a product of two intervals: its middle, and how far it may be from there."""
    (middle, radius), (other, other_radius) = middle_and_radius(x), middle_and_radius(y)
    center = product(middle, other)
    far = torch.zeros_like(center)
    if other_radius is not None:
        far = far + product(middle.abs(), other_radius)
    if radius is not None:
        far = far + product(radius, other.abs() if other_radius is None else other.abs() + other_radius)
    return center - far, center + far


for _op in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default):

    def _product(level: IntervalLevel, x: Any, y: Any, op: OpOverload = _op) -> Any:
        return level.between(*bilinear(op, x, y))

    IntervalLevel.rules.add(_op, _product)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def addmm(level: IntervalLevel, x: Any, left: Any, right: Any, beta: Any = 1, alpha: Any = 1) -> Any:
    return level.between(*plus(scaled(ends(x), beta), scaled(bilinear(torch.matmul, left, right), alpha)))


@rule(aten.convolution.default)
def convolution(level: IntervalLevel, x: Any, weight: Any, bias: Any, *geometry: Any) -> Any:
    found = bilinear(lambda a, b: aten.convolution.default(a, b, None, *geometry), x, weight)
    if bias is not None:
        shape = (-1, *[1] * (weight.dim() - 2))
        low, high = ends(bias)
        found = plus(found, (low.view(shape), high.view(shape)))
    return level.between(*found)


# ------------------------------------------------------------------------------------------- maxima with their places


def with_places(op: OpOverload, last: Callable[..., int]) -> None:
    """``op`` returns values that do not decrease, and places, which may be any from 0 to ``last``."""

    @rule(op)
    def values_and_places(level: IntervalLevel, x: Any, *args: Any) -> Any:
        low, high = ends(x)
        (a, places), (b, _) = op(low, *args), op(high, *args)
        most = max(last(x, *args), 0)
        return level.between(a, b), level.between(torch.zeros_like(places), torch.full_like(places, most))


def size_along(x: Any, dim: int, *_: Any) -> int:
    return (x.shape[dim] if x.dim() else 1) - 1


for _op in (aten.max.dim, aten.min.dim, aten.cummax.default, aten.cummin.default):
    with_places(_op, size_along)
with_places(aten.max_pool2d_with_indices.default, lambda x, *_: math.prod(x.shape[-2:]) - 1)
with_places(aten.adaptive_max_pool2d.default, lambda x, *_: math.prod(x.shape[-2:]) - 1)
with_places(aten.max_pool3d_with_indices.default, lambda x, *_: math.prod(x.shape[-3:]) - 1)

# ------------------------------------------------------------------------------------------- normalization


def log_softmax_ends(low: Tensor, high: Tensor, dim: int) -> Ends:
    """Each is least where it is small itself and the others are large: ``-log(1 + sum of exp(others - itself))``."""
    if low.dim() == 0:
        return torch.zeros_like(low), torch.zeros_like(high)
    low, high = low.movedim(dim, -1), high.movedim(dim, -1)
    itself = torch.eye(low.shape[-1], dtype=torch.bool, device=low.device)

    def least(own: Tensor, others: Tensor) -> Tensor:
        apart = torch.where(itself, 0.0, others.unsqueeze(-2) - own.unsqueeze(-1))
        return -apart.logsumexp(-1).movedim(-1, dim)

    return least(low, high), least(high, low)


@rule(aten._log_softmax.default, aten.log_softmax.int)
def log_softmax(level: IntervalLevel, x: Any, dim: int, *_: Any) -> Any:
    return level.between(*log_softmax_ends(*ends(x), dim))


@rule(aten._softmax.default, aten.softmax.int)
def softmax(level: IntervalLevel, x: Any, dim: int, *_: Any) -> Any:
    low, high = log_softmax_ends(*ends(x), dim)
    return level.between(low.exp(), high.exp())


def deviations(low: Tensor, high: Tensor, dims: list[int]) -> Ends:
    """``x - mean(x)``, in which each number counts ``1 - 1/n`` for itself."""
    n = math.prod(low.shape[d] for d in dims)
    return (
        low - low / n - (high.mean(dims, keepdim=True) - high / n),
        high - high / n - (low.mean(dims, keepdim=True) - low / n),
    )


def sum_of_squares(x: Ends, dims: list[int]) -> Ends:
    """Along ``dims``, which stay."""
    low, high = x
    least = torch.minimum(low.clamp(min=0), high)
    most = torch.maximum(low.abs(), high.abs())
    return least.square().sum(dims, keepdim=True), most.square().sum(dims, keepdim=True)


def normalized(low: Tensor, high: Tensor, dims: list[int], eps: float) -> tuple[Ends, Ends, Ends]:
    """``(x - mean) / sqrt(var + eps)``, mean and ``1 / sqrt(var + eps)``.

    No number of n is further from their mean than ``sqrt(n - 1)`` standard deviations.
    """
    n = math.prod(low.shape[d] for d in dims)
    apart = deviations(low, high, dims)
    least, most = sum_of_squares(apart, dims)
    scale = (most / n + eps).rsqrt(), (least / n + eps).rsqrt()
    found = times(apart, scale)
    limit = math.sqrt(max(n - 1, 0))
    mean = low.mean(dims, keepdim=True), high.mean(dims, keepdim=True)
    return (found[0].clamp(min=-limit), found[1].clamp(max=limit)), mean, scale


@rule(aten.native_layer_norm.default)
def layer_norm(level: IntervalLevel, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    low, high = ends(x)
    found, mean, scale = normalized(low, high, range_of_last(low, len(shape)), eps)
    if weight is not None:
        found = times(found, ends(weight))
    if bias is not None:
        found = plus(found, ends(bias))
    return level.between(*found), level.between(*mean), level.between(*scale)


def range_of_last(x: Tensor, count: int) -> list[int]:
    return list(range(x.dim() - count, x.dim()))


@rule(aten.native_group_norm.default)
def group_norm(
    level: IntervalLevel, x: Any, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float
) -> Any:
    low, high = (t.reshape(n, groups, -1) for t in ends(x))
    found, mean, scale = normalized(low, high, [2], eps)
    found = found[0].reshape(x.shape), found[1].reshape(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    if weight is not None:
        found = times(found, tuple(t.view(shape) for t in ends(weight)))  # type: ignore[arg-type]
    if bias is not None:
        found = plus(found, tuple(t.view(shape) for t in ends(bias)))  # type: ignore[arg-type]
    return level.between(*found), *(level.between(a.squeeze(-1), b.squeeze(-1)) for a, b in (mean, scale))


def per_channel(x: Any, scale: Ends, shift: Any, weight: Any, bias: Any) -> Ends:
    """``(x - shift) * scale * weight + bias``, whose numbers but ``x`` are one for each channel."""
    shape = (-1, *[1] * (x.dim() - 2))

    def spread(t: Ends) -> Ends:
        return t[0].view(shape), t[0].view(shape) if t[0] is t[1] else t[1].view(shape)

    found = ends(x) if shift is None else plus(ends(x), spread(scaled(ends(shift), -1)))
    found = times(found, spread(scale))
    if weight is not None:
        found = times(found, spread(ends(weight)))
    return found if bias is None else plus(found, spread(ends(bias)))


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm_of_statistics(
    level: IntervalLevel, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    low, high = ends(var)
    scale = (high + eps).rsqrt(), (low + eps).rsqrt()
    none = level.constant(x.value.new_empty(0))
    return level.between(*per_channel(x, scale, mean, weight, bias)), none, none


@rule(aten._native_batch_norm_legit.no_stats)
def batch_norm(
    level: IntervalLevel, x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    low, high = ends(x)
    found, mean, scale = normalized(low, high, [d for d in range(low.dim()) if d != 1], eps)
    one = low.new_ones(low.shape[1])
    found = per_channel(level.between(*found), (one, one), None, weight, bias)
    return level.between(*found), *(level.between(a.flatten(), b.flatten()) for a, b in (mean, scale))


@rule(aten.var.correction)
def var(level: IntervalLevel, x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    low, high = ends(x)
    dims = [d % low.dim() for d in dim] if dim else list(range(low.dim()))
    n = math.prod(low.shape[d] for d in dims)
    count = n - (1 if correction is None else correction)
    found = (t / count for t in sum_of_squares(deviations(low, high, dims), dims))
    return level.between(*(t if keepdim else t.squeeze(dims) for t in found))
