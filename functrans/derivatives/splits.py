"""Derivatives of operators that cut a tensor into a list of tensors; their transpose joins the pieces."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.table import derivative

aten = torch.ops.aten
linear = partial(derivative, tangent="linear")


def or_zeros(grads: Sequence[Tensor | None], shapes: Sequence[Sequence[int]], self: Tensor) -> list[Tensor]:
    return [self.new_zeros(s) if g is None else g for g, s in zip(grads, shapes, strict=True)]


def joined(grads: Any, self: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
    """The transpose of cutting ``self`` into ``sizes`` along ``dim``."""
    dim = dim % self.dim()
    shapes = [(*self.shape[:dim], size, *self.shape[dim + 1 :]) for size in sizes]
    return torch.cat(or_zeros(grads, shapes, self), dim)


def split_self(grads: Any, self: Tensor, split_size: int, dim: int) -> Tensor:
    n = self.shape[dim]
    return joined(grads, self, [min(split_size, n - i * split_size) for i in range(len(grads))], dim)


def chunk_self(grads: Any, self: Tensor, chunks: int, dim: int) -> Tensor:
    return split_self(grads, self, -(-self.shape[dim] // chunks), dim)


def unbind_self(grads: Any, self: Tensor, dim: int) -> Tensor:
    dim = dim % self.dim()
    shape = (*self.shape[:dim], *self.shape[dim + 1 :])
    return torch.stack(or_zeros(grads, [shape] * len(grads), self), dim)


for op in (aten.split.Tensor, aten.unsafe_split.Tensor):
    linear(op, self=split_self)
for op in (aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default):
    linear(op, self=lambda grads, self, split_sizes, dim: joined(grads, self, split_sizes, dim))
linear(aten.chunk.default, self=chunk_self)
linear(aten.unbind.int, self=unbind_self)
