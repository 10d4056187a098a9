"""Derivative of the leaky ReLU with random slopes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.table import derivative

aten = torch.ops.aten


def rrelu_self(grads: Any, self: Tensor, results: Any, lower: Any, upper: Any, training: bool) -> Tensor | None:
    # The slopes that were drawn are the second output; PyTorch's formula reads the argument, which here is not written.
    return None if grads[0] is None else rrelu_slope(grads[0], self, results[1], lower, upper, training)


def rrelu_slope(x: Tensor, self: Tensor, noise: Tensor, lower: Any, upper: Any, training: bool) -> Tensor:
    if training:
        return x * noise
    return aten.leaky_relu_backward.default(x, self, (lower + upper) / 2, False)


def rrelu_tangent(
    self: Tensor, results: Any, lower: Any, upper: Any, training: bool, self_t: Tensor | None
) -> tuple[Tensor | None, None]:
    return None if self_t is None else rrelu_slope(self_t, self, results[1], lower, upper, training), None


derivative(aten.rrelu_with_noise_functional.default, tangent=rrelu_tangent, self=rrelu_self)
