"""Softmax, normalizations and variances."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.shipped.interval_rules.level import Ends, IntervalLevel, ends, plus, rule, scaled, times

aten = torch.ops.aten


def log_softmax_ends(low: Tensor, high: Tensor, dim: int) -> Ends:
    """Each is least where it is small itself and the others are large: ``-log(1 + sum of exp(others - itself))``."""
    if low.dim() == 0 or low.shape[dim] == 1:
        return torch.zeros_like(low), torch.zeros_like(high)
    low, high = low.movedim(dim, -1), high.movedim(dim, -1)
    itself = torch.eye(low.shape[-1], dtype=torch.bool, device=low.device)

    def least(own: Tensor, others: Tensor) -> Tensor:
        masked = own == -math.inf
        apart = others.unsqueeze(-2) - torch.where(masked, 0.0, own).unsqueeze(-1)
        found = -torch.where(itself, 0.0, apart).logsumexp(-1)
        return torch.where(masked, -math.inf, found).movedim(-1, dim)

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
