"""The derivative of Airy's function ``Ai``, which PyTorch calls non-differentiable.

PyTorch has no ``Ai'``, so it is an operator of our own. From it every order follows, since ``Ai'' = x * Ai``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from functrans.derivatives.own_operators import own_operator
from functrans.derivatives.series import power_series
from functrans.derivatives.table import derivative

aten = torch.ops.aten

#: Ai and Ai' at -10, -9, ..., 10 (computed with 40 digits)
CENTERS = (
    (0.04024123848644319, 0.99626504413279), (-0.022133721547341403, -0.9756639809263316),
    (-0.0527050503563862, 0.9355609381983065), (0.18428083525050565, -0.7710081684101265),
    (-0.3291451736298231, 0.3459354872813429), (0.35076100902411433, 0.32719281855444315),
    (-0.07026553294928951, -0.7906285753685813), (-0.37881429367765806, 0.3145837692165988),
    (0.22740742820168558, 0.618259020741691), (0.5355608832923521, -0.01016056711664521),
    (0.3550280538878172, -0.2588194037928068), (0.13529241631288141, -0.1591474412967932),
    (0.03492413042327438, -0.05309038443365363), (0.006591139357460719, -0.011912976705951319),
    (0.0009515638512048018, -0.001958640950204179), (0.00010834442813607442, -0.0002474138908684625),
    (9.947694360252889e-06, -2.4765200397034955e-05), (7.492128863997167e-07, -2.008150894738792e-06),
    (4.6922076160992316e-08, -1.3414392979067865e-07), (2.47116843087249e-09, -7.480641389658946e-09),
    (1.1047532552898686e-10, -3.5206336767389237e-10),
)  # fmt: skip
LAST = 10
TERMS = 24


def asymptotic_coefficients() -> list[float]:
    """``v[k]`` of DLMF 9.7.2."""
    found, u = [], 1.0
    for k in range(TERMS):
        found.append(u * (6 * k + 1) / (1 - 6 * k))
        u *= (6 * k + 1) * (6 * k + 3) * (6 * k + 5) / (216 * (k + 1) * (2 * k + 1))
    return found


V = asymptotic_coefficients()


def near(x: Tensor) -> Tensor:
    """The Taylor series about the nearest integer, whose coefficients follow from ``y'' = x * y``."""
    center = x.round()
    h = x - center
    table = torch.tensor(CENTERS, dtype=x.dtype, device=x.device)
    a, b = table[(center + LAST).long()].unbind(-1)
    before = torch.zeros_like(a)  # before, a, b: the coefficients k - 1, k and k + 1
    total, power = b, torch.ones_like(h)
    for k in range(TERMS):
        before, a, b = a, b, (center * a + before) / ((k + 1) * (k + 2))
        power = power * h
        total = total + (k + 2) * b * power
    return total


def far_right(x: Tensor) -> Tensor:
    """DLMF 9.7.6."""
    zeta = x * x.sqrt() * (2 / 3)
    return -x.pow(0.25) * (-zeta).exp() / (2 * math.sqrt(math.pi)) * power_series(-1 / zeta, V)


def far_left(x: Tensor) -> Tensor:
    """DLMF 9.7.10, of ``-x``."""
    zeta = x * x.sqrt() * (2 / 3)
    angle = zeta - math.pi / 4
    square = -1 / (zeta * zeta)
    even, odd = power_series(square, V[::2]), power_series(square, V[1::2]) / zeta
    return x.pow(0.25) / math.sqrt(math.pi) * (angle.sin() * even - angle.cos() * odd)


def slope_of_slope(x: Tensor) -> Tensor:
    return x * torch.special.airy_ai(x)


@own_operator("airy_ai_slope(Tensor x) -> Tensor", slope_of_slope)
def airy_ai_slope(x: Tensor) -> Tensor:
    """``Ai'(x)``."""
    y = x.double()
    far = y.abs().clamp(min=LAST)
    found = torch.where(y < 0, far_left(far), far_right(far))
    found = torch.where(y.abs() <= LAST, near(y.nan_to_num().clamp(-LAST, LAST)), found)
    return torch.where(y == math.inf, 0, found).to(x.dtype)


derivative(aten.special_airy_ai.default, tangent="elementwise", x=lambda grad, x: grad * airy_ai_slope(x))
derivative(airy_ai_slope, tangent="elementwise", x=lambda grad, x: grad * slope_of_slope(x))
