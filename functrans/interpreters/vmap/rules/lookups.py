"""Batching rules of embeddings, class labels and membership: values looked up by an integer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import range_for
from functrans.interpreters.vmap.families import RuleDeclined, flat_examples
from functrans.interpreters.vmap.rules.scatter import end_to_end, index_select, own_rows
from functrans.interpreters.vmap.table import (
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_rank,
    materialize,
    to_front,
)

aten = torch.ops.aten
BAG_SUM, BAG_MAX = 0, 2


# ---------------------------------------------------------------------------------------------------------------
# Embeddings


@batching_rule(aten.embedding.default)
def embedding(
    info: BatchInfo,
    in_dims: Dims,
    weight: Tensor,
    indices: Tensor,
    padding_idx: Any = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Output:
    """``padding_idx`` and ``scale_grad_by_freq`` matter to a derivative one level down, so they are kept."""
    weight_dim, indices_dim = in_dims[0], in_dims[1]
    if logical_rank(weight, weight_dim) != 2:
        raise RuleDeclined("embedding takes a matrix")
    options = (padding_idx, scale_grad_by_freq, sparse)
    if weight_dim is None:
        if scale_grad_by_freq:
            raise RuleDeclined("frequencies count within one example")
        return aten.embedding.default(weight, indices, *options), indices_dim
    if sparse:
        raise RuleDeclined("a sparse gradient has the layout of the unbatched weight")
    if indices_dim is None:
        # The batch joins the columns.
        weight = weight.movedim(weight_dim, 1)
        rows, size, columns = weight.shape
        out = aten.embedding.default(weight.reshape(rows, size * columns), indices, *options)
        return out.unflatten(-1, (size, columns)), out.dim() - 1
    if scale_grad_by_freq:
        raise RuleDeclined("frequencies count within one example")
    weight, indices = to_front(weight, weight_dim), to_front(indices, indices_dim)
    flat = flat_examples(indices, 0).long()
    out, _ = index_select(info, (0, None, 0), weight, 0, flat)
    if padding_idx >= 0:
        # The row that takes no gradient is looked up by the operator itself.
        padding = indices.new_full((1,), padding_idx)
        row, _ = embedding(info, (0, None), weight, padding, padding_idx)
        out = torch.where((flat == padding_idx).unsqueeze(2), row.movedim(1, 0), out)
    return out.reshape(*indices.shape, weight.shape[2]), 0


@batching_rule(aten.embedding_dense_backward.default)
def embedding_dense_backward(
    info: BatchInfo,
    in_dims: Dims,
    grad: Tensor,
    indices: Tensor,
    num_weights: Any,
    padding_idx: Any,
    scale_grad_by_freq: bool,
) -> Output:
    """With unbatched indices the batch joins the columns, else the rows: each example has its own."""
    size = info.batch_size
    if in_dims[1] is None:
        grad = grad.movedim(in_dims[0], -2)
        columns = grad.shape[-1]
        grad = grad.reshape(*grad.shape[:-2], size * columns)
        out = aten.embedding_dense_backward.default(grad, indices, num_weights, padding_idx, scale_grad_by_freq)
        return out.unflatten(1, (size, columns)), 1
    grad, indices = materialize(grad, in_dims[0], size), to_front(indices, in_dims[1])
    if padding_idx >= 0:
        grad = grad.masked_fill((indices == padding_idx).unsqueeze(-1), 0)
    first = range_for(indices, size).view(size, *[1] * (indices.dim() - 1)) * num_weights
    out = aten.embedding_dense_backward.default(grad, indices + first, size * num_weights, -1, scale_grad_by_freq)
    return out.unflatten(0, (size, num_weights)), 0


@batching_rule(aten._embedding_bag.default)
def embedding_bag(
    info: BatchInfo,
    in_dims: Dims,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = BAG_SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Output:
    """The indices of all examples one after the other, in as many bags as all examples have; tables end to end."""
    size = info.batch_size
    weight_dim, indices_dim, offsets_dim = in_dims[:3]
    if scale_grad_by_freq or (sparse and weight_dim is not None) or size == 0:
        raise RuleDeclined("frequencies count within one example, and so do sparse gradients")
    if logical_rank(weight, weight_dim) != 2 or logical_rank(indices, indices_dim) != 1:
        raise RuleDeclined("embedding_bag takes a matrix and vectors")
    indices, offsets = materialize(indices, indices_dim, size), materialize(offsets, offsets_dim, size)
    length, rows = indices.shape[1], 0
    if weight_dim is not None:
        weight = to_front(weight, weight_dim)
        rows = weight.shape[1]
        own = own_rows(indices, rows)
        # One of the rows to be left out stands for those of all examples.
        flat = own if padding_idx < 0 else torch.where((indices == padding_idx).reshape(-1), padding_idx, own)
        weight = end_to_end(weight)
    else:
        flat = indices.reshape(-1)
    if offsets.shape[1]:  # a bag that is not the example's own is an error: there is no such row
        wrong = ((offsets < 0) | (offsets > length)).any(1) | (offsets[:, 0] != 0)
        flat = flat.view(size, length).masked_fill(wrong.unsqueeze(1), weight.shape[0]).view(-1)
    if include_last_offset:
        offsets = offsets[:, :-1]  # the last one is the number of indices
    bags = offsets.shape[1]
    first = range_for(offsets, size).unsqueeze(1) * length
    starts = (offsets.clamp(0, length) + first).to(indices.dtype).reshape(-1)
    if per_sample_weights is not None:
        per_sample_weights = materialize(per_sample_weights, in_dims[6], size).reshape(-1)
    results = aten._embedding_bag.default(
        weight, flat, starts, False, mode, sparse, per_sample_weights, False, padding_idx
    )
    out, bag_of, bag_size, maximal = results
    out, bag_size, maximal = (x.unflatten(0, (size, bags)) for x in (out, bag_size, maximal))
    if mode == BAG_MAX and weight_dim is not None:
        maximal = maximal.remainder(rows)
    if bag_of.shape[0] == size * length and length:
        bag_of = bag_of.view(size, length) - range_for(bag_of, size).unsqueeze(1) * bags
        return (out, bag_of, bag_size, maximal), (0, 0, 0, 0)
    return (out, bag_of, bag_size, maximal), (0, None, 0, 0)


@batching_rule(aten.one_hot.default)
def one_hot(info: BatchInfo, in_dims: Dims, x: Tensor, num_classes: int = -1) -> Output:
    """By ``scatter``, which refuses a class out of range."""
    if num_classes <= 0 or x.dtype is not torch.int64:
        raise RuleDeclined("the number of classes depends on the data")
    zeros = x.new_zeros(()).expand(*x.shape, num_classes)
    return torch.scatter(zeros, -1, x.unsqueeze(-1), 1), in_dims[0]


# ---------------------------------------------------------------------------------------------------------------
# Membership


@batching_rule(aten.isin.Scalar_Tensor)
def isin_scalar(
    info: BatchInfo,
    in_dims: Dims,
    element: Any,
    test_elements: Tensor,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> Output:
    """One number in the tests of each example."""
    found = (flat_examples(test_elements, in_dims[1]) == element).any(1)
    return ~found if invert else found, 0
