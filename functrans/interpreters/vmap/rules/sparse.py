"""Sparse COO matrices, of which a batch is one with a further dimension in front; and products with one.

The examples of a batch have their entries in any number. What returns them (``indices``, ``values``) can do so where
each example has as many, as it has where they were made of a batch of values for the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.errors import DataDependentError
from functrans.interpreters.vmap.families import RuleDeclined, along_dim, reduction
from functrans.interpreters.vmap.table import BatchInfo, batching_rule, materialize, to_front
from functrans.tensors.sparse import coalesced

aten = torch.ops.aten


@batching_rule(aten._sparse_mm.default)
def sparse_mm(info: BatchInfo, in_dims: Sequence[Any], sparse: Tensor, dense: Tensor) -> tuple[Tensor, int]:
    """A batch of dense matrices joins their columns, one of sparse matrices stands along a diagonal."""
    if in_dims[0] is not None:
        blocks = on_the_diagonal(batch_of(info, sparse, in_dims[0]).coalesce())
        dense = materialize(dense, in_dims[1], info.batch_size).flatten(0, 1)
        return aten._sparse_mm.default(blocks, dense).unflatten(0, (info.batch_size, -1)), 0
    dense = dense.movedim(in_dims[1], 1)
    out = aten._sparse_mm.default(sparse, dense.flatten(1))
    return out.unflatten(1, dense.shape[1:]), 1


@batching_rule(aten._sparse_sparse_matmul.default)
def sparse_sparse_matmul(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """The product of two matrices with the examples as blocks along the diagonal."""
    blocks = [on_the_diagonal(batch_of(info, a, d).coalesce()) for a, d in zip((x, y), in_dims, strict=True)]
    found = aten._sparse_sparse_matmul.default(*blocks).coalesce()
    rows, columns = x.shape[-2], y.shape[-1]
    i, j = found.indices().unbind(0)
    places = torch.stack([i.div(rows, rounding_mode="floor"), i % rows, j % columns])
    return coalesced(places, found.values(), (info.batch_size, rows, columns)), 0


def on_the_diagonal(x: Tensor) -> Tensor:
    """A batch of matrices as one, with a block for each."""
    size, rows, columns = x.shape
    example, i, j = x.indices().unbind(0)
    places = torch.stack([example * rows + i, example * columns + j])
    return coalesced(places, x.values(), (size * rows, size * columns))


def batch_of(info: BatchInfo, x: Tensor, bdim: int | None) -> Tensor:
    """With a batch dimension in front; what all examples share is repeated."""
    if bdim is not None:
        return with_sparse_batch(x, bdim)
    indices, values = entries_of(x)
    options = {"layout": x.layout, "dtype": x.dtype, "device": x.device, "is_coalesced": x.is_coalesced()}
    return with_dims(info, [None] * 5, x.sparse_dim(), x.dense_dim(), x.shape, indices, values, **options)[0]


# Along a dimension of the example, of which one more is in front.
along_dim(
    aten._sparse_log_softmax.default,
    aten._sparse_log_softmax_backward_data.default,
    aten._sparse_softmax.default,
    aten._sparse_softmax_backward_data.default,
)
reduction(aten._sparse_sum.dim)


@batching_rule(aten._to_sparse.default, aten._to_sparse.sparse_dim)
def to_sparse(
    info: BatchInfo, in_dims: Sequence[Any], x: Tensor, sparse_dim: int | None = None, **options: Any
) -> tuple[Tensor, int]:
    if options.get("layout") not in (None, torch.sparse_coo):
        raise RuleDeclined("a compressed layout")
    if sparse_dim is None:
        sparse_dim = x.dim() - 1 - (options.get("dense_dim") or 0)
    return aten._to_sparse.sparse_dim(to_front(x, in_dims[0]), sparse_dim + 1), 0


@batching_rule(aten._sparse_coo_tensor_with_dims_and_tensors.default)
def with_dims(
    info: BatchInfo,
    in_dims: Sequence[Any],
    sparse_dim: int,
    dense_dim: int,
    size: Sequence[int],
    indices: Tensor,
    values: Tensor,
    **options: Any,
) -> tuple[Tensor, int]:
    indices = materialize(indices, in_dims[3], info.batch_size)
    values = materialize(values, in_dims[4], info.batch_size)
    example = torch.arange(info.batch_size, device=indices.device).repeat_interleave(indices.shape[2])
    places = torch.cat([example.unsqueeze(0), indices.transpose(0, 1).flatten(1)])
    size = [info.batch_size, *size]
    op = aten._sparse_coo_tensor_with_dims_and_tensors.default
    return op(sparse_dim + 1, dense_dim, size, places, values.flatten(0, 1), **options), 0


@batching_rule(aten.sparse_coo_tensor.indices_size)
def of_size(
    info: BatchInfo, in_dims: Sequence[Any], indices: Tensor, values: Tensor, size: Sequence[int], **options: Any
) -> tuple[Tensor, int]:
    sparse_dim = indices.dim() and indices.shape[1 if in_dims[0] == 0 else 0]
    dims = [None, None, None, *in_dims[:2]]
    of_values = {"dtype": values.dtype, "device": values.device}
    options = {**of_values, **{name: x for name, x in options.items() if x is not None}, "layout": torch.sparse_coo}
    return with_dims(info, dims, sparse_dim, len(size) - sparse_dim, size, indices, values, **options)


@batching_rule(aten.is_coalesced.default)
def is_coalesced(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[bool, None]:
    return x.is_coalesced(), None


@batching_rule(aten.sparse_dim.default)
def sparse_dim(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[int, None]:
    return x.sparse_dim() - (in_dims[0] < x.sparse_dim()), None


@batching_rule(aten.dense_dim.default)
def dense_dim(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[int, None]:
    return x.dense_dim() - (in_dims[0] >= x.sparse_dim()), None


@batching_rule(aten.coalesce.default, aten._coalesce.default)
def coalesce(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[Tensor, int]:
    return with_sparse_batch(x, in_dims[0]).coalesce(), 0


@batching_rule(aten.to_dense.default, aten._to_dense.default)
def to_dense(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, *options: Any, **more: Any) -> tuple[Tensor, int]:
    return aten.to_dense.default(x, *options, **more), in_dims[0]


@batching_rule(aten.sparse_mask.default)
def sparse_mask(info: BatchInfo, in_dims: Sequence[Any], x: Tensor, mask: Tensor) -> tuple[Tensor, int]:
    return materialize(x, in_dims[0], info.batch_size).contiguous().sparse_mask(batch_of(info, mask, in_dims[1])), 0


def with_sparse_batch(x: Tensor, bdim: int) -> Tensor:
    """With the batch dimension in front, among those whose places are kept."""
    if bdim >= x.sparse_dim():
        raise RuleDeclined("a batch along a dense dimension")
    return to_front(x, bdim)


def entries(op: Any, read: Any, checked: bool) -> None:
    """Add the rule of an operator that returns the entries of each example, ``read(indices, values)`` of all of them.

    ``checked``: it refuses what is not coalesced.
    """

    @batching_rule(op)
    def entries_of_each(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[Tensor, int]:
        x = with_sparse_batch(x, in_dims[0])
        if checked and not x.is_coalesced():
            op(x)  # says so
        return read(*of_each(info, op, x))


def entries_of(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_coalesced():  # these have derivatives
        return x.indices(), x.values()
    return aten._indices.default(x), aten._values.default(x)


def of_each(info: BatchInfo, op: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The indices, ``[dimensions, examples, entries]``, and the values, ``[examples, entries, ...]``."""
    indices, values = entries_of(x)
    count, rest = divmod(indices.shape[1], max(info.batch_size, 1))
    if not x.is_coalesced():
        order = indices[0].argsort(stable=True)
        indices, values = indices.index_select(1, order), values.index_select(0, order)
    expected = torch.arange(info.batch_size, device=indices.device).repeat_interleave(count)
    if rest or not (indices[0] == expected).all():
        raise DataDependentError(op, info.interpreter, "it has another number of entries for each example")
    return indices[1:].unflatten(1, (info.batch_size, count)), values.unflatten(0, (info.batch_size, count))


@batching_rule(aten._nnz.default)
def nnz(info: BatchInfo, in_dims: Sequence[Any], x: Tensor) -> tuple[int, None]:
    return of_each(info, aten._nnz.default, with_sparse_batch(x, in_dims[0]))[0].shape[2], None


for _op in (aten.indices.default, aten._indices.default):
    entries(_op, lambda indices, values: (indices.movedim(1, 0), 0), _op is aten.indices.default)
for _op in (aten.values.default, aten._values.default):
    entries(_op, lambda indices, values: (values, 0), _op is aten.values.default)
