"""Frequent composites as the operators that they are, sent on by Python calls.

PyTorch's own definition of a composite says the same; but it is run through the dispatcher, and what it calls comes in
by the door again, which takes as long as a small operator. A definition here is for the frequent arguments, as they
come by position; it returns NotImplemented for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten
#: ``send(op, *args)`` runs an operator at the level that takes the composite apart.
Send = Callable[..., Any]

SENT_DOWN: dict[OpOverload, Callable[..., Any]] = {}


def sent_down(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let ``define(send, *args)`` be what ``op`` comes to."""

    def register(define: Callable[..., Any]) -> Callable[..., Any]:
        SENT_DOWN[op] = define
        return define

    return register


def sizes(given: Any, rank: int) -> list[int]:
    """A number for each dimension."""
    return [given] * rank if isinstance(given, int) else list(given) * (rank if len(given) == 1 else 1)


def convolution(op: OpOverload) -> None:
    """Define a layer that is ``convolution`` with other options, which stand in its schema behind the bias."""
    names = [argument.name for argument in op._schema.arguments[3:]]
    transposed = "output_padding" in names

    @sent_down(op)
    def define(send: Send, x: Tensor, weight: Tensor, bias: Tensor | None = None, *given: Any) -> Any:
        rank = weight.dim() - 2
        if x.dim() != rank + 2 or x.is_complex() or (bias is not None and bias.dtype is not x.dtype):
            return NotImplemented
        options = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
        options.update(zip(names, given, strict=False))
        groups = options.pop("groups")
        stride, padding, dilation, output_padding = (sizes(option, rank) for option in options.values())
        return send(
            aten.convolution.default, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
        )


for _op in (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
):  # fmt: skip
    convolution(_op)


#: Those whose own definition asks for a bit that a wrapper does not show inside of PyTorch.
OF_BITS = frozenset((aten.resolve_conj.default, aten.resolve_neg.default, aten.real.default, aten.imag.default))


@sent_down(aten.resolve_conj.default)
def resolve_conj(send: Send, z: Tensor) -> Tensor:
    """Inside of PyTorch a wrapper does not show that its value is a lazy conjugate, and its definition would be z."""
    return send(aten.clone.default, z) if z.is_conj() else z


@sent_down(aten.resolve_neg.default)
def resolve_neg(send: Send, x: Tensor) -> Tensor:
    return send(aten.clone.default, x) if x.is_neg() else x


@sent_down(aten.real.default)
def real(send: Send, z: Tensor) -> Tensor:
    return part(send, z, 0)


@sent_down(aten.imag.default)
def imag(send: Send, z: Tensor) -> Tensor:
    return part(send, z, 1)


def part(send: Send, z: Tensor, which: int) -> Any:
    if not z.is_complex():
        return NotImplemented
    return send(aten.select.int, send(aten.view_as_real.default, resolve_conj(send, z)), -1, which)


@sent_down(aten.layer_norm.default)
def layer_norm(
    send: Send,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return send(aten.native_layer_norm.default, x, normalized_shape, weight, bias, eps)[0]


@sent_down(aten.cross_entropy_loss.default)
def cross_entropy(
    send: Send,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """For labels of one or a row of examples; PyTorch's definition is four composites deep."""
    if label_smoothing or target.dtype.is_floating_point or x.dim() > 2 or x.dim() == 0:
        return NotImplemented
    logs = send(aten.log_softmax.int, x, x.dim() - 1, x.dtype)
    return send(aten.nll_loss_forward.default, logs, target, weight, reduction, ignore_index)[0]
