"""Derivatives of Hurwitz's zeta function ``sum((q + k) ** -s)``, by ``s`` too, for which PyTorch has no formula.

By the formula of Euler and Maclaurin (DLMF 25.11.5), each of whose terms is differentiated ``n`` times by ``s``. With
``n`` as a parameter that is an operator of our own, which closes the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import wide
from functrans.derivatives.own_operators import own_operator
from functrans.derivatives.table import derivative

aten = torch.ops.aten

#: how many terms are summed before the formula takes over
TERMS = 12
#: Bernoulli's numbers of order 2, 4, ..., divided by the factorial of their order
BERNOULLI = [
    1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600,
    -3617 / 10670622842880000, 43867 / 5109094217170944000,
]  # fmt: skip


def product_slopes(n: int, a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The ``n``-th derivative of a product, from those of its factors."""
    return sum((math.comb(n, i) * a[i] * b[n - i] for i in range(n + 1)), torch.zeros_like(b[0]))


def zeta_by_q(s: Tensor, q: Tensor, n: int) -> Tensor:
    """The slope of ``zeta_by_s(s, q, n)`` by ``q``: from ``-s * zeta(s + 1, q)``, ``n`` times by ``s``."""
    s = wide(s)
    slope = -s * zeta_by_s(s + 1, q, n)
    return slope - n * (zeta_by_s(s + 1, q, n - 1) if n > 1 else torch.special.zeta(s + 1, q))


def next_by_s(s: Tensor, q: Tensor, n: int) -> Tensor:
    return zeta_by_s(s, q, n + 1)


@own_operator("zeta_by_s(Tensor s, Tensor q, int n) -> Tensor", next_by_s, zeta_by_q)
def zeta_by_s(s: Tensor, q: Tensor, n: int) -> Tensor:
    """The ``n``-th derivative of ``zeta(s, q)`` by ``s``; NaN where ``q`` is not positive."""
    dtype = torch.result_type(s, q)
    s, q = torch.broadcast_tensors(s.double(), q.double())
    total = torch.zeros_like(s)
    for k in range(TERMS):
        log = (q + k).log()
        total = total + (-log) ** n * (-s * log).exp()
    w = q + TERMS
    log = w.log()
    power = (-s * log).exp()
    powers = [(-log) ** i * power for i in range(n + 1)]
    poles = [(-1) ** i * math.factorial(i) / (s - 1) ** (i + 1) for i in range(n + 1)]
    total = total + w * product_slopes(n, poles, powers) + powers[n] / 2
    # of s * (s + 1) * ... * (s + m - 1), and its derivatives, divided by w ** m
    rising = [s / w, 1 / w, *(torch.zeros_like(s) for _ in range(n))][: n + 1]
    for j, c in enumerate(BERNOULLI):
        total = total + c * product_slopes(n, rising, powers)
        for m in (2 * j + 1, 2 * j + 2):
            rising = [(x * (s + m) + (i * rising[i - 1] if i else 0)) / w for i, x in enumerate(rising)]
    return torch.where(q > 0, total, math.nan).to(dtype)


def as_tensor(x: Any, like: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.full_like(like, x)


def zeta_s(grad: Tensor, self: Any, other: Any) -> Tensor:
    return grad * zeta_by_s(self, as_tensor(other, self), 1)


def zeta_q(grad: Tensor, self: Any, other: Tensor) -> Tensor:
    self = wide(self)
    return grad * (-self * torch.special.zeta(self + 1, other))


derivative(aten.special_zeta.default, tangent="elementwise", self=zeta_s, other=zeta_q)
derivative(aten.special_zeta.other_scalar, tangent="elementwise", self=zeta_s)
derivative(aten.special_zeta.self_scalar, tangent="elementwise", other=zeta_q)
derivative(
    zeta_by_s,
    tangent="elementwise",
    s=lambda grad, s, q, n: grad * next_by_s(s, q, n),
    q=lambda grad, s, q, n: grad * zeta_by_q(s, q, n),
)
