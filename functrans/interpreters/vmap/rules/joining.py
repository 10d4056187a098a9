"""Batching rules of operators that join a list of tensors.

The unbatched ones of the list are expanded, a view; the copy into the output is needed anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.elementwise import logical_result_type
from functrans.interpreters.vmap.families import RuleDeclined, one_operator, pad_rank
from functrans.interpreters.vmap.table import BatchInfo, Dims, Output, batching_rule, materialize, to_front
from functrans.operators.views import wrap_dim
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.broadcasting import broadcast_shapes

aten = torch.ops.aten


def materialized(info: BatchInfo, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """All batched, in front."""
    return [x if d == 0 else materialize(x, d, info.batch_size) for x, d in zip(tensors, dims)]


def of_one_rank(op: OpOverload, new: int, otherwise: Any) -> Any:
    """The rule of joining along a dimension, one of ``new`` more: one operator where all batches lie in front."""

    def as_they_lie(in_dims: Dims, tensors: Sequence[Tensor], dim: int = 0) -> Any:
        rank = len(tensors[0].shape)
        for x, bdim in zip(tensors, in_dims[0]):
            if bdim != 0 or len(x.shape) != rank:
                return None
        return op, (tensors, wrap_dim(dim, rank - 1 + new) + 1), 0

    return one_operator(as_they_lie, otherwise)


def cat(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor], dim: int = 0) -> Output:
    """All tensors have one rank, so that promotion sees no difference between an example and its batch."""
    parts = materialized(info, tensors, in_dims[0])
    rank = max(x.dim() for x in parts) - 1
    if any(x.dim() != rank + 1 for x in parts):
        parts = without_legacy_empties(parts, rank + 1, dim)
    return torch.cat(parts, wrap_dim(dim, rank) + 1), 0


for _op in (aten.cat.default, aten.concat.default, aten.concatenate.default):
    batching_rule(_op)(of_one_rank(aten.cat.default, 0, cat))


def without_legacy_empties(parts: list[Tensor], rank: int, dim: int) -> list[Tensor]:
    """A vector of size 0 joins tensors of any rank: it counts for the dtype only."""
    full = next(x for x in parts if x.dim() == rank)
    shape = list(full.shape)
    shape[wrap_dim(dim, rank - 1) + 1] = 0
    joined = []
    for x in parts:
        if x.dim() != rank and (x.dim() != 2 or x.shape[1] != 0):
            raise RuleDeclined("cat takes tensors of one rank")
        joined.append(x if x.dim() == rank else x.new_empty(shape))
    return joined


def stack(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor], dim: int = 0) -> Output:
    """The new dimension counts behind the batch."""
    parts = materialized(info, tensors, in_dims[0])
    return torch.stack(parts, wrap_dim(dim, parts[0].dim()) + 1), 0


batching_rule(aten.stack.default)(of_one_rank(aten.stack.default, 1, stack))


@batching_rule(aten.hstack.default)
def hstack(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor]) -> Output:
    """Along the second dimension, vectors along their only one."""
    parts = at_least(materialized(info, tensors, in_dims[0]), 1)
    return torch.cat(parts, 1 if parts[0].dim() == 2 else 2), 0


@batching_rule(aten.vstack.default, aten.row_stack.default)
def vstack(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor]) -> Output:
    """Along the first of at least two dimensions."""
    return torch.cat(at_least(materialized(info, tensors, in_dims[0]), 2), 1), 0


@batching_rule(aten.dstack.default)
def dstack(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor]) -> Output:
    """Along the third of at least three dimensions."""
    return torch.cat(at_least(materialized(info, tensors, in_dims[0]), 3), 3), 0


@batching_rule(aten.column_stack.default)
def column_stack(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor]) -> Output:
    """Vectors are columns here."""
    parts = materialized(info, tensors, in_dims[0])
    return torch.cat([x.reshape(x.shape[0], -1 if x.numel() else x.shape[-1] if x.dim() == 2 else 1, 1)
                      if x.dim() <= 2 else x for x in parts], 2), 0


def at_least(parts: list[Tensor], rank: int) -> list[Tensor]:
    """Batches of examples of at least ``rank`` dimensions, placed as ``atleast_3d`` does."""
    return [grown(x, rank, 1) for x in parts]


def grown(x: Tensor, rank: int, batch: int) -> Tensor:
    """One of them; ``batch`` is the number of batch dimensions in front."""
    shape, have = x.shape, x.dim() - batch
    if have >= rank:
        return x
    if rank == 3 and have:
        # A vector becomes [1, n, 1], a matrix [n, m, 1].
        return x.reshape(*shape[:batch], *([1] if have == 1 else []), *shape[batch:], 1)
    return x.reshape(*shape[:batch], *[1] * (rank - have), *shape[batch:])


@batching_rule(aten.atleast_1d.default)
def atleast_1d(info: BatchInfo, in_dims: Dims, x: Tensor) -> Output:
    """Where the rank is enough, nothing is moved."""
    return (x, in_dims[0]) if x.dim() > 1 else (grown(x, 1, 1), 0)


@batching_rule(aten.atleast_2d.default)
def atleast_2d(info: BatchInfo, in_dims: Dims, x: Tensor) -> Output:
    """Where the rank is enough, nothing is moved."""
    return (x, in_dims[0]) if x.dim() > 2 else (grown(to_front(x, in_dims[0]), 2, 1), 0)


@batching_rule(aten.atleast_3d.default)
def atleast_3d(info: BatchInfo, in_dims: Dims, x: Tensor) -> Output:
    """Where the rank is enough, nothing is moved."""
    return (x, in_dims[0]) if x.dim() > 3 else (grown(to_front(x, in_dims[0]), 3, 1), 0)


@batching_rule(aten.broadcast_tensors.default)
def broadcast_tensors(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor]) -> Output:
    """Unbatched ones stay unbatched."""
    dims = in_dims[0]
    rank = max(x.dim() - (d is not None) for x, d in zip(tensors, dims))
    aligned = [x if d is None else pad_rank(x, d, rank) for x, d in zip(tensors, dims)]
    shape = broadcast_shapes(*(x.shape if d is None else x.shape[1:] for x, d in zip(aligned, dims)))
    outputs = tuple(
        x.expand(shape) if d is None else x.expand(info.batch_size, *shape) for x, d in zip(aligned, dims)
    )
    return outputs, tuple(None if d is None else 0 for d in dims)


@batching_rule(aten.meshgrid.default)
def meshgrid(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor], *, indexing: str = "ij") -> Output:
    """Every vector is expanded along the dimensions of the others."""
    dims = in_dims[0]
    parts = [x if d is None else to_front(x, d) for x, d in zip(tensors, dims)]
    parts = [x.unsqueeze(-1) if x.dim() == (d is not None) else x for x, d in zip(parts, dims)]
    rank = len(parts)
    if any(x.dim() != 1 + (d is not None) for x, d in zip(parts, dims)) or indexing not in ("ij", "xy"):
        raise RuleDeclined("meshgrid takes vectors")
    sizes = [x.shape[-1] for x in parts]
    outputs = []
    for place, (x, d) in enumerate(zip(parts, dims)):
        lead = [] if d is None else [info.batch_size]
        out = x.view(*lead, *[1] * place, sizes[place], *[1] * (rank - 1 - place)).expand(*lead, *sizes)
        swap = indexing == "xy" and rank > 1
        outputs.append(out.transpose(len(lead), len(lead) + 1) if swap else out)
    return tuple(outputs), tuple(None if d is None else 0 for d in dims)


@batching_rule(aten.meshgrid.indexing)
def meshgrid_indexing(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor], *, indexing: str) -> Output:
    """With the order of the first two dimensions given."""
    return meshgrid(info, in_dims, tensors, indexing=indexing)


@batching_rule(aten.block_diag.default)
def block_diag(info: BatchInfo, in_dims: Dims, tensors: Sequence[Tensor]) -> Output:
    """Blocks with zeros on both sides, joined."""
    parts = at_least(materialized(info, tensors, in_dims[0]), 2)
    if any(x.dim() != 3 for x in parts):
        raise RuleDeclined("block_diag takes matrices")
    dtype = logical_result_type(list(zip(tensors, in_dims[0], strict=True)))
    total, before, rows = sum(x.shape[2] for x in parts), 0, []
    for x in parts:
        width = x.shape[2]
        rows.append(aten.constant_pad_nd.default(x.to(dtype), [before, total - before - width]))
        before = before + width
    return torch.cat(rows, 1), 0
