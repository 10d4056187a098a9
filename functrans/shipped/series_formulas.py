"""What functrans.shipped.power_series knows of operators beside the derivative table: where that asks for more work
than there is, or for a kernel that would have to be differentiated in its turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from functrans.programs.tracing import Untraceable
from functrans.shipped.power_series import DEFINITIONS, FORMULAS

aten = torch.ops.aten

# --- operators that are others: functions of their operands -----------------------------------------------------------


def power(x: Any, exponent: Any) -> Any:
    """Small whole powers are products."""
    if type(exponent) not in (int, float) or exponent not in range(1, 9):
        return None
    if exponent == 1:
        return x
    half = power(x, exponent // 2)
    return half * half if exponent % 2 == 0 else half * half * x


DEFINITIONS[aten.square.default] = lambda x: x * x
DEFINITIONS[aten.pow.Tensor_Scalar] = power
DEFINITIONS[aten.addcmul.default] = lambda x, a, b: x + a * b
DEFINITIONS[aten.threshold_backward.default] = lambda grad, x, threshold: aten.where.ScalarSelf(x <= threshold, 0, grad)

# --- derivatives: functions of that of the operand, of the operands and of the result ---------------------------------


def power_slope(grad: Any, x: Any, exponent: Any, y: Any) -> Any:
    """By the result where there is a pole at 0 anyway."""
    return grad * exponent * y / x if exponent < 0 else grad * exponent * x.pow(exponent - 1)


def exponential_slope(grad: Any, base: Any, x: Any, y: Any) -> Any:
    if not base > 0:
        raise Untraceable(aten.pow.Scalar)
    return grad * y * math.log(base)


def gelu_slope(grad: Any, x: Any, y: Any) -> Any:
    """Of x·Φ(x), with the normal distribution's Φ: Φ + x·φ."""
    density = (x * x * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
    return grad * ((x * math.sqrt(0.5)).erf() * 0.5 + 0.5 + x * density)


def completed(rest: Sequence[Any], *defaults: Any) -> list[Any]:
    """The numbers that an operator was given before its result, and the defaults of those left out."""
    return [*rest[:-1], *defaults[len(rest) - 1 :]]


def softplus_slope(grad: Any, x: Any, *rest: Any) -> Any:
    beta, threshold = completed(rest, 1.0, 20.0)
    return aten.where.ScalarSelf(x * beta > threshold, 1, (x * beta).sigmoid()) * grad


def elu_slope(grad: Any, x: Any, *rest: Any) -> Any:
    alpha, scale, input_scale = completed(rest, 1.0, 1.0, 1.0)
    # what is not chosen does not overflow
    below = (aten.where.ScalarSelf(x > 0, 0, x) * input_scale).exp() * (scale * alpha * input_scale)
    return aten.where.ScalarSelf(x > 0, scale, below) * grad


FORMULAS[aten.rsqrt.default] = lambda grad, x, y: grad * -0.5 * y / x
FORMULAS[aten.pow.Tensor_Scalar] = power_slope
FORMULAS[aten.pow.Scalar] = exponential_slope
FORMULAS[aten.gelu.default] = gelu_slope
FORMULAS[aten.softplus.default] = softplus_slope
FORMULAS[aten.elu.default] = elu_slope
