"""Rules of the forward Laplacian for layers and frequent functions: fewer operators than the derivative table takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import running_at
from functrans.core.torch_private import OpOverload
from functrans.functionalization.write_back import RESHAPES
from functrans.shipped.by_derivatives import value_of
from functrans.shipped.laplacian import LaplacianInterpreter, bent, broadcast, derived, moves

aten = torch.ops.aten


def pointwise(
    op: OpOverload, first: Callable[[Tensor, Tensor], Tensor], second: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    """Register a function of one real tensor with its derivatives, ``first(x, y)`` and ``second(x, y, first)``."""

    @LaplacianInterpreter.rules.register(op)
    def rule(level: LaplacianInterpreter, x: Any) -> Any:
        if x.is_complex():
            return derived(level, op, (x,), {})
        y = op(x.value)
        slope = first(x.value, y)
        return bent(level, x, y, slope, second(x.value, y, slope))


pointwise(aten.exp.default, lambda x, y: y, lambda x, y, s: y)
pointwise(aten.tanh.default, lambda x, y: 1 - y * y, lambda x, y, s: -2 * y * s)
pointwise(aten.sigmoid.default, lambda x, y: y * (1 - y), lambda x, y, s: s * (1 - 2 * y))
pointwise(aten.sin.default, lambda x, y: x.cos(), lambda x, y, s: -y)
pointwise(aten.cos.default, lambda x, y: -x.sin(), lambda x, y, s: -y)
pointwise(aten.log.default, lambda x, y: 1 / x, lambda x, y, s: -s * s)
pointwise(aten.sqrt.default, lambda x, y: 0.5 / y, lambda x, y, s: -0.5 * s / x)
pointwise(aten.rsqrt.default, lambda x, y: -0.5 * y / x, lambda x, y, s: -1.5 * s / x)
pointwise(aten.reciprocal.default, lambda x, y: -y * y, lambda x, y, s: -2 * s * y)


def parts(x: Any, rank: int) -> tuple[Any, Tensor | None, Tensor | None]:
    """Value, slopes broadcast to ``rank`` dimensions, and bend of an operand, which may be a number."""
    if not isinstance(x, WrapperTensor):
        return x, None, None
    return x.value, None if x.slopes is None else broadcast(x.slopes, rank), x.bend


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


def times(x: Any, y: Any) -> Tensor | None:
    return None if x is None or y is None else x * y


@LaplacianInterpreter.rules.register(aten.mul.Tensor)
def mul(level: LaplacianInterpreter, x: Any, y: Any) -> Any:
    out = value_of(x) * value_of(y)
    (a, a_slopes, a_bend), (b, b_slopes, b_bend) = parts(x, out.dim()), parts(y, out.dim())
    slopes = total(times(a_slopes, b), times(a, b_slopes))
    product = times(a_slopes, b_slopes)
    both = None if product is None else 2 * product.sum(0)
    return level.moving(out, slopes, total(times(a_bend, b), times(a, b_bend), both))


def sum_of(op: OpOverload, sign: int) -> None:
    @LaplacianInterpreter.rules.register(op)
    def rule(level: LaplacianInterpreter, x: Any, y: Any, *, alpha: Any = 1) -> Any:
        out = op(value_of(x), value_of(y), alpha=alpha)
        (_, a_slopes, a_bend), (_, b_slopes, b_bend) = parts(x, out.dim()), parts(y, out.dim())
        factor = sign * alpha
        slopes, bend = total(a_slopes, times(factor, b_slopes)), total(a_bend, times(factor, b_bend))
        if slopes is not None:
            slopes = slopes.expand(len(slopes), *out.shape)
        return level.moving(out, slopes, None if bend is None else bend.expand(out.shape))


sum_of(aten.add.Tensor, 1)
sum_of(aten.sub.Tensor, -1)


@LaplacianInterpreter.rules.register(aten.div.Tensor)
def div(level: LaplacianInterpreter, x: Any, y: Any) -> Any:
    with running_at(level):
        return level.own(x * y.reciprocal()) if isinstance(y, Tensor) else level.own(x * (1 / y))


@LaplacianInterpreter.rules.register(aten.linear.default)
def linear(level: LaplacianInterpreter, x: Any, weight: Any, bias: Any = None) -> Any:
    """A layer with fixed weights is one product for all directions."""
    if moves(weight) or (bias is not None and moves(bias)):
        return derived(level, aten.linear.default, (x, weight, bias), {})
    out = functional.linear(x.value, weight.value, value_of(bias))
    bend = None if x.bend is None else functional.linear(x.bend, weight.value)
    return level.moving(out, functional.linear(x.slopes, weight.value), bend)


def reshaping(op: OpOverload) -> None:
    @LaplacianInterpreter.rules.register(op)
    def rule(level: LaplacianInterpreter, x: Any, *args: Any) -> Any:
        """Directions stay in front."""
        out = op(x.value, *map(value_of, args))
        bend = None if x.bend is None else x.bend.reshape(out.shape)
        return level.moving(out, x.slopes.reshape(len(x.slopes), *out.shape), bend)


for _op in RESHAPES:
    reshaping(_op)


@LaplacianInterpreter.rules.register(aten.layer_norm.default)
def layer_norm(
    level: LaplacianInterpreter, x: Any, shape: list[int], weight: Any, bias: Any, eps: float, cudnn_enable: bool
) -> Any:
    """As means, products and a square root, of which each bends little."""
    with running_at(level):
        dims = [*range(-len(shape), 0)]
        centered = x - x.mean(dims, keepdim=True)
        out = centered * ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()
        out = out if weight is None else out * weight
        return level.own(out if bias is None else out + bias)


@LaplacianInterpreter.rules.register(aten._softmax.default)
def softmax(level: LaplacianInterpreter, x: WrapperTensor, dim: int, half_to_float: bool) -> Any:
    with running_at(level):
        e = (x - x.detach().amax(dim, keepdim=True)).exp()
        return level.own(e / e.sum(dim, keepdim=True))
