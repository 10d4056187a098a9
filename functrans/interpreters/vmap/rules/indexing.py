"""Batching rules of advanced indexing: ``x[i, j]``, ``x[i] = v``, masks, ``take`` and ``put``.

NOTE [Where the result of advanced indexing goes]
PyTorch puts the dimensions of the broadcast indices where the first index was if all indices stand next to each
other, else in front. The batch of an indexed tensor gets an index of its own, ``arange(B)``, only where some index is
batched as well; standing first, it moves the result's index dimensions to the front of the example whenever they were
not there already, and they are moved back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functrans.boundary.factories import range_for
from functrans.interpreters.vmap.families import RuleDeclined, flat_examples, pad_rank
from functrans.interpreters.vmap.rules.scatter import (
    index_select,
    long_rows,
    rows_pay,
    scatter_scaled,
    writing_positions_rule,
)
from functrans.interpreters.vmap.table import (
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_rank,
    logical_shape,
    materialize,
    to_front,
)

aten = torch.ops.aten
MASKS = (torch.bool, torch.uint8)
add_slices = writing_positions_rule(aten.index_add.default, scatter_scaled)


def batch_index(x: Tensor, size: int, rank: int) -> Tensor:
    """``arange(B)`` with ``rank`` dimensions of size 1 behind it: every example its own row."""
    return range_for(x, size).view(size, *[1] * rank)


class Indices:
    """A list of indices, masks among them replaced by positions as soon as they have to be."""

    def __init__(self, info: BatchInfo, indices: Sequence[Tensor | None], dims: Sequence[int | None]) -> None:
        self.size = info.batch_size
        self.values, self.dims = list(indices), list(dims) + [None] * (len(indices) - len(dims))
        for i, d in zip(self.values, self.dims):
            if i is not None and i.dtype in MASKS and (d is not None or i.dim() == 0):
                raise RuleDeclined("the size of the result depends on the data of a batched mask")
        self.batched = any(d is not None for d in self.dims)
        if self.batched:
            self.replace_masks()
        present = [k for k, i in enumerate(self.values) if i is not None]
        self.first = present[0]
        self.adjacent = present[-1] - self.first == len(present) - 1
        indexing = [(i, d) for i, d in zip(self.values, self.dims) if i is not None]
        #: rank of the broadcast indices of one example
        self.rank = max(1 if i.dtype in MASKS else logical_rank(i, d) for i, d in indexing)
        #: how many dimensions of an example are indexed
        self.indexed = sum(i.dim() if i.dtype in MASKS else 1 for i, _ in indexing)
        self.masked = indexing[0][0].dtype in MASKS

    def single(self) -> bool:
        """Whether this is one vector of positions along one dimension, for which there are faster operators."""
        return self.indexed == 1 and self.rank == 1 and not self.masked

    def replace_masks(self) -> None:
        """A mask is as many indices as it has dimensions."""
        values: list[Tensor | None] = []
        dims: list[int | None] = []
        for i, d in zip(self.values, self.dims):
            parts = i.nonzero().unbind(1) if i is not None and i.dtype in MASKS else (i,)
            values.extend(parts)
            dims.extend([d] * len(parts))
        self.values, self.dims = values, dims

    def of_batch(self, x: Tensor) -> list[Tensor | None]:
        """Indices into ``x`` of which ``x``'s batch dimension, the first, has one too."""
        return [batch_index(x, self.size, self.rank), *self.physical()]

    def physical(self) -> list[Tensor | None]:
        """The indices with their batch dimensions in front, aligned."""
        return [
            i if i is None or d is None else pad_rank(i, d, self.rank) for i, d in zip(self.values, self.dims)
        ]


@batching_rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(info: BatchInfo, in_dims: Dims, x: Tensor, indices: Sequence[Tensor | None]) -> Output:
    """See NOTE [Where the result of advanced indexing goes]."""
    x_dim = in_dims[0]
    at = Indices(info, indices, in_dims[1] or ())
    if at.single():
        x, x_dim = (x, None) if x_dim is None else (to_front(x, x_dim), 0)
        physical, at_dim = at.first + (x_dim is not None), at.dims[at.first]
        if long_rows(x, physical) and (x_dim is None or at_dim is None or physical == 1):
            return select_one(info, x, x_dim, at.first, at.values[at.first], at_dim)  # type: ignore[arg-type]
    if x_dim is None:
        return aten.index.Tensor(x, at.physical()), at.first if at.adjacent else 0
    x = to_front(x, x_dim)
    if not at.batched:
        return aten.index.Tensor(x, [None, *at.values]), 0 if at.adjacent else at.rank
    out = aten.index.Tensor(x, at.of_batch(x))
    if at.adjacent and at.first > 0 and at.rank > 0:
        out = out.movedim(tuple(range(1, 1 + at.rank)), tuple(range(1 + at.first, 1 + at.first + at.rank)))
    return out, 0


def select_one(info: BatchInfo, x: Tensor, x_dim: int | None, dim: int, at: Tensor, at_dim: int | None) -> Output:
    """``index_select``, for which positions do not count from the end."""
    extent = x.shape[dim + (x_dim is not None)]
    at = torch.where(at < 0, at + extent, at)
    return index_select(info, (x_dim, None, at_dim), x, dim, at)


@batching_rule(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(
    info: BatchInfo,
    in_dims: Dims,
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
) -> Output:
    """See NOTE [Where the result of advanced indexing goes]; the values stand as the result of ``index`` would."""
    x_dim, index_dims, values_dim = in_dims[0], list(in_dims[1] or ()), in_dims[2]
    masked = masked_put(x, x_dim, indices, index_dims, values, values_dim, accumulate)
    if masked is not None:
        return masked, 0
    at = Indices(info, indices, index_dims)
    x = materialize(x, x_dim, info.batch_size)
    rank = at.rank + x.dim() - 1 - at.indexed
    if logical_rank(values, values_dim) > rank:
        raise RuleDeclined("values of a higher rank than the result of the indexing")
    adding = accumulate and x.dtype is values.dtype and x.dtype is not torch.bool
    if adding and at.single() and at.first == 0 and rows_pay(x, 1):
        return add_rows(info, x, at.values[0], at.dims[0], values, values_dim), 0  # type: ignore[arg-type]
    if at.adjacent and not at.batched:
        values = values if values_dim is None else pad_rank(values, values_dim, rank)
        return aten.index_put.default(x, [None, *at.values], values, accumulate), 0
    if at.adjacent and at.first > 0 and at.rank > 0:
        values = values.unsqueeze(0) if values_dim is None else to_front(values, values_dim)
        values = pad_rank(values, 0, rank)
        values = values.movedim(tuple(range(1 + at.first, 1 + at.first + at.rank)), tuple(range(1, 1 + at.rank)))
    elif values_dim is not None:
        values = pad_rank(values, values_dim, rank)
    return aten.index_put.default(x, at.of_batch(x), values, accumulate), 0


def add_rows(
    info: BatchInfo, x: Tensor, at: Tensor, at_dim: int | None, values: Tensor, values_dim: int | None
) -> Tensor:
    """``index_add``, for which positions do not count from the end, and nothing broadcasts."""
    at = torch.where(at < 0, at + x.shape[1], at)
    shape = (info.batch_size, at.shape[0] if at_dim is None else at.shape[1 - at_dim], *x.shape[2:])
    values = (values if values_dim is None else pad_rank(values, values_dim, len(shape) - 1)).expand(shape)
    return add_slices(info, (0, None, at_dim, 0), x, 0, at, values)[0]


def masked_put(
    x: Tensor,
    x_dim: int | None,
    indices: Sequence[Tensor | None],
    index_dims: Sequence[int | None],
    values: Tensor,
    values_dim: int | None,
    accumulate: bool,
) -> Tensor | None:
    """``x[..., mask, ...] = v`` with a batched mask and the same ``v`` wherever it is true; None for anything else."""
    present = [k for k, i in enumerate(indices) if i is not None]
    if len(present) != 1 or index_dims[present[0]] is None:
        return None
    before = present[0]
    mask = indices[before]
    assert mask is not None
    if mask.dtype is not torch.bool or mask.dim() == 1:
        return None
    rank, mask_rank = logical_rank(x, x_dim), mask.dim() - 1
    after = rank - before - mask_rank
    mask_dim, shape = index_dims[before], logical_shape(x, x_dim)
    if values.dtype is not x.dtype or shape[before : before + mask_rank] != logical_shape(mask, mask_dim):
        return None
    # The true places are one dimension of the result: values may not differ along it.
    values = values if values_dim is None else to_front(values, values_dim)
    has_batch = values_dim is not None
    value_shape = values.shape[has_batch:]
    if len(value_shape) > after:
        if value_shape[-1 - after] != 1 or len(value_shape) > before + 1 + after:
            return None
        lead, tail = value_shape[: len(value_shape) - after - 1], value_shape[len(value_shape) - after :]
        values = values.reshape(*values.shape[:has_batch], *lead, *[1] * mask_rank, *tail)
    if any(a not in (1, b) for a, b in zip(reversed(values.shape[has_batch:]), reversed(shape))):
        return None
    if has_batch:
        values = pad_rank(values, 0, rank)
    x = x if x_dim is None else to_front(x, x_dim)
    mask = to_front(mask, mask_dim)
    mask = mask.reshape(mask.shape[0], *[1] * before, *mask.shape[1:], *[1] * after)
    return torch.where(mask, x + values if accumulate else values, x)


@batching_rule(aten._index_put_impl.default)
def index_put_impl(
    info: BatchInfo,
    in_dims: Dims,
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Output:
    """The pure form of what ``index_put_`` is made of."""
    return index_put(info, in_dims, x, indices, values, accumulate)


# ---------------------------------------------------------------------------------------------------------------
# Positions in the flattened example


@batching_rule(aten.take.default)
def take(info: BatchInfo, in_dims: Dims, x: Tensor, at: Tensor) -> Output:
    """As one index into the flattened example: negative positions count from its end."""
    x_dim, at_dim = in_dims
    if x_dim is None:
        return torch.take(x, at), at_dim
    x = flat_examples(x, x_dim)
    if at_dim is None:
        return aten.index.Tensor(x, [None, at]), 0
    at = to_front(at, at_dim)
    places = flat_examples(at, 0)
    return torch.gather(x, 1, torch.where(places < 0, places + x.shape[1], places)).reshape(at.shape), 0


@batching_rule(aten.put.default)
def put(
    info: BatchInfo, in_dims: Dims, x: Tensor, at: Tensor, source: Tensor, accumulate: bool = False
) -> Output:
    """As one index into the flattened example."""
    size = info.batch_size
    x = materialize(x, in_dims[0], size)
    flat = flat_examples(x, 0)
    rows = at.reshape(-1) if in_dims[1] is None else flat_examples(at, in_dims[1])
    values = source.reshape(-1) if in_dims[2] is None else flat_examples(source, in_dims[2])
    if rows.shape[-1] != values.shape[-1]:
        raise RuleDeclined("put takes as many values as positions")
    out = aten.index_put.default(flat, [batch_index(x, size, 1), rows], values, accumulate)
    return out.reshape(x.shape), 0


# ---------------------------------------------------------------------------------------------------------------
# Masks


@batching_rule(aten.masked_scatter.default)
def masked_scatter(info: BatchInfo, in_dims: Dims, x: Tensor, mask: Tensor, source: Tensor) -> Output:
    """The k-th true place takes the k-th element of the source: k is a cumulative sum of the mask."""
    size = info.batch_size
    rank = max(logical_rank(v, d) for v, d in zip((x, mask), in_dims))
    x, mask = (pad_rank(materialize(v, d, size), 0, rank) for v, d in zip((x, mask), in_dims))
    x, mask = torch.broadcast_tensors(x, mask)
    source = flat_examples(materialize(source, in_dims[2], size), 0)
    if source.dtype is not x.dtype or source.shape[1] == 0 or mask.dtype is not torch.bool:
        raise RuleDeclined("masked_scatter takes elements of the same dtype")
    places = (flat_examples(mask, 0).cumsum(1) - 1).clamp(min=0)
    return torch.where(mask, source.gather(1, places).reshape(x.shape), x), 0
