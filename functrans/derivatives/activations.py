"""Derivatives of the activation functions.

Where PyTorch has a fused kernel for the derivative, the formula is that kernel, and the kernel has an entry of its own.
What happens at kinks follows PyTorch's derivatives table (``derivatives.yaml``) and kernels.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.helpers import add, conj, where_or_zero
from functrans.derivatives.table import derivative

aten = torch.ops.aten
pointwise = partial(derivative, tangent="elementwise")

# ------------------------------------------------------------------------------------------- piecewise linear

pointwise(aten.relu.default, self=lambda grad, result: aten.threshold_backward.default(grad, result, 0))
pointwise(
    aten.threshold.default,
    self=lambda grad, self, threshold: aten.threshold_backward.default(grad, self, threshold),
)
pointwise(
    aten.threshold_backward.default,
    grad_output=lambda grad, self, threshold: aten.threshold_backward.default(grad, self, threshold),
    self=lambda grad: torch.zeros_like(grad),
)

pointwise(
    aten.leaky_relu.default,
    self=lambda grad, self, negative_slope: aten.leaky_relu_backward.default(grad, self, negative_slope, False),
)
pointwise(
    aten.leaky_relu_backward.default,
    grad_output=lambda grad, self, negative_slope, self_is_result: aten.leaky_relu_backward.default(
        grad, self, negative_slope, self_is_result
    ),
    self=lambda grad: torch.zeros_like(grad),
)

pointwise(
    aten.hardtanh.default,
    self=lambda grad, self, min_val, max_val: aten.hardtanh_backward.default(grad, self, min_val, max_val),
)
pointwise(
    aten.hardtanh_backward.default,
    grad_output=lambda grad, self, min_val, max_val: aten.hardtanh_backward.default(grad, self, min_val, max_val),
    self=lambda grad: torch.zeros_like(grad),
)

# not by its kernel, which PyTorch cannot differentiate


def within_three(self: Tensor, x: Tensor) -> Tensor:
    """``x`` where ``self`` lies between -3 and 3, and 0 elsewhere."""
    return where_or_zero(self > -3, where_or_zero(self < 3, x))


pointwise(aten.hardsigmoid.default, self=lambda grad, self: within_three(self, grad / 6))

# With lambd 0 both are the identity, at 0 too, where their kernels have the slope 0.
pointwise(
    aten.softshrink.default,
    self=lambda grad, self, lambd: grad if lambd == 0 else aten.softshrink_backward.default(grad, self, lambd),
)
pointwise(
    aten.softshrink_backward.default,
    grad_output=lambda grad, self, lambd: aten.softshrink_backward.default(grad, self, lambd),
    self=lambda grad: torch.zeros_like(grad),
)

pointwise(
    aten.hardshrink.default,
    self=lambda grad, self, lambd: grad if lambd == 0 else aten.hardshrink_backward.default(grad, self, lambd),
)
pointwise(
    aten.hardshrink_backward.default,
    grad_out=lambda grad, self, lambd: aten.hardshrink_backward.default(grad, self, lambd),
    self=lambda grad: torch.zeros_like(grad),
)

pointwise(
    aten._prelu_kernel.default,
    self=lambda grad, self, weight: torch.where(self > 0, grad, grad * weight),
    weight=lambda grad, self: torch.where(self > 0, 0, grad * self),
)

pointwise(aten.hardswish.default, self=lambda grad, self: aten.hardswish_backward.default(grad, self))
pointwise(
    aten.hardswish_backward.default,
    grad_output=lambda grad, self: aten.hardswish_backward.default(grad, self),
    self=lambda grad, grad_output, self: within_three(self, grad * grad_output / 3),
)

# ------------------------------------------------------------------------------------------- smooth

pointwise(aten.sigmoid.default, self=lambda grad, result: aten.sigmoid_backward.default(grad, result))


def sigmoid_backward_tangent(
    grad_output: Tensor, output: Tensor, grad_output_t: Tensor | None, output_t: Tensor | None
) -> Tensor | None:
    first = None if grad_output_t is None else aten.sigmoid_backward.default(grad_output_t, output)
    return add(first, None if output_t is None else grad_output * conj((1 - 2 * output) * output_t))


# ``g * conj(y * (1 - y))``, which is not holomorphic in ``y``
derivative(
    aten.sigmoid_backward.default,
    broadcasts=True,
    tangent=sigmoid_backward_tangent,
    grad_output=lambda grad, output: aten.sigmoid_backward.default(grad, conj(output)),
    output=lambda grad, grad_output, output: conj(grad) * (grad_output * conj(1 - 2 * output)),
)

# log(sigmoid(x))' = sigmoid(-x), which neither overflows nor cancels
pointwise(aten.log_sigmoid.default, self=lambda grad, self: grad * torch.sigmoid(-self))


# The second output is exp(-|x|) for the backward pass; where that does not use it, it is empty.


def slope_of_buffer(self: Tensor, buffer: Tensor) -> Tensor | None:
    return -self.sign() * buffer if buffer.numel() else None


def log_sigmoid_forward_self(grads: Any, self: Tensor, results: Any) -> Tensor | None:
    found = None if grads[0] is None else grads[0] * torch.sigmoid(-self)
    slope = None if grads[1] is None else slope_of_buffer(self, results[1])
    return found if slope is None else add(found, grads[1] * slope)


def log_sigmoid_forward_tangent(self: Tensor, self_t: Tensor, results: Any) -> tuple[Tensor, Tensor | None]:
    slope = slope_of_buffer(self, results[1])
    return self_t * torch.sigmoid(-self), None if slope is None else self_t * slope


derivative(
    aten.log_sigmoid_forward.default,
    tangent=log_sigmoid_forward_tangent,
    self=log_sigmoid_forward_self,
)


def silu_self(grad: Tensor, self: Tensor) -> Tensor:
    s = torch.sigmoid(self)
    return grad * conj(s * (1 + self * (1 - s)))


def mish_self(grad: Tensor, self: Tensor) -> Tensor:
    t = aten.softplus.default(self).tanh()
    return grad * (t + self * torch.sigmoid(self) * (1 - t * t))


pointwise(aten.silu.default, self=silu_self)
pointwise(aten.mish.default, self=mish_self)

pointwise(
    aten.softplus.default,
    self=lambda grad, self, beta, threshold: aten.softplus_backward.default(grad, self, beta, threshold),
)


def softplus_backward_self(grad: Tensor, grad_output: Tensor, self: Tensor, beta: Any, threshold: Any) -> Tensor:
    x = self * beta
    s = torch.sigmoid(x)
    return where_or_zero(x < threshold, grad * grad_output * beta * s * (1 - s))


pointwise(
    aten.softplus_backward.default,
    grad_output=lambda grad, self, beta, threshold: aten.softplus_backward.default(grad, self, beta, threshold),
    self=softplus_backward_self,
)

pointwise(
    aten.elu.default,
    self=lambda grad, self, alpha, scale, input_scale: aten.elu_backward.default(
        grad, alpha, scale, input_scale, False, self
    ),
)
pointwise(
    aten.celu.default,
    self=lambda grad, self, alpha: aten.elu_backward.default(grad, alpha, 1, 1 / alpha, False, self),
)


def elu_backward_self(
    grad: Tensor, grad_output: Tensor, alpha: Any, scale: Any, input_scale: Any, is_result: bool, self_or_result: Tensor
) -> Tensor:
    below = self_or_result < 0
    both = grad * grad_output * input_scale
    if not is_result:
        both = aten.elu_backward.default(both, alpha, scale, input_scale, False, self_or_result)
    return where_or_zero(below, both)


pointwise(
    aten.elu_backward.default,
    grad_output=lambda grad, alpha, scale, input_scale, is_result, self_or_result: aten.elu_backward.default(
        grad, alpha, scale, input_scale, is_result, self_or_result
    ),
    self_or_result=elu_backward_self,
)

pointwise(
    aten.gelu.default,
    self=lambda grad, self, approximate: run(aten.gelu_backward.default, grad, self, approximate=approximate),
)

KAPPA = 0.044715
BETA = math.sqrt(2 / math.pi)


def gelu_backward_self(grad: Tensor, grad_output: Tensor, self: Tensor, approximate: str) -> Tensor:
    """The second derivative: ``pdf(x) * (2 - x²)``; with tanh, ``u = BETA * (x + KAPPA * x³)`` differentiated twice."""
    square = self * self
    if approximate == "none":
        second = (square * -0.5).exp() * (2 - square) / math.sqrt(2 * math.pi)
    else:
        t = (BETA * (self + KAPPA * square * self)).tanh()
        slope = BETA * (1 + 3 * KAPPA * square)
        second = (1 - t * t) * (slope + 3 * BETA * KAPPA * square - self * t * slope * slope)
    return grad * grad_output * second


pointwise(
    aten.gelu_backward.default,
    grad_output=lambda grad, self, approximate: run(aten.gelu_backward.default, grad, self, approximate=approximate),
    self=gelu_backward_self,
)


def glu_self(grad: Tensor, self: Tensor, dim: int) -> Tensor:
    value, gate = self.chunk(2, dim)
    s = torch.sigmoid(gate)
    of_value = grad * s
    return torch.cat([of_value, of_value * value * (1 - s)], dim)


def glu_tangent(self: Tensor, self_t: Tensor, dim: int) -> Tensor:
    value, gate = self.chunk(2, dim)
    value_t, gate_t = self_t.chunk(2, dim)
    s = torch.sigmoid(gate)
    return value_t * s + gate_t * value * s * (1 - s)


derivative(aten.glu.default, tangent=glu_tangent, self=glu_self)
