"""Parts of complex numbers, and conjugates and negatives that nobody computed yet.

Inside of PyTorch a wrapper does not show that its value is one, so that PyTorch's definitions would take it as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.operators.schemas import taken_apart

aten = torch.ops.aten

OF_BITS = frozenset((aten.resolve_conj.default, aten.resolve_neg.default, aten.real.default, aten.imag.default))


@DECOMPOSITIONS.register(aten.resolve_conj.default)
def resolve_conj(z: Tensor) -> Tensor:
    return z.clone() if z.is_conj() else z


@DECOMPOSITIONS.register(aten.resolve_neg.default)
def resolve_neg(x: Tensor) -> Tensor:
    return x.clone() if x.is_neg() else x


@DECOMPOSITIONS.register(aten.real.default)
def real(self: Tensor) -> Tensor:
    return part(self, 0) if self.is_complex() else self


@DECOMPOSITIONS.register(aten.imag.default)
def imag(self: Tensor) -> Any:
    return part(self, 1) if self.is_complex() else taken_apart(aten.imag.default, self)  # which is an error


def part(z: Tensor, which: int) -> Tensor:
    return torch.view_as_real(resolve_conj(z)).select(-1, which)
