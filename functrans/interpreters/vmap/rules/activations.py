"""Derivatives of activations, and activations that are not plainly pointwise (the others: ``pointwise.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.elementwise import elementwise
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, materialize, to_front

aten = torch.ops.aten

# The weight has the input's rank and is broadcast.
elementwise(
    aten._prelu_kernel.default,
    aten._prelu_kernel_backward.default,
)

# Kernels that do not all broadcast.
elementwise(
    aten._standard_gamma_grad.default,
    aten.elu_backward.default,
    aten.gelu_backward.default,
    aten.hardshrink_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
    aten.infinitely_differentiable_gelu_backward.default,
    aten.leaky_relu_backward.default,
    aten.logit_backward.default,
    aten.mish_backward.default,
    aten.native_dropout_backward.default,
    aten.rrelu_with_noise_backward.default,
    aten.sigmoid_backward.default,
    aten.silu_backward.default,
    aten.softplus_backward.default,
    aten.softshrink_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
    expand=True,
)


@batching_rule(aten.log_sigmoid_forward.default)
def log_sigmoid_forward(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[Any, Any]:
    """The buffer is as large as the input on CPU and empty on CUDA."""
    x = to_front(x, in_dims[0])
    output, buffer = aten.log_sigmoid_forward.default(x)
    return (output, buffer), (0, 0 if buffer.shape == x.shape else None)


@batching_rule(aten.log_sigmoid_backward.default)
def log_sigmoid_backward(
    info: BatchInfo, in_dims: Sequence[Any], grad: Tensor, x: Tensor, buffer: Tensor
) -> tuple[Any, Any]:
    """As above; the kernel does not broadcast."""
    grad = materialize(grad, in_dims[0], info.batch_size)
    x = materialize(x, in_dims[1], info.batch_size)
    if in_dims[2] is not None or buffer.shape == x.shape[1:]:
        buffer = materialize(buffer, in_dims[2], info.batch_size)
    if grad.shape != x.shape or buffer.shape not in (x.shape, (0,)):
        raise RuleDeclined("log_sigmoid_backward: its tensors have different shapes")
    return aten.log_sigmoid_backward.default(grad, x, buffer), 0
