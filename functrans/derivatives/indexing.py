"""Derivatives of operators that read or write at places given by index tensors or masks.

Reading is undone by adding at the same places, writing by reading there. No formula looks at the indices' values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import run
from functrans.boundary.factories import range_for
from functrans.derivatives.helpers import cast, conj, sum_to_shape, times
from functrans.derivatives.table import derivative
from functrans.tensors.broadcasting import broadcast_shapes, holds, same_shape

aten = torch.ops.aten

# ---------------------------------------------------------------------------------------------- x[indices]

Indices = list[Tensor | None]

Write = Callable[[Tensor, Tensor], Tensor]
Read = Callable[[Tensor], Tensor]


def won(grad: Tensor, shape: Sequence[int], write: Write, read: Read) -> Tensor:
    """Where what is written is there in the end: of several elements that are written to one place, one wins.

    ``write(x, numbers)`` writes ``numbers``, of shape ``shape``, into ``x``, and ``read`` reads where they were
    written.
    """
    numbers = range_for(grad, math.prod(shape)).reshape(shape)
    return read(write(torch.zeros_like(grad, dtype=torch.int64), numbers)) == numbers


def may_repeat(index: Tensor) -> bool:
    return index.dtype != torch.bool and index.numel() > 1


def index_put_self(grad: Tensor, indices: Indices, accumulate: bool) -> Tensor:
    return grad if accumulate else aten.index_put(grad, indices, grad.new_zeros(()))


def index_put_values(grad: Tensor, indices: Indices, values: Tensor, accumulate: bool) -> Tensor:
    read = aten.index(grad, indices)
    if not accumulate and any(i is not None and may_repeat(i) for i in indices):
        here = won(grad, read.shape, lambda x, n: aten.index_put(x, indices, n), lambda x: aten.index(x, indices))
        read = torch.where(here, read, 0)
    return cast(sum_to_shape(read, values.shape), values.dtype)  # a number may be of another


# The unsafe forms skip the check of the indices' range; they come from decompositions.
for _op in (aten.index.Tensor, aten._unsafe_index.Tensor):
    derivative(
        _op,
        tangent="linear",
        self=lambda grad, self, indices: aten.index_put(grad.new_zeros(self.shape), indices, grad, True),
    )
for _op in (aten.index_put.default, aten._unsafe_index_put.default):
    derivative(
        _op,
        tangent="linear",
        self=index_put_self,
        values=index_put_values,
    )


# ---------------------------------------------------------------------------------------------- along one dimension


def gathered(grad: Tensor, dim: int, index: Tensor, source: Tensor, added: bool = False) -> Tensor:
    """The cotangent of what was scattered: ``source`` may be larger than ``index``, and its rest was not used."""
    if holds(index.numel() == 0):
        return grad.new_zeros(source.shape)
    read = grad.gather(dim, index)
    if not added and may_repeat(index):
        here = won(grad, index.shape, lambda x, n: x.scatter(dim, index, n), lambda x: x.gather(dim, index))
        read = torch.where(here, read, 0)
    if read.dim() != source.dim():
        return read.reshape(source.shape)
    if same_shape(read.shape, source.shape):
        return read
    rest = [
        n for have, want in zip(reversed(read.shape), reversed(source.shape), strict=True) for n in (0, want - have)
    ]
    return run(aten.constant_pad_nd.default, read, rest)


def selected(grad: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """The cotangent of ``source``, whose slices were put at ``index``."""
    return grad.index_select(dim, index).reshape(source.shape)


derivative(
    aten.gather.default,
    tangent="linear",
    self=lambda grad, self, dim, index: grad.new_zeros(self.shape).scatter_add(dim, index, grad),
)
derivative(
    aten.scatter.src,
    tangent="linear",
    self=lambda grad, dim, index: grad.scatter(dim, index, 0),
    src=lambda grad, dim, index, src: gathered(grad, dim, index, src),
)
derivative(
    aten.scatter.value,
    tangent=lambda dim, index, self_t: self_t.scatter(dim, index, 0),
    self=lambda grad, dim, index: grad.scatter(dim, index, 0),
)
derivative(
    aten.scatter_add.default,
    tangent="linear",
    self=lambda grad: grad,
    src=lambda grad, dim, index, src: gathered(grad, dim, index, src, added=True),
)
derivative(
    aten.index_select.default,
    tangent="linear",
    self=lambda grad, self, dim, index: grad.new_zeros(self.shape).index_add(dim, index, grad),
)


def index_add_source(grad: Tensor, dim: int, index: Tensor, source: Tensor, alpha: Any) -> Tensor:
    return times(selected(grad, dim, index, source), conj(alpha))


derivative(aten.index_add.default, tangent="linear", self=lambda grad: grad, source=index_add_source)


def index_copy_source(grad: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not may_repeat(index):
        return selected(grad, dim, index, source)
    line = grad.new_zeros(grad.shape[dim])  # slices win or lose as a whole
    here = won(line, index.shape, lambda x, n: x.index_copy(0, index, n), lambda x: x.index_select(0, index))
    read = grad.movedim(dim, -1).index_select(-1, index) * here
    return read.movedim(-1, dim).reshape(source.shape)


derivative(
    aten.index_copy.default,
    tangent="linear",
    self=lambda grad, dim, index: grad.index_fill(dim, index, 0),
    source=index_copy_source,
)
derivative(
    aten.index_fill.int_Scalar,
    tangent=lambda dim, index, self_t: self_t.index_fill(dim, index, 0),
    self=lambda grad, dim, index: grad.index_fill(dim, index, 0),
)


def index_fill_value(grad: Tensor, dim: int, index: Tensor, value: Tensor) -> Tensor:
    # An index that occurs twice fills its slice once.
    filled = torch.zeros_like(grad, dtype=torch.bool).index_fill(dim, index, True)
    return cast(torch.where(filled, grad, 0).sum(), value.dtype)


derivative(
    aten.index_fill.int_Tensor,
    tangent="linear",
    self=lambda grad, dim, index: grad.index_fill(dim, index, 0),
    value=index_fill_value,
)


# ---------------------------------------------------------------------------------------------- flat positions

derivative(
    aten.take.default,
    tangent="linear",
    self=lambda grad, self, index: grad.new_zeros(self.shape).put(index, grad, accumulate=True),
)


def put_source(grad: Tensor, index: Tensor, source: Tensor, accumulate: bool) -> Tensor:
    read = grad.take(index)
    if not accumulate and may_repeat(index):
        read = torch.where(won(grad, index.shape, lambda x, n: x.put(index, n), lambda x: x.take(index)), read, 0)
    return read.reshape(source.shape)


derivative(
    aten.put.default,
    tangent="linear",
    self=lambda grad, index, accumulate: grad if accumulate else grad.put(index, grad.new_zeros(index.shape)),
    source=put_source,
)


# ---------------------------------------------------------------------------------------------- masks


def masked_select_self(grad: Tensor, self: Tensor, mask: Tensor) -> Tensor:
    whole = grad.new_zeros(broadcast_shapes(self.shape, mask.shape)).masked_scatter(mask, grad)
    return sum_to_shape(whole, self.shape)


def masked_scatter_source(grad: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    # The k-th place where the mask is True took the k-th element of source. Added up, not selected: no shape may depend
    # on the mask.
    if source.numel() == 0:
        return grad.new_zeros(source.shape)
    place = mask.expand(grad.shape).flatten().cumsum(0).sub(1).clamp(0)
    taken = torch.where(mask, grad, 0).flatten()
    return grad.new_zeros(source.numel()).scatter_add(0, place, taken).reshape(source.shape)


derivative(aten.masked_select.default, tangent="linear", self=masked_select_self)
derivative(
    aten.masked_scatter.default,
    tangent="linear",
    broadcasts=True,  # self and mask do
    self=lambda grad, mask: grad.masked_fill(mask, 0),
    source=masked_scatter_source,
)


# ---------------------------------------------------------------------------------------------- embedding


def embedding_backward_grad_output(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    read = run(aten.embedding.default, grad, indices)
    if scale_grad_by_freq:
        flat = indices.flatten()
        count = grad.new_zeros(num_weights).index_add(0, flat, grad.new_ones(flat.shape))
        read = read / run(aten.embedding.default, count.unsqueeze(-1), indices)
    if padding_idx >= 0:
        read = read.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    return read


def embedding_weight(
    grad: Tensor, weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    # sparse=True asks for a sparse gradient; ours is dense, which is the same value.
    return run(aten.embedding_dense_backward.default, grad, indices, weight.shape[0], padding_idx, scale_grad_by_freq)


def embedding_tangent(
    weight: Tensor, indices: Tensor, padding_idx: int, scale_grad_by_freq: bool, weight_t: Tensor
) -> Tensor:
    """The transpose of what the options make of the gradient, which PyTorch's forward mode is not."""
    return embedding_backward_grad_output(weight_t, indices, weight.shape[0], padding_idx, scale_grad_by_freq)


derivative(aten.embedding.default, tangent=embedding_tangent, weight=embedding_weight)
derivative(aten.embedding_dense_backward.default, tangent="linear", grad_output=embedding_backward_grad_output)
