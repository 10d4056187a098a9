"""The level of intervals, and arithmetic on their ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from functrans.core.stack import run_transformed
from functrans.core.tensor import WrapperTensor
from functrans.extension.table_interpreter import TableInterpreter
from functrans.operators.rules import RuleTable
from functrans.pytorch.thread_state import lowered

Ends = tuple[Tensor, Tensor]


class IntervalLevel(TableInterpreter):
    """Its wrappers stand for all numbers between ``value`` and ``upper``; between False and True are both."""

    kind = "bounds"
    payload: ClassVar[tuple[str, ...]] = ("upper",)
    rules = RuleTable("interval rules", default="decompose")

    @staticmethod
    def ends(x: Any) -> Ends:
        return (x.value, x.value) if x.upper is None else (x.value, x.upper)

    def between(self, low: Tensor, high: Tensor) -> WrapperTensor:
        return self.carry(low, upper=high)

    def input(self, low: Tensor, high: Tensor) -> WrapperTensor:
        """An argument of the function."""
        return self.between(low, high)

    def output(self, x: Tensor) -> Ends:
        """The ends of what the function returned."""
        return self.ends(self.own(x))


rule = IntervalLevel.rules.register
ends = IntervalLevel.ends


def image(f: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Ends:
    """Bounds of what a function in plain ``torch`` returns, in a rule."""
    level = IntervalLevel(f)

    def body() -> Ends:
        with lowered(level):
            x = level.input(low, high)
        out = f(x)
        with lowered(level):
            return level.output(out)

    return run_transformed(level, body)


def is_interval(x: Any) -> bool:
    return type(x) is WrapperTensor and isinstance(x.interpreter, IntervalLevel) and x.upper is not None


def low_of(x: Any) -> Any:
    return x.value if type(x) is WrapperTensor and isinstance(x.interpreter, IntervalLevel) else x


def high_of(x: Any) -> Any:
    return x.upper if is_interval(x) else low_of(x)


def hull(*ends_: Tensor) -> Ends:
    """From the least to the greatest."""
    low, high = ends_[0], ends_[0]
    for end in ends_[1:]:
        low, high = torch.minimum(low, end), torch.maximum(high, end)
    return low, high


def times(x: Ends, y: Ends) -> Ends:
    def product(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).masked_fill((a == 0) | (b == 0), 0)  # 0 times infinity: no number in between is infinite

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
