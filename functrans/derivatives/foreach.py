"""Operators on lists of tensors whose forward mode PyTorch has wrong: taken apart into the operators on one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS

aten = torch.ops.aten


# PyTorch takes every element for a tie in forward mode: half of the tangent
@DECOMPOSITIONS.register(aten._foreach_maximum.Scalar)
def foreach_maximum(self: Sequence[Tensor], scalar: Any) -> list[Tensor]:
    return [x.clamp_min(scalar) for x in self]


@DECOMPOSITIONS.register(aten._foreach_minimum.Scalar)
def foreach_minimum(self: Sequence[Tensor], scalar: Any) -> list[Tensor]:
    return [x.clamp_max(scalar) for x in self]


@DECOMPOSITIONS.register(aten._foreach_clamp_min.Scalar)
def foreach_clamp_min(self: Sequence[Tensor], scalar: Any) -> list[Tensor]:
    return [x.clamp_min(scalar) for x in self]


@DECOMPOSITIONS.register(aten._foreach_clamp_max.Scalar)
def foreach_clamp_max(self: Sequence[Tensor], scalar: Any) -> list[Tensor]:
    return [x.clamp_max(scalar) for x in self]


# PyTorch refuses these in one mode: a tangent of a wrong shape, one cotangent where a list is expected
@DECOMPOSITIONS.register(aten._foreach_norm.Scalar)
def foreach_norm(self: Sequence[Tensor], ord: Any = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.linalg.vector_norm(x, ord, dtype=dtype) for x in self]


@DECOMPOSITIONS.register(aten._foreach_add.Tensor)
def foreach_add(self: Sequence[Tensor], other: Tensor, *, alpha: Any = 1) -> list[Tensor]:
    return [torch.add(x, other, alpha=alpha) for x in self]


@DECOMPOSITIONS.register(aten._foreach_mul.Tensor)
def foreach_mul(self: Sequence[Tensor], other: Tensor) -> list[Tensor]:
    return [x * other for x in self]


@DECOMPOSITIONS.register(aten._foreach_div.Tensor)
def foreach_div(self: Sequence[Tensor], other: Tensor) -> list[Tensor]:
    return [x / other for x in self]
