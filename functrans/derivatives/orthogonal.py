"""Derivatives of the orthogonal polynomials of ``torch.special``, which PyTorch calls non-differentiable.

The derivative of a classical orthogonal polynomial is one of the same kind with other parameters (DLMF
18.9.19-18.9.27), so two operators of our own, which are polynomials of every parameter, close the table under
differentiation: no formula divides by ``1 - x * x``, and every order holds at ``x = 1``, beyond
it, and for the order 0.

The order is truncated to an integer by PyTorch, and a negative one gives 0: the value is piecewise constant in ``n``,
its derivative 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functrans.derivatives.helpers import wide
from functrans.derivatives.own_operators import own_operator
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def by_recurrence(x: Tensor, n: Tensor, step: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """``p[n]``, elementwise, where ``p[-1] = 0``, ``p[0] = 1`` and ``p[k] = step(k, p[k - 1], p[k - 2])``."""
    before, now = torch.zeros_like(x), torch.ones_like(x)
    found = torch.where(n == 0, now, 0)
    for k in range(1, int(n.max()) + 1 if n.numel() else 0):
        before, now = now, step(k, now, before)
        found = torch.where(n == k, now, found)
    return found


def prepared(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the shape and precision of the result, and the order as an integer."""
    if x.is_complex() or n.is_complex():
        raise NotImplementedError("the polynomials of torch.special are of real numbers")
    x, n = torch.broadcast_tensors(x.to(torch.result_type(x, n)), n.trunc())
    return x, n


def gegenbauer_slope(x: Tensor, n: Tensor, order: float) -> Tensor:
    return 2 * order * gegenbauer(x, n.trunc() - 1, order + 1)


def laguerre_slope(x: Tensor, n: Tensor, order: float) -> Tensor:
    return -laguerre(x, n.trunc() - 1, order + 1)


@own_operator("gegenbauer(Tensor x, Tensor n, float order) -> Tensor", gegenbauer_slope)
def gegenbauer(x: Tensor, n: Tensor, order: float) -> Tensor:
    """Gegenbauer's polynomials ``C_n`` of an ``order``, 0 for negative ``n`` (DLMF 18.9.1)."""
    x, n = prepared(x, n)
    return by_recurrence(x, n, lambda k, p, q: (2 * (k + order - 1) * x * p - (k + 2 * order - 2) * q) / k)


@own_operator("laguerre(Tensor x, Tensor n, float order) -> Tensor", laguerre_slope)
def laguerre(x: Tensor, n: Tensor, order: float) -> Tensor:
    """Associated Laguerre polynomials ``L_n`` of an ``order``, 0 for negative ``n`` (DLMF 18.9.1)."""
    x, n = prepared(x, n)
    return by_recurrence(x, n, lambda k, p, q: ((2 * k - 1 + order - x) * p - (k - 1 + order) * q) / k)


def zero(grad: Tensor) -> Tensor:
    return torch.zeros_like(grad)


derivative(gegenbauer, tangent="elementwise", x=lambda grad, x, n, order: grad * gegenbauer_slope(x, n, order), n=zero)
derivative(laguerre, tangent="elementwise", x=lambda grad, x, n, order: grad * laguerre_slope(x, n, order), n=zero)

# --------------------------------------------------------------------------------- the slopes, of an n without fraction


def chebyshev_t(x: Tensor, n: Tensor) -> Tensor:
    return n * gegenbauer(x, n - 1, 1.0)


def chebyshev_u(x: Tensor, n: Tensor) -> Tensor:
    return gegenbauer_slope(x, n, 1.0)


def chebyshev_v(x: Tensor, n: Tensor) -> Tensor:
    """``V[n] = U[n] - U[n - 1]``, for negative ``n`` too, where all are 0.

    See Mason and Handscomb, Chebyshev Polynomials, chapter 1.
    """
    return chebyshev_u(x, n) - chebyshev_u(x, n - 1)


def chebyshev_w(x: Tensor, n: Tensor) -> Tensor:
    return chebyshev_u(x, n) + chebyshev_u(x, n - 1)


SLOPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chebyshev_polynomial_t": chebyshev_t,
    "chebyshev_polynomial_u": chebyshev_u,
    "chebyshev_polynomial_v": chebyshev_v,
    "chebyshev_polynomial_w": chebyshev_w,
    "shifted_chebyshev_polynomial_t": lambda x, n: 2 * chebyshev_t(2 * x - 1, n),
    "shifted_chebyshev_polynomial_u": lambda x, n: 2 * chebyshev_u(2 * x - 1, n),
    "shifted_chebyshev_polynomial_v": lambda x, n: 2 * chebyshev_v(2 * x - 1, n),
    "shifted_chebyshev_polynomial_w": lambda x, n: 2 * chebyshev_w(2 * x - 1, n),
    "hermite_polynomial_h": lambda x, n: 2 * n * torch.special.hermite_polynomial_h(x, n - 1),
    "hermite_polynomial_he": lambda x, n: n * torch.special.hermite_polynomial_he(x, n - 1),
    "laguerre_polynomial_l": lambda x, n: laguerre_slope(x, n, 0.0),
    "legendre_polynomial_p": lambda x, n: gegenbauer_slope(x, n, 0.5),
}


def register(name: str, slope: Callable[[Tensor, Tensor], Tensor]) -> None:
    packet = getattr(aten, f"special_{name}")

    def of_number(grad: Tensor, x: Tensor, n: float) -> Tensor:
        return grad * slope(x, torch.full((), int(n), dtype=grad.dtype, device=x.device))

    derivative(packet.default, tangent="elementwise", x=lambda grad, x, n: grad * slope(x, wide(n).trunc()), n=zero)
    derivative(packet.n_scalar, tangent="elementwise", x=of_number)
    derivative(packet.x_scalar, tangent="elementwise", n=zero)


for _name, _slope in SLOPES.items():
    register(_name, _slope)
