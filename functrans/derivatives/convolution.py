"""Derivatives of convolutions.

A convolution is bilinear in input and weight, and ``convolution_backward`` is its two transposes in one operator. Each
of those is bilinear again, so that two entries give every order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.helpers import cast
from functrans.derivatives.matmul import sum_of
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative

aten = torch.ops.aten

OPTIONS = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
INPUT, WEIGHT, BIAS = [True, False, False], [False, True, False], [False, False, True]


def forward(v: dict[str, Any], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return run(aten.convolution.default, input, weight, bias, *(v[n] for n in OPTIONS))


def backward(v: dict[str, Any], grad: Tensor, input: Tensor, weight: Tensor, mask: list[bool]) -> Any:
    return run(aten.convolution_backward.default, grad, input, weight, None, *(v[n] for n in OPTIONS), mask)


def over_channels(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.dim())])


def per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(-1, *[1] * (like.dim() - 2)).expand(like.shape)


def tangent(v: dict[str, Any]) -> Tensor | None:
    input_t, weight_t, bias_t = v["input_t"], v["weight_t"], v["bias_t"]
    if input_t is not None:
        first = forward(v, input_t, v["weight"], bias_t)
        return first if weight_t is None else first + forward(v, v["input"], weight_t)
    if weight_t is not None:
        return forward(v, v["input"], weight_t, bias_t)
    return None if bias_t is None else per_channel(bias_t, v["result"])


def of_bias(grad: Tensor, bias: Tensor) -> Tensor:
    return cast(over_channels(grad), bias.dtype)  # some kernels take a bias of another dtype


def cotangents(v: dict[str, Any]) -> dict[str, Tensor]:
    """Of input and weight by one operator."""
    wanted = v["wanted"]
    of_input, of_weight, _ = backward(
        v, v["grad"], v["input"], v["weight"], ["input" in wanted, "weight" in wanted, False]
    )
    return {"input": of_input, "weight": of_weight, "bias": of_bias(v["grad"], v["bias"]) if "bias" in wanted else None}


derivative(
    aten.convolution.default,
    joint=with_names(("grad", "input", "weight", "bias", "wanted", *OPTIONS), cotangents),
    tangent=with_names(("input", "weight", "result", "input_t", "weight_t", "bias_t", *OPTIONS), tangent),
    input=with_names(
        ("grad", "input", "weight", *OPTIONS), lambda v: backward(v, v["grad"], v["input"], v["weight"], INPUT)[0]
    ),
    weight=with_names(
        ("grad", "input", "weight", *OPTIONS), lambda v: backward(v, v["grad"], v["input"], v["weight"], WEIGHT)[1]
    ),
    bias=of_bias,
)


def backward_grad_output(v: dict[str, Any]) -> Tensor | None:
    of_input, of_weight, of_bias = v["grads"]
    terms = [
        None if of_input is None else forward(v, of_input, v["weight"], of_bias),
        None if of_weight is None else forward(v, v["input"], of_weight, of_bias if of_input is None else None),
    ]
    if of_input is None and of_weight is None and of_bias is not None:
        return per_channel(of_bias, v["grad_output"])
    return sum_of(terms)


def backward_input(v: dict[str, Any]) -> Tensor | None:
    of_weight = v["grads"][1]
    return None if of_weight is None else backward(v, v["grad_output"], v["input"], of_weight, INPUT)[0]


def backward_weight(v: dict[str, Any]) -> Tensor | None:
    of_input = v["grads"][0]
    return None if of_input is None else backward(v, v["grad_output"], of_input, v["weight"], WEIGHT)[1]


def backward_tangent(v: dict[str, Any]) -> tuple[Tensor | None, ...]:
    grad, input, weight = v["grad_output"], v["input"], v["weight"]
    grad_t, input_t, weight_t = v["grad_output_t"], v["input_t"], v["weight_t"]
    of_input, of_weight, of_bias = v["output_mask"]
    moved: list[Tensor | None] = [None, None, None]
    if grad_t is not None:
        moved = list(backward(v, grad_t, input, weight, [of_input, of_weight, False]))
        moved[2] = over_channels(grad_t) if of_bias else None
    if weight_t is not None and of_input:
        moved[0] = sum_of([moved[0], backward(v, grad, input, weight_t, INPUT)[0]])
    if input_t is not None and of_weight:
        moved[1] = sum_of([moved[1], backward(v, grad, input_t, weight, WEIGHT)[1]])
    return tuple(moved)


_SAVED = ("grads", "grad_output", "input", "weight", *OPTIONS)
derivative(
    aten.convolution_backward.default,
    tangent=with_names((*_SAVED[1:], "output_mask", "grad_output_t", "input_t", "weight_t"), backward_tangent),
    grad_output=with_names(_SAVED, backward_grad_output),
    input=with_names(_SAVED, backward_input),
    weight=with_names(_SAVED, backward_weight),
)
