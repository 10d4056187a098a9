"""Derivatives of a function of one number by every mix of forward and reverse mode, against the function's own values.

Nothing but values is asked of the function: the truth is the derivative of the polynomial through its values at
Chebyshev points around 0. A program in tensors becomes such a function by a curve through its arguments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans import grad, jvp

Scalar = Callable[[Tensor], Tensor]
POINTS = 15


def derivative(f: Scalar, mix: str) -> Scalar:
    """``f`` differentiated once per letter, the innermost first: ``f`` for forward mode, ``r`` for reverse mode."""
    for letter in mix:
        f = (lambda t, f=f: jvp(f, (t,), (torch.ones_like(t),))[1]) if letter == "f" else grad(f)
    return f


def truth(f: Scalar, order: int, radius: float) -> list[float]:
    """The derivatives at 0 up to ``order``, by interpolation within ``radius``."""
    nodes = torch.cos(math.pi * (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS)
    values = torch.stack([f(x * radius) for x in nodes])
    coefficients = torch.linalg.solve(torch.linalg.vander(nodes), values)
    return [float(coefficients[n]) * math.factorial(n) / radius**n for n in range(order + 1)]


def along(f: Callable[..., Any], args: Sequence[Any], moving: Sequence[int] | None = None, seed: int = 0) -> Scalar:
    """``f``'s outputs, weighted and summed, as a function of the place on a curve through ``args``; ``moving``:
    which of them move.
    """
    make = torch.Generator().manual_seed(seed)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=make)

    def floats(i: int) -> bool:
        return isinstance(args[i], Tensor) and (args[i].is_floating_point() or args[i].is_complex())

    moving = [i for i in range(len(args)) if floats(i)] if moving is None else moving
    directions = {i: (noise(args[i]), noise(args[i]) * 0.5) for i in moving}

    def weighted(out: Any) -> Tensor:
        outs = [o for o in ([out] if isinstance(out, Tensor) else out) if o.is_floating_point() or o.is_complex()]
        weights = torch.Generator().manual_seed(1)
        total: Any = 0
        for o in outs:
            product = o * torch.randn(o.shape, dtype=o.dtype, generator=weights)
            total = total + (product.real if product.is_complex() else product).sum()
        return total

    def curve(t: Tensor) -> Tensor:
        moved = [
            a + t * directions[i][0] + t * t * directions[i][1] if i in directions else a for i, a in enumerate(args)
        ]
        return weighted(f(*moved))

    return curve


def check_mixes(f: Scalar, order: int = 3, radius: float = 0.1, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Every mix up to ``order`` gives the derivatives at 0 of ``f``'s values."""
    expected = truth(f, order, radius)
    scale = max(map(abs, expected[1:]))
    wrong = []
    for n in range(1, order + 1):
        for mix in map("".join, itertools.product("fr", repeat=n)):
            got = float(derivative(f, mix)(torch.zeros((), dtype=torch.float64)))
            if not abs(got - expected[n]) <= atol + rtol * max(abs(expected[n]), scale):
                wrong.append(f"{mix}: {got:.6g}, truth {expected[n]:.6g}")
    assert not wrong, "; ".join(wrong)
