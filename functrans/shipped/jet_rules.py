"""Rules of Taylor mode for frequent functions: the derivatives of the result by recurrence, from a relation between the
function and its derivative. (Griewank and Walther, Evaluating Derivatives, 2008, table 13.2, for derivatives in the
place of coefficients.)

By the derivative table alone each would be right, and take a pass of its own for every order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import map_tensors
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import running_at
from functrans.core.torch_private import DECOMPOSITION_TABLE, OpOverload
from functrans.shipped.jet import JetInterpreter

aten = torch.ops.aten

#: A value and its derivatives: [x, x', x'', ...]; None is zero.
Series = list[Tensor | None]


def leibniz(
    a: Sequence[Tensor | None], b: Sequence[Tensor | None], n: int, first: int = 0, last: int = 0
) -> Tensor | None:
    """The n-th derivative of a·b, without the ``first`` terms a·b⁽ⁿ⁾, ... and the ``last`` ones, ..., a⁽ⁿ⁾·b."""
    total = None
    for k in range(first, n + 1 - last):
        x, y = a[k], b[n - k]
        if x is not None and y is not None:
            part = x * y if (ways := math.comb(n, k)) == 1 else x * y * ways
            total = part if total is None else total + part
    return total


def minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    return -b if a is None else a - b


def over(a: Tensor | None, b: Any) -> Tensor | None:
    return None if a is None else a / b


def series_of(jet: JetInterpreter, x: Any) -> Series:
    return [x.value, *(x.terms or [None] * jet.order)]


def recurrence(op: OpOverload, following: Callable[[int, Any, Any], Tensor | None]) -> None:
    """Register a function of one tensor: ``following(n, x, y)`` is y⁽ⁿ⁾ by x and the derivatives of y before."""

    @JetInterpreter.rules.register(op)
    def rule(jet: JetInterpreter, x: WrapperTensor) -> WrapperTensor:
        return solved(jet, op, x, following)


def solved(
    jet: JetInterpreter, op: OpOverload, x: WrapperTensor, following: Callable[[int, Any, Any], Tensor | None]
) -> WrapperTensor:
    given, found = series_of(jet, x), [op(x.value)]
    if found[0].dtype != x.dtype:  # of a whole number
        return jet.constant(found[0])
    for n in range(1, jet.order + 1):
        found.append(following(n, given, found))  # type: ignore[arg-type]
    return jet.with_terms(found[0], found[1:])


def by_slope(op: OpOverload, slope: Callable[[int, Any, Any], Tensor | None]) -> None:
    """Register a function with y' = h·x', where ``slope(k, x, y)`` is h⁽ᵏ⁾, by the derivatives of y up to the k-th."""

    @JetInterpreter.rules.register(op)
    def rule(jet: JetInterpreter, x: WrapperTensor) -> WrapperTensor:
        slopes: Series = []

        def following(n: int, x: Series, y: Series) -> Tensor | None:
            slopes.append(slope(n - 1, x, y))
            return leibniz(slopes, x[1:], n - 1)

        return solved(jet, op, x, following)


by_slope(aten.exp.default, lambda k, x, y: y[k])
by_slope(aten.expm1.default, lambda k, x, y: y[0] + 1 if k == 0 else y[k])
by_slope(aten.tanh.default, lambda k, x, y: 1 - y[0] * y[0] if k == 0 else minus(None, leibniz(y, y, k)))
by_slope(aten.sigmoid.default, lambda k, x, y: minus(y[k], leibniz(y, y, k)))
# x·y' = x', y·y = x, x·y = 1
recurrence(aten.log.default, lambda n, x, y: over(minus(x[n], leibniz(x, y[1:], n - 1, first=1)), x[0]))
recurrence(aten.sqrt.default, lambda n, x, y: over(minus(x[n], leibniz(y, y, n, 1, 1)), 2 * y[0]))
recurrence(aten.reciprocal.default, lambda n, x, y: over(minus(None, leibniz(x, y, n, first=1)), x[0]))


def shaped(jet: JetInterpreter, out: Tensor, terms: list[Any]) -> WrapperTensor:
    """An output with these derivatives, which are broadcast and promoted as it is."""
    return jet.with_terms(out, [None if t is None else t.expand(out.shape).to(out.dtype) for t in terms])


def operand(jet: JetInterpreter, x: Any) -> Any:
    return series_of(jet, x) if isinstance(x, Tensor) else [x, *[None] * jet.order]


@JetInterpreter.rules.register(aten.mul.Tensor)
def mul(jet: JetInterpreter, x: Any, y: Any) -> WrapperTensor:
    a, b = operand(jet, x), operand(jet, y)
    return shaped(jet, torch.mul(a[0], b[0]), [leibniz(a, b, n) for n in range(1, jet.order + 1)])


def sum_of(op: OpOverload, sign: int) -> None:
    @JetInterpreter.rules.register(op)
    def rule(jet: JetInterpreter, x: Any, y: Any, *, alpha: Any = 1) -> WrapperTensor:
        a, b = operand(jet, x), operand(jet, y)
        factor = sign * alpha
        second = [t if t is None or factor == 1 else t * factor for t in b[1:]]
        terms = [t if s is None else s if t is None else s + t for s, t in zip(a[1:], second, strict=True)]
        return shaped(jet, op(a[0], b[0], alpha=alpha), terms)


sum_of(aten.add.Tensor, 1)
sum_of(aten.sub.Tensor, -1)


@JetInterpreter.rules.register(aten.div.Tensor)
def div(jet: JetInterpreter, x: Any, y: Any) -> WrapperTensor:
    """z·y = x."""
    numerator, denominator = operand(jet, x), operand(jet, y)
    found = [torch.div(numerator[0], denominator[0])]
    for n in range(1, jet.order + 1):
        rest = minus(numerator[n], leibniz(denominator, found, n, first=1))
        found.append(over(rest, denominator[0]))  # type: ignore[arg-type]
    return shaped(jet, found[0], found[1:])


def waves(jet: JetInterpreter, x: WrapperTensor, functions: tuple[Any, Any], sign: int) -> tuple[Series, Series]:
    """Two functions of which each is the other's derivative, the second one up to a ``sign``."""
    given = series_of(jet, x)
    a: Series = [functions[0](given[0])]
    b: Series = [functions[1](given[0])]
    for n in range(1, jet.order + 1):
        a.append(leibniz(b[:n], given[1:], n - 1))
        back = leibniz(a[:n], given[1:], n - 1)
        b.append(back if sign > 0 else minus(None, back))
    return a, b


for _functions, _ops, _sign in (
    ((torch.sin, torch.cos), (aten.sin.default, aten.cos.default), -1),
    ((torch.sinh, torch.cosh), (aten.sinh.default, aten.cosh.default), 1),
):
    for _i, _op in enumerate(_ops):

        @JetInterpreter.rules.register(_op)
        def wave(
            jet: JetInterpreter, x: WrapperTensor, functions: Any = _functions, i: int = _i, sign: int = _sign
        ) -> WrapperTensor:
            found = waves(jet, x, functions, sign)[i]
            return jet.with_terms(found[0], found[1:])  # type: ignore[arg-type]


def written_out(*ops: OpOverload) -> None:
    """Register operators that PyTorch defines in simpler ones (``torch._decomp``), whose own derivatives double from
    order to order."""
    for op in ops:

        @JetInterpreter.rules.register(op)
        def rule(jet: JetInterpreter, *args: Any, op: OpOverload = op, **kwargs: Any) -> Any:
            with running_at(jet):
                return map_tensors(jet.own, DECOMPOSITION_TABLE[op](*args, **kwargs))


written_out(
    aten.tanh_backward.default, aten.sigmoid_backward.default, aten.softplus_backward.default,
    aten.elu_backward.default, aten.gelu_backward.default, aten._softmax_backward_data.default,
    aten._log_softmax_backward_data.default, aten.native_layer_norm_backward.default,
    aten.silu.default, aten.gelu.default, aten.softplus.default, aten.elu.default,
)  # fmt: skip


def shifted(jet: JetInterpreter, x: WrapperTensor, dim: int) -> tuple[Tensor, Tensor]:
    """The logarithm of softmax before it is normalised, and its normaliser's; of values that do not overflow."""
    z = x - x.detach().amax(dim, keepdim=True)
    return z, z.exp().sum(dim, keepdim=True)


@JetInterpreter.rules.register(aten._softmax.default)
def softmax(jet: JetInterpreter, x: WrapperTensor, dim: int, half_to_float: bool) -> Any:
    with running_at(jet):
        z, total = shifted(jet, x, dim)
        return jet.own(z.exp() / total)


@JetInterpreter.rules.register(aten._log_softmax.default)
def log_softmax(jet: JetInterpreter, x: WrapperTensor, dim: int, half_to_float: bool) -> Any:
    with running_at(jet):
        z, total = shifted(jet, x, dim)
        return jet.own(z - total.log())
