"""Series, and what takes their place where they do not hold: for formulas that lose digits in one region only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def power_series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The sum of ``coefficients[k] * x ** k``."""
    *rest, second, last = coefficients
    total = x * last + second
    for c in reversed(rest):
        total = total * x + c
    return total


def even_or(quotient: Callable[[Tensor], Tensor], x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """``quotient(x)``; for ``abs(x) < 1`` its series in ``x * x``."""
    small = x.abs() < 1
    near = torch.where(small, x, 0)
    return torch.where(small, power_series(near * near, coefficients), quotient(torch.where(small, 1, x)))
