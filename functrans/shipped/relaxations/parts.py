"""Operators as programs of others that have relaxations. The interval of their own rule is kept where it is better."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.thread_state import running_at
from functrans.shipped.interval_rules.level import ends
from functrans.shipped.relaxations.level import PARTS, RelaxationLevel
from functrans.shipped.relaxations.maxima import along

aten = torch.ops.aten
parts_of = PARTS.register

# ------------------------------------------------------------------------------------------- element by element


@parts_of(aten.clamp.default, aten.hardtanh.default)
def clamp(level: RelaxationLevel, x: Any, least: Any = None, most: Any = None) -> Any:
    with running_at(level):
        x = x if least is None else x.clamp_min(least)
        return x if most is None else x.clamp_max(most)


@parts_of(aten.clamp.Tensor)
def clamp_tensor(level: RelaxationLevel, x: Any, least: Any = None, most: Any = None) -> Any:
    with running_at(level):
        x = x if least is None else torch.maximum(x, least)
        return x if most is None else torch.minimum(x, most)


@parts_of(aten.hardsigmoid.default)
def hardsigmoid(level: RelaxationLevel, x: Any) -> Any:
    """PyTorch's sixth is rounded to float32."""
    top = aten.hardsigmoid.default(torch.full_like(ends(x)[0], 3.0))
    with running_at(level):
        return (x.clamp_min(-3).clamp_max(3) + 3) * (top / 6)


@parts_of(aten.softshrink.default)
def softshrink(level: RelaxationLevel, x: Any, width: Any = 0.5) -> Any:
    with running_at(level):
        return x - x.clamp_min(-width).clamp_max(width)


@parts_of(aten.elu.default)
def elu(level: RelaxationLevel, x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    with running_at(level):
        return scale * (x.relu() + alpha * (-input_scale * (-x).relu()).expm1())


@parts_of(aten.div.Tensor)
def div(level: RelaxationLevel, x: Any, y: Any) -> Any:
    with running_at(level):
        return x * y.reciprocal()


@parts_of(aten.logaddexp.default)
def logaddexp(level: RelaxationLevel, x: Any, y: Any) -> Any:
    with running_at(level):
        return y + torch.nn.functional.softplus(x - y, threshold=math.inf)


@parts_of(aten.where.self)
def where(level: RelaxationLevel, condition: Any, x: Any, y: Any) -> Any:
    """``y`` and the difference, which is let through where the condition holds."""
    possible = [end.to(x.dtype) for end in ends(condition)]
    holds = level.input(possible[0], possible[1])
    with running_at(level):
        return y + aten.threshold_backward.default(x - y, holds, 0.5)


@parts_of(aten.masked_fill.Scalar)
def masked_fill(level: RelaxationLevel, x: Any, mask: Any, value: Any) -> Any:
    with running_at(level):
        return torch.where(mask, torch.full_like(x, value), x)


@parts_of(aten.prod.default, aten.prod.dim_int)
def prod(level: RelaxationLevel, x: Any, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    with running_at(level):
        x = x if dtype is None else x.to(dtype)
        factors = x.flatten() if dim is None else x
        found = reduce(torch.mul, factors.unbind(dim or 0)) if factors.dim() else factors
        return found.unsqueeze(dim) if keepdim and dim is not None and x.dim() else found


# ------------------------------------------------------------------------------------------- along dimensions


@parts_of(aten.logsumexp.default)
def logsumexp(level: RelaxationLevel, x: Any, dim: Any, keepdim: bool = False) -> Any:
    dims = along(x, dim)
    greatest = level.constant(ends(x)[1].amax(dims, keepdim=True))
    with running_at(level):
        found = (x - greatest).exp().sum(dims, keepdim=True).log() + greatest
        return found if keepdim else found.squeeze(dims)


@parts_of(aten._log_softmax.default, aten.log_softmax.int)
def log_softmax(level: RelaxationLevel, x: Any, dim: int, *_: Any) -> Any:
    with running_at(level):
        return x - x.logsumexp(dim, keepdim=True)


@parts_of(aten._softmax.default, aten.softmax.int)
def softmax(level: RelaxationLevel, x: Any, dim: int, *_: Any) -> Any:
    with running_at(level):
        return x.log_softmax(dim).exp()


@parts_of(aten.var.correction)
def var(level: RelaxationLevel, x: Any, dim: Any = None, correction: Any = None, keepdim: bool = False) -> Any:
    dims = along(x, dim)
    count = math.prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    with running_at(level):
        return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim) / count


def normalized(x: Any, dims: Any, eps: float) -> Tensor:
    apart = x - x.mean(dims, keepdim=True)
    return apart * (apart.square().mean(dims, keepdim=True) + eps).rsqrt()


@parts_of(aten.native_layer_norm.default)
def layer_norm(level: RelaxationLevel, x: Any, shape: Any, weight: Any, bias: Any, eps: float) -> Any:
    with running_at(level):
        found = normalized(x, tuple(range(-len(shape), 0)), eps)
        found = found if weight is None else found * weight
        return found if bias is None else found + bias


@parts_of(aten.native_group_norm.default)
def group_norm(
    level: RelaxationLevel, x: Any, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float
) -> Any:
    with running_at(level):
        found = normalized(x.reshape(n, groups, -1), (2,), eps).reshape(x.shape)
        return per_channel(found, weight, bias)


@parts_of(aten._native_batch_norm_legit_no_training.default)
def batch_norm_of_statistics(
    level: RelaxationLevel, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    with running_at(level):
        found = per_channel(x, None, -mean)
        return per_channel(found, (var + eps).rsqrt() if weight is None else (var + eps).rsqrt() * weight, bias)


@parts_of(aten._native_batch_norm_legit.no_stats)
def batch_norm(
    level: RelaxationLevel, x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Any:
    with running_at(level):
        found = normalized(x, tuple(d for d in range(x.dim()) if d != 1), eps)
        return per_channel(found, weight, bias)


def per_channel(x: Any, factor: Any, more: Any) -> Any:
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if factor is None else x * factor.view(shape)
    return x if more is None else x + more.view(shape)
