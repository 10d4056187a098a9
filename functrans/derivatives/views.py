"""Derivatives of operators that only move, copy or convert elements: views, shapes, dtypes, joining and padding.

All are linear, so their tangent is the operator applied to the tangent and their reverse formula is its transpose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.derivatives.helpers import cast, conj, sum_to_shape
from functrans.derivatives.named import arguments_of, named
from functrans.derivatives.table import derivative
from functrans.operators.schemas import direct_call
from functrans.operators.views import CONJUGATED, EXPANSIONS, PARTS, PERMUTATIONS, RESHAPES, SWAPS, inverse
from functrans.pytorch.torch_private import OpOverload

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


def permute_back(op: OpOverload, order: Callable[..., Sequence[int]]) -> Callable[..., Tensor]:
    find = lru_cache(lambda rank, *args: inverse(order(rank, *args)))

    def self(grad: Tensor, *args: Any) -> Tensor:
        return torch.permute(grad, find(grad.dim(), *[tuple(a) if type(a) is list else a for a in args]))

    return named(("grad", *arguments_of(op)), self)


for op, _order in PERMUTATIONS.items():
    linear(op, self=permute_back(op, _order))

# swaps undo themselves, each as PyTorch does it in the least time
linear(aten.transpose.int, self=lambda grad, dim0, dim1: grad.transpose(dim0, dim1))
linear(aten.swapaxes.default, self=lambda grad, axis0, axis1: grad.transpose(axis0, axis1))
linear(aten.swapdims.default, self=lambda grad, dim0, dim1: grad.transpose(dim0, dim1))
linear(aten.t.default, self=lambda grad: grad.t())
linear(aten.mT.default, self=lambda grad: grad.mT)
for op in filter(CONJUGATED.__contains__, SWAPS):
    linear(op, self=lambda grad: conj(grad.transpose(-2, -1)) if grad.dim() else conj(grad))

# ------------------------------------------------------------------------------------------- copies along dimensions

for op in EXPANSIONS:
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


def into_zeros(view: OpOverload, backward: OpOverload) -> Callable[..., Tensor]:
    def of_viewed(grad: Tensor, self: Tensor, *where: Any) -> Tensor:
        return backward(grad, self.shape, *where)

    return named(("grad", "self", *arguments_of(view)), of_viewed)


def put_into(view: OpOverload, backward: OpOverload, scatter: OpOverload) -> None:
    """Add the entries of the two operators that put something in the place of a view."""
    where = arguments_of(view)
    show = direct_call(view) or view

    def grad_output(grad: Tensor, *where: Any) -> Tensor:
        return show(grad, *where)

    def outside(grad: Tensor, src: Tensor, *where: Any) -> Tensor:
        if scatter is aten.diagonal_scatter.default or not grad.is_complex():
            return scatter(grad, torch.zeros_like(src, dtype=grad.dtype), *where)
        # by a mask: PyTorch's own autograd does not take the other two of complex tensors
        zeros, ones = (f(x, dtype=torch.bool) for f, x in ((torch.zeros_like, grad), (torch.ones_like, src)))
        return grad.masked_fill(scatter(zeros, ones, *where), 0)

    def inside(grad: Tensor, src: Tensor, *where: Any) -> Tensor:
        return cast(sum_to_shape(show(grad, *where), src.shape), src.dtype)

    linear(backward, grad_output=named(("grad", *where), grad_output))
    linear(scatter, self=named(("grad", "src", *where), outside), src=named(("grad", "src", *where), inside))


for op, _part in PARTS.items():
    if _part.backward is not None and op is not aten.slice.Tensor:  # may leave out its ends, the backward one does not
        linear(op, self=into_zeros(op, _part.backward))
    if _part.backward is not None and _part.scatter is not None:
        put_into(op, _part.backward, _part.scatter)


def slice_self(grad: Tensor, self: Tensor, dim: int, start: int | None, end: int | None, step: int) -> Tensor:
    start = 0 if start is None else start
    end = sys.maxsize if end is None else end
    return run(aten.slice_backward.default, grad, list(self.shape), dim, start, end, step)


def narrow_self(grad: Tensor, self: Tensor, dim: int, start: int, length: int) -> Tensor:
    start = start + self.shape[dim] if start < 0 else start
    return run(aten.slice_backward.default, grad, list(self.shape), dim, start, start + length, 1)


linear(aten.slice.Tensor, self=slice_self)
linear(aten.narrow.default, self=narrow_self)
linear(aten.diag_embed.default, self=lambda grad, offset, dim1, dim2: grad.diagonal(offset, dim1, dim2))
linear(
    aten.unfold_backward.default,
    grad_in=lambda grad, grad_in, dim, size, step: sum_to_shape(grad.unfold(dim, size, step), grad_in.shape),
)

for op in (aten.tril.default, aten.triu.default):
    linear(op, self=partial(lambda part, grad, diagonal: part(grad, diagonal), op))

linear(
    aten.constant_pad_nd.default,
    tangent=lambda self_t, pad: run(aten.constant_pad_nd.default, self_t, pad, 0),
    self=lambda grad, pad: run(aten.constant_pad_nd.default, grad, [-n for n in pad], 0),
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
