"""Derivatives of operators that only move, copy or convert elements: views, shapes, dtypes, joining and padding.

All are linear, so their tangent is the operator applied to the tangent and their reverse formula is its transpose.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from functrans.derivatives.helpers import cast, conj, sum_to_shape
from functrans.derivatives.table import derivative
from functrans.functionalization.write_back import RESHAPES

aten = torch.ops.aten
linear = partial(derivative, tangent="linear")

# ----------------------------------------------------------------------------------------- same elements, another shape

for op in RESHAPES:
    if op is not aten.unsqueeze.default:  # which says itself what undoes it: nothing is kept
        linear(op, self=lambda grad, self: grad.reshape(self.shape))
linear(aten.unsqueeze.default, self=lambda grad, dim: grad.squeeze(dim))

for op in (aten.alias.default, aten.clone.default, aten.contiguous.default):
    linear(op, self=lambda grad: grad)

# ------------------------------------------------------------------------------------------- dimensions reordered


def permute_self(grad: Tensor, dims: Sequence[int]) -> Tensor:
    inverse = [0] * len(dims)
    for i, d in enumerate(dims):
        inverse[d] = i
    return grad.permute(inverse)


linear(aten.permute.default, self=permute_self)
linear(aten.transpose.int, self=lambda grad, dim0, dim1: grad.transpose(dim0, dim1))
linear(aten.swapaxes.default, self=lambda grad, axis0, axis1: grad.transpose(axis0, axis1))
linear(aten.swapdims.default, self=lambda grad, dim0, dim1: grad.transpose(dim0, dim1))
for op in (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist):
    linear(op, self=lambda grad, source, destination: grad.movedim(destination, source))

linear(aten.t.default, self=lambda grad: grad.t())
linear(aten.numpy_T.default, self=lambda grad: grad.permute(list(reversed(range(grad.dim())))))
linear(aten.mT.default, self=lambda grad: grad.mT)
for op in (aten.mH.default, aten.adjoint.default, aten.matrix_H.default):
    linear(op, self=lambda grad: conj(grad.transpose(-2, -1)) if grad.dim() else conj(grad))

# ------------------------------------------------------------------------------------------- copies along dimensions

for op in (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default):
    linear(op, self=lambda grad, self: sum_to_shape(grad, self.shape))


def repeat_self(grad: Tensor, self: Tensor, repeats: Sequence[int]) -> Tensor:
    """Split each dimension into copies and size, and sum over the copies."""
    extra = len(repeats) - self.dim()
    if grad.numel() == 0:
        return torch.zeros_like(self)
    shape = list(repeats[:extra])
    copies = list(range(extra))
    for n, size in zip(repeats[extra:], self.shape, strict=True):
        if n != 1:
            copies.append(len(shape))
            shape.append(n)
        shape.append(size)
    return grad.reshape(shape).sum(copies) if copies else grad


linear(aten.repeat.default, self=repeat_self)

# ------------------------------------------------------------------------------------------- parts

linear(
    aten.select.int,
    self=lambda grad, self, dim, index: aten.select_backward.default(grad, self.shape, dim, index),
)
linear(aten.select_backward.default, grad_output=lambda grad, dim, index: grad.select(dim, index))


def slice_self(grad: Tensor, self: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor:
    start = 0 if start is None else start
    end = sys.maxsize if end is None else end
    return aten.slice_backward.default(grad, self.shape, dim, start, end, step)


linear(aten.slice.Tensor, self=slice_self)
linear(
    aten.slice_backward.default,
    grad_output=lambda grad, dim, start, end, step: aten.slice.Tensor(grad, dim, start, end, step),
)


def narrow_self(grad: Tensor, self: Tensor, dim: int, start: int, length: int) -> Tensor:
    start = start + self.shape[dim] if start < 0 else start
    return aten.slice_backward.default(grad, self.shape, dim, start, start + length, 1)


linear(aten.narrow.default, self=narrow_self)
linear(
    aten.diagonal.default,
    self=lambda grad, self, offset, dim1, dim2: aten.diagonal_backward.default(grad, self.shape, offset, dim1, dim2),
)
linear(
    aten.diagonal_backward.default,
    grad_output=lambda grad, offset, dim1, dim2: grad.diagonal(offset, dim1, dim2),
)
linear(aten.diag_embed.default, self=lambda grad, offset, dim1, dim2: grad.diagonal(offset, dim1, dim2))
linear(
    aten.unfold.default,
    self=lambda grad, self, dimension, size, step: aten.unfold_backward.default(
        grad, self.shape, dimension, size, step
    ),
)
linear(
    aten.unfold_backward.default,
    grad_in=lambda grad, grad_in, dim, size, step: sum_to_shape(grad.unfold(dim, size, step), grad_in.shape),
)

for op in (aten.tril.default, aten.triu.default):
    linear(op, self=partial(lambda part, grad, diagonal: part(grad, diagonal), op))

linear(
    aten.constant_pad_nd.default,
    tangent=lambda self_t, pad: aten.constant_pad_nd.default(self_t, pad, 0),
    self=lambda grad, pad: aten.constant_pad_nd.default(grad, [-n for n in pad], 0),
)

# ------------------------------------------------------------------------------------------- parts overwritten

# PyTorch's own autograd does not take select_scatter and slice_scatter of complex tensors, so they make masks here.
linear(
    aten.select_scatter.default,
    self=lambda grad, src, dim, index: grad.masked_fill(
        torch.select_scatter(
            torch.zeros_like(grad, dtype=torch.bool), torch.ones_like(src, dtype=torch.bool), dim, index
        ),
        0,
    ),
    src=lambda grad, src, dim, index: cast(grad.select(dim, index), src.dtype),
)
linear(
    aten.slice_scatter.default,
    self=lambda grad, src, dim, start, end, step: grad.masked_fill(
        torch.slice_scatter(
            torch.zeros_like(grad, dtype=torch.bool), torch.ones_like(src, dtype=torch.bool), dim, start, end, step
        ),
        0,
    ),
    src=lambda grad, src, dim, start, end, step: cast(
        sum_to_shape(aten.slice.Tensor(grad, dim, start, end, step), src.shape), src.dtype
    ),
)
linear(
    aten.diagonal_scatter.default,
    self=lambda grad, src, offset, dim1, dim2: torch.diagonal_scatter(grad, torch.zeros_like(src), offset, dim1, dim2),
    src=lambda grad, src, offset, dim1, dim2: cast(grad.diagonal(offset, dim1, dim2), src.dtype),
)

# ------------------------------------------------------------------------------------------- elements moved

linear(aten.flip.default, self=lambda grad, dims: grad.flip(dims))
linear(aten.roll.default, self=lambda grad, shifts, dims: grad.roll([-s for s in shifts], dims))
linear(aten.rot90.default, self=lambda grad, k, dims: grad.rot90(-k, dims))

# ------------------------------------------------------------------------------------------- complex and real

for op in (aten.conj.default, aten._conj.default, aten.conj_physical.default, aten._conj_physical.default):
    linear(op, self=lambda grad: conj(grad))
for op in (aten.resolve_conj.default, aten.resolve_neg.default):
    linear(op, self=lambda grad: grad)
linear(aten._neg_view.default, self=lambda grad: -grad)
derivative(  # linear, but a tangent may be a lazy conjugate where its primal is none
    aten.view_as_real.default,
    tangent=lambda self_t: torch.view_as_real(self_t.resolve_conj()),
    self=lambda grad: torch.view_as_complex(grad.contiguous()),
)
linear(aten.view_as_complex.default, self=lambda grad: torch.view_as_real(grad.resolve_conj()))
linear(aten.real.default, self=lambda grad, self: grad.to(self.dtype))
linear(aten.imag.default, self=lambda grad: grad * 1j)

# ------------------------------------------------------------------------------------------- dtypes and devices


def converted_back(grad: Tensor, self: Tensor) -> Tensor:
    return cast(grad if grad.device == self.device else grad.to(self.device), self.dtype)


for op in (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
):
    linear(op, self=converted_back)

# ------------------------------------------------------------------------------------------- joined


def is_skipped_by_cat(x: Tensor) -> bool:
    return x.dim() == 1 and x.shape[0] == 0


def cat_tensors(grad: Tensor, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Each tensor's piece of ``grad``. (``cat`` skips tensors of shape (0,), whatever the others' dimensions.)"""
    pieces = []
    start = 0
    for x in tensors:
        if is_skipped_by_cat(x):
            pieces.append(torch.zeros_like(x))
            continue
        size = x.shape[dim]
        pieces.append(cast(grad.narrow(dim, start, size), x.dtype))
        start += size
    return pieces


def stack_tensors(grad: Tensor, tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    return [cast(g, x.dtype) for g, x in zip(grad.unbind(dim), tensors, strict=True)]


linear(aten.cat.default, tensors=cat_tensors)
linear(aten.stack.default, tensors=stack_tensors)
