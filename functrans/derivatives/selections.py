"""Derivatives of reductions that select elements: extrema, medians, sorting.

With indices in the output, the derivative goes where they point; without, equal elements share it evenly, as in
PyTorch's derivatives table (``derivatives.yaml``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.helpers import add, restore_dims
from functrans.derivatives.reductions import Dim, even_shares, pulled, pushed, weighted
from functrans.derivatives.table import derivative

aten = torch.ops.aten

# ------------------------------------------------------------------------------------------- shared evenly


def shares(self: Tensor, dim: Dim, keepdim: bool, result: Tensor) -> Tensor:
    """How much each element of ``self`` counts in the extremum: 1 / ties.

    (With ``dim``, PyTorch answers NaN with NaN.)
    """
    value = restore_dims(result, dim, keepdim, self.dim())
    chosen = self == value
    if dim is None:
        chosen = chosen | (self.isnan() & value.isnan())
    return even_shares(chosen, dim, self.dtype)


for op in (aten.max.default, aten.min.default, aten.median.default, aten.nanmedian.default):
    weighted(op, lambda self, result: shares(self, None, False, result))
for op in (aten.amax.default, aten.amin.default):
    weighted(op, shares)


def aminmax_self(grads: Any, self: Tensor, dim: int | None, keepdim: bool, results: Any) -> Tensor | None:
    parts = [
        None if g is None else pulled(g, self, shares(self, dim, keepdim, r), dim, keepdim)
        for g, r in zip(grads, results, strict=True)
    ]
    return add(*parts)


derivative(
    aten.aminmax.default,
    tangent=lambda self, self_t, dim, keepdim, results: tuple(
        pushed(self_t, r, shares(self, dim, keepdim, r), dim, keepdim) for r in results
    ),
    self=aminmax_self,
)

# ------------------------------------------------------------------------------------------- by index


def to_indices(grads: Any, self: Tensor, dim: int, results: Any, keepdim: bool = True) -> Tensor | None:
    """The transpose of ``gather``: the cotangent of the values, put where they came from."""
    grad, indices = grads[0], results[1]
    if grad is None or self.dim() == 0:
        return grad
    if not keepdim:
        grad, indices = grad.unsqueeze(dim), indices.unsqueeze(dim)
    return grad.new_zeros(self.shape).scatter(dim, indices, grad)


def from_indices(self_t: Tensor, dim: int, results: Any, keepdim: bool = True) -> tuple[Tensor, None]:
    indices = results[1]
    if self_t.dim() == 0:
        return self_t, None
    if keepdim:
        return self_t.gather(dim, indices), None
    return self_t.gather(dim, indices.unsqueeze(dim)).squeeze(dim), None


for op in (
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.mode.default,
    aten.kthvalue.default,
):
    derivative(op, tangent=from_indices, self=to_indices)

for op in (aten.sort.default, aten.sort.stable, aten.topk.default):
    derivative(
        op,
        tangent=lambda self_t, dim, results: from_indices(self_t, dim, results),
        self=lambda grads, self, dim, results: to_indices(grads, self, dim, results),
    )


def cumulative_extremum_self(grads: Any, self: Tensor, dim: int, results: Any) -> Tensor | None:
    if grads[0] is None or self.dim() == 0:
        return grads[0]
    return grads[0].new_zeros(self.shape).scatter_add(dim, results[1], grads[0])


for op in (aten.cummax.default, aten.cummin.default):
    derivative(
        op,
        tangent=lambda self_t, dim, results: from_indices(self_t, dim, results),
        self=cumulative_extremum_self,
    )
