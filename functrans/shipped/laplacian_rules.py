"""Rules of the forward Laplacian for layers: fewer operators than the derivative table takes.

In each, x_d are the slopes of the argument, one for each direction d, and b its bend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from functrans.api.vmap import vmap
from functrans.boundary.calls import call_below
from functrans.core.dispatch import lower
from functrans.core.tensor import WrapperTensor
from functrans.operators.views import RESHAPES
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped.laplacian_by_table import derived
from functrans.shipped.laplacian_level import LaplacianInterpreter
from functrans.shipped.simpler import exponentials, keeps_dtype

aten = torch.ops.aten
Rule = TypeVar("Rule", bound=Callable[..., Any])


@LaplacianInterpreter.rules.register(aten.detach.default, aten.detach_copy.default)
def detach(level: LaplacianInterpreter, x: WrapperTensor) -> WrapperTensor:
    return level.constant(x.value.detach())


def direct(*ops: OpOverload) -> Callable[[Rule], Rule]:
    """Register a rule for some of an operator's calls, which returns NotImplemented for the others.

    It is called with the level, the operator and its arguments, in the state of a handler.
    """

    def register(rule: Rule) -> Rule:
        for op in ops:
            LaplacianInterpreter.direct[op] = functools.partial(otherwise_derived, rule, op)
        return rule

    return register


def otherwise_derived(rule: Rule, op: OpOverload, level: LaplacianInterpreter, args: Any, kwargs: Any) -> Any:
    found = rule(level, op, *args, **kwargs)
    return derived(level, op, args, kwargs) if found is NotImplemented else found


@direct(aten.linear.default)
def linear(level: LaplacianInterpreter, op: OpOverload, x: Any, weight: Any, bias: Any = None) -> Any:
    """A layer with fixed weights is one product for all directions."""
    if not level.carries(x) or level.carries(weight) or level.carries(bias):
        return NotImplemented
    weight = level.value_of(weight)
    out = lower(level, op, (x.value, weight, level.value_of(bias)), {})
    bend = None if x.bend is None else lower(level, op, (x.bend, weight), {})
    return level.moving(out, lower(level, op, (x.slopes, weight), {}), bend)


@direct(aten.div.Tensor)
def div(level: LaplacianInterpreter, op: OpOverload, x: Any, y: Any) -> Any:
    """By a number, of which a program has no reciprocal."""
    if isinstance(y, Tensor):
        return NotImplemented
    bend = None if x.bend is None else lower(level, op, (x.bend, y), {})
    return level.moving(lower(level, op, (x.value, y), {}), lower(level, op, (x.slopes, y), {}), bend)


@direct(*RESHAPES)
def reshape(level: LaplacianInterpreter, op: OpOverload, x: Any, *args: Any) -> Any:
    """Directions stay in front."""
    if not level.carries(x):
        return NotImplemented
    out = lower(level, op, (x.value, *map(level.value_of, args)), {})
    shape = list(out.shape)
    bend = None if x.bend is None else lower(level, aten.reshape.default, (x.bend, shape), {})
    return level.moving(out, lower(level, aten.reshape.default, (x.slopes, [level.count, *shape]), {}), bend)


@direct(aten._softmax.default, aten.softmax.int)
def softmax(level: LaplacianInterpreter, op: OpOverload, x: Any, dim: int, *rest: Any) -> Any:
    """With u_d = x_d - Σ y·x_d, of the logarithm: y_d = y·u_d, and the bend is y·(g - Σ y·g) of g = b + Σ_d u_d²."""
    if not level.carries(x) or not x.dim() or not keeps_dtype(x, rest):
        return NotImplemented
    y = lower(level, op, (x.value, dim, *rest), {})

    def parts(y: Tensor, slopes: Tensor, bend: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
        u = slopes - (y * slopes).sum(dim, keepdim=True)
        squares = (u * u).sum(0)
        g = squares if bend is None else bend + squares
        return y * u, y * (g - (y * g).sum(dim, keepdim=True))

    return level.moving(y, *call_below(level, parts, (y, x.slopes, x.bend, from_end(x, dim)), {}))


@direct(aten._log_softmax.default, aten.log_softmax.int)
def log_softmax(level: LaplacianInterpreter, op: OpOverload, x: Any, dim: int, *rest: Any) -> Any:
    """With y the softmax and u_d and g as above, u_d and b - Σ y·g."""
    if not level.carries(x) or not x.dim() or not keeps_dtype(x, rest):
        return NotImplemented
    out = lower(level, op, (x.value, dim, *rest), {})

    def parts(out: Tensor, slopes: Tensor, bend: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
        y = out.exp()
        u = slopes - (y * slopes).sum(dim, keepdim=True)
        squares = (u * u).sum(0)
        g = squares if bend is None else bend + squares
        change = (y * g).sum(dim, keepdim=True)
        return u, -change.expand(out.shape) if bend is None else bend - change

    return level.moving(out, *call_below(level, parts, (out, x.slopes, x.bend, from_end(x, dim)), {}))


def from_end(x: Any, dim: int) -> int:
    """A dimension of ``x`` as one of its slopes."""
    return dim if dim < 0 else dim - x.dim()


@direct(aten.layer_norm.default)
def layer_norm(
    level: LaplacianInterpreter, op: OpOverload, x: Any, shape: Any, weight: Any = None, bias: Any = None,
    eps: float = 1e-5, *rest: Any,
) -> Any:  # fmt: skip
    """Of y = c·r with c = x - mean(x) and r = (mean(c²) + eps)^(-1/2).

    With z_d = c_d·r and p_d = mean(y·z_d), r_d is -r·p_d; so y_d = z_d - y·p_d. With z = c_b·r of the bend b, that of
    r is r times s = 3·Σ p_d² - Σ mean(z_d²) - mean(y·z), and that of y is z - 2·Σ z_d·p_d + y·s.
    """
    if not level.carries(x) or level.carries(weight) or level.carries(bias):
        return NotImplemented
    weight, bias = level.value_of(weight), level.value_of(bias)
    out = lower(level, op, (x.value, shape, weight, bias, eps, *rest), {})

    def parts(x: Tensor, slopes: Tensor, bent: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        dims = [*range(-len(shape), 0)]
        centered = x - x.mean(dims, keepdim=True)
        r = ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()
        y = centered * r
        z = (slopes - slopes.mean(dims, keepdim=True)) * r
        p = (y * z).mean(dims, keepdim=True)
        change = 3 * (p * p).sum(0) - (z * z).sum([0, *dims], keepdim=True).squeeze(0) / math.prod(shape)
        bend = (z * p).sum(0) * -2
        if bent is not None:
            z_of_bend = (bent - bent.mean(dims, keepdim=True)) * r
            change, bend = change - (y * z_of_bend).mean(dims, keepdim=True), bend + z_of_bend
        bend = bend + y * change
        slopes = z - y * p
        return (slopes, bend) if weight is None else (slopes * weight, bend * weight)

    return level.moving(out, *call_below(level, parts, (x.value, x.slopes, x.bend, weight), {}))


@direct(aten.linalg_matrix_exp.default)
def matrix_exp(level: LaplacianInterpreter, op: OpOverload, x: Any) -> Any:
    """The second coefficient along x + x_d·t + b/(2D)·t² is half of a share of the bend."""

    def parts(x: Tensor, slopes: Tensor, bend: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        share = None if bend is None else bend / (2 * len(slopes))
        values, first, second = vmap(lambda slope: exponentials(x, slope, share))(slopes)
        return values[0], first, second.sum(0) * 2

    return level.moving(*call_below(level, parts, (x.value, x.slopes, x.bend), {}))
