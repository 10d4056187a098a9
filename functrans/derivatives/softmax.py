"""Derivatives of softmax and log_softmax.

The Jacobian of softmax is symmetric, so the fused backward operator serves forward mode too. Its own entry is plain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.helpers import cast
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim, keepdim=True)


# The result may have another dtype than self (``dtype=``, ``half_to_float``).


def softmax_self(grad: Tensor, self: Tensor, result: Tensor, dim: int) -> Tensor:
    return cast(run(aten._softmax_backward_data.default, grad, result, dim, grad.dtype), self.dtype)


def softmax_tangent(result: Tensor, dim: int, self_t: Tensor) -> Tensor:
    return run(aten._softmax_backward_data.default, cast(self_t, result.dtype), result, dim, result.dtype)


def log_softmax_self(grad: Tensor, self: Tensor, result: Tensor, dim: int) -> Tensor:
    return cast(run(aten._log_softmax_backward_data.default, grad, result, dim, grad.dtype), self.dtype)


def log_softmax_tangent(result: Tensor, dim: int, self_t: Tensor) -> Tensor:
    self_t = cast(self_t, result.dtype)
    return self_t - _sum(result.exp() * self_t, dim)


for _op in (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default):
    derivative(_op, tangent=softmax_tangent, self=softmax_self)
for _op in (aten.log_softmax.int, aten._log_softmax.default):
    derivative(_op, tangent=log_softmax_tangent, self=log_softmax_self)


# The backward operators: y g - y sum(y g), and g - exp(y) sum(g).


def softmax_backward_output(grad: Tensor, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    inner = grad_output - _sum(output * grad_output, dim)
    return grad * inner - grad_output * _sum(grad * output, dim)


def softmax_backward_tangent(
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    input_dtype: torch.dtype,
    result: Tensor,
    grad_output_t: Tensor | None,
    output_t: Tensor | None,
) -> Tensor | None:
    moved = None
    if grad_output_t is not None:
        moved = run(aten._softmax_backward_data.default, grad_output_t, output, dim, input_dtype)
    if output_t is not None:
        product = output_t * grad_output
        term = product - output_t * _sum(output * grad_output, dim) - output * _sum(product, dim)
        term = cast(term, result.dtype)
        moved = term if moved is None else moved + term
    return moved


def log_softmax_backward_tangent(
    grad_output: Tensor,
    output: Tensor,
    dim: int,
    result: Tensor,
    grad_output_t: Tensor | None,
    output_t: Tensor | None,
) -> Tensor:
    moved = None
    if grad_output_t is not None:
        moved = grad_output_t - output.exp() * _sum(grad_output_t, dim)
    if output_t is not None:
        term = -output.exp() * output_t * _sum(grad_output, dim)
        moved = term if moved is None else moved + term
    return cast(moved, result.dtype)  # type: ignore[arg-type]  # one of the two has a tangent


derivative(
    aten._softmax_backward_data.default,
    tangent=softmax_backward_tangent,
    broadcasts=True,
    grad_output=lambda grad, output, dim: run(
        aten._softmax_backward_data.default, cast(grad, output.dtype), output, dim, output.dtype
    ),
    output=softmax_backward_output,
)
derivative(
    aten._log_softmax_backward_data.default,
    tangent=log_softmax_backward_tangent,
    broadcasts=True,
    grad_output=lambda grad, output, dim: grad - _sum(grad * output.exp(), dim),
    output=lambda grad, grad_output, output, dim: -grad * output.exp() * _sum(grad_output, dim),
)
