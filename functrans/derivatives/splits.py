"""Derivatives of operators that cut a tensor into a list of tensors; their transpose joins the pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.named import arguments_of, named
from functrans.derivatives.table import derivative
from functrans.operators.views import SPLITS
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten
linear = partial(derivative, tangent="linear")


def or_zeros(grads: Sequence[Tensor | None], shapes: Sequence[Sequence[int]], self: Tensor) -> list[Tensor]:
    return [self.new_zeros(s) if g is None else g for g, s in zip(grads, shapes, strict=True)]


def rejoin(op: OpOverload) -> Callable[..., Tensor]:
    piece = SPLITS[op]

    def joined(grads: Any, self: Tensor, how: Any, dim: int) -> Tensor:
        dim = dim % self.dim()
        ends = [piece(self.shape[dim], how, i) for i in range(len(grads))]
        shapes = [(*self.shape[:dim], end - start, *self.shape[dim + 1 :]) for start, end in ends]
        return torch.cat(or_zeros(grads, shapes, self), dim)

    return named(("grads", "self", *arguments_of(op)), joined)


def unbind_self(grads: Any, self: Tensor, dim: int) -> Tensor:
    dim = dim % self.dim()
    shape = (*self.shape[:dim], *self.shape[dim + 1 :])
    return torch.stack(or_zeros(grads, [shape] * len(grads), self), dim)


for op in SPLITS:
    linear(op, self=rejoin(op))
linear(aten.unbind.int, self=unbind_self)
