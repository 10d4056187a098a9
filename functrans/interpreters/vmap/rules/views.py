"""Batching rules of views: the batch dimension stays where it is, or moves to the front; nothing is copied.

Dimensions count from the physical tensor's batch dimension: ``select``, ``transpose`` and their like only renumber
their dimensions, and return the batch dimension where it ends up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.interpreters.vmap.elementwise import elementwise
from functrans.interpreters.vmap.families import (
    RuleDeclined,
    any_rank,
    family,
    one_operator,
    pad_rank,
    physical_dim,
    reduced_dims,
    with_defaults,
)
from functrans.interpreters.vmap.table import (
    BATCHING_RULES,
    BatchInfo,
    Dims,
    Output,
    batching_rule,
    logical_shape,
    to_front,
)
from functrans.operators.views import CONJUGATED, PARTS, PERMUTATIONS, SPLITS, SWAPS, wrap_dim
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

# These neither name a dimension nor change one; ``view_as_real`` adds its dimension at the end.
elementwise(
    aten.alias.default,
    aten.detach.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.real.default,
    aten.imag.default,
    aten.view_as_real.default,
    aten._conj.default,
    aten._neg_view.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
)


# ---------------------------------------------------------------------------------------------------------------
# Shapes


@family
def reshaping(op: OpOverload, shape: Callable[..., Sequence[Any]]) -> Callable[..., Output]:
    """``op(x, ...)``: one reshape to ``shape(the batch's shape, ...)``, of views, too: a contiguous example may
    be a strided part of its batch."""

    def in_front(in_dims: Dims, x: Tensor, *args: Any) -> Any:
        return None if in_dims[0] else (aten.reshape.default, (x, shape(x.shape, *args)), 0)

    def reshaped(info: BatchInfo, in_dims: Dims, x: Tensor, *args: Any) -> Output:
        x = to_front(x, in_dims[0])
        return x.reshape(shape(x.shape, *args)), 0

    return any_rank(one_operator(in_front, reshaped))


def resized(shape: Sequence[Any], size: Sequence[Any], stride: Any = None) -> tuple[Any, ...]:
    return (shape[0], *(size if shape[0] else inferred_size(shape[1:], size)))


def inferred_size(example: Sequence[Any], size: Sequence[Any]) -> Sequence[Any]:
    """``size`` with its -1 filled in from the shape of one example, where the batch has none to tell."""
    if -1 not in size:
        return size
    numel, known = math.prod(example), math.prod(length for length in size if length != -1)
    if known == 0 or numel % known:
        raise RuntimeError(f"shape '{list(size)}' is invalid for input of size {numel}")
    return [numel // known if length == -1 else length for length in size]


def flattened(shape: Sequence[Any], start_dim: int = 0, end_dim: int = -1) -> tuple[Any, ...]:
    """The product is computed: -1 says nothing for an empty batch."""
    start, end = 1 + wrap_dim(start_dim, len(shape) - 1), 2 + wrap_dim(end_dim, len(shape) - 1)
    if start >= end:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    return (*shape[:start], math.prod(shape[start:end]), *shape[end:])


reshaping(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.view_copy.default,
    shape=resized,
)
reshaping(aten.flatten.using_ints, aten.ravel.default, shape=flattened)


@batching_rule(aten.view_as.default)
def view_as(info: BatchInfo, in_dims: Dims, x: Tensor, other: Tensor) -> Output:
    """Only the shape of ``other`` is used."""
    size = logical_shape(other, in_dims[1])
    if in_dims[0] is None:
        return x.reshape(size), None
    return to_front(x, in_dims[0]).reshape(info.batch_size, *size), 0


def expand(info: BatchInfo, in_dims: Dims, x: Tensor, size: Any, *, implicit: bool = False) -> Output:
    """New dimensions go behind the batch dimension."""
    x = to_front(x, in_dims[0])
    new = len(size) - (x.dim() - 1)
    if -1 in size[: max(new, 0)]:
        raise RuntimeError("expand: -1 is not allowed in a leading, non-existing dimension")
    return pad_rank(x, 0, len(size)).expand(x.shape[0], *size), 0


def expand_rest(in_dims: Dims, x: Tensor, size: Any) -> Any:
    shape = x.shape
    return (aten.expand.default, (x, (shape[0], *size)), 0) if not in_dims[0] and len(size) == len(shape) - 1 else None


batching_rule(aten.expand.default, aten.broadcast_to.default)(any_rank(one_operator(expand_rest, expand)))


@batching_rule(aten.expand_as.default)
def expand_as(info: BatchInfo, in_dims: Dims, x: Tensor, other: Tensor) -> Output:
    """Only the shape of ``other`` is used."""
    size = logical_shape(other, in_dims[1])
    return (x.expand(size), None) if in_dims[0] is None else expand(info, in_dims, x, size)


@batching_rule(aten.unflatten.int)
def unflatten(info: BatchInfo, in_dims: Dims, x: Tensor, dim: int, sizes: Any) -> Output:
    """The sizes replace one dimension."""
    bdim = in_dims[0]
    dim = physical_dim(dim, nonzero_rank(x), bdim)
    return x.unflatten(dim, sizes), bdim + len(sizes) - 1 if dim < bdim else bdim


def nonzero_rank(x: Tensor) -> int:
    """The logical rank of a batched tensor, for operators that refuse rank 0."""
    if x.dim() == 1:
        raise RuleDeclined("an example of rank 0 has no dimensions")
    return x.dim() - 1


@batching_rule(aten.view.dtype, aten.view_copy.dtype)
def view_dtype(info: BatchInfo, in_dims: Dims, x: Tensor, dtype: torch.dtype) -> Output:
    """A new element size changes the last dimension, and needs its elements side by side."""
    if dtype.itemsize == x.dtype.itemsize:
        return x.view(dtype), in_dims[0]
    return side_by_side(info, x, in_dims[0], max(dtype.itemsize // x.dtype.itemsize, 1)).view(dtype), 0


def side_by_side(info: BatchInfo, x: Tensor, bdim: int, joined: int) -> Tensor:
    """The batch, in front, of examples whose last dimension has its elements next to each other, so that ``joined`` of
    them can be taken for one: a view if they lie so."""
    nonzero_rank(x)
    x = to_front(x, bdim)
    if not info.batch_size:
        return x.new_empty(x.shape)  # an empty tensor counts as contiguous whatever its strides are
    *outer, last = x.stride()
    if last == 1 and all(step % joined == 0 for step in (x.storage_offset(), *outer)):
        return x
    return x.contiguous()


@batching_rule(aten.view_as_complex.default)
def view_as_complex(info: BatchInfo, in_dims: Dims, x: Tensor) -> Output:
    """The last dimension, of size 2, has its elements side by side."""
    return torch.view_as_complex(side_by_side(info, x, in_dims[0], 2)), 0


# ---------------------------------------------------------------------------------------------------------------
# Dimensions come and go


@batching_rule(aten.unsqueeze.default)
@any_rank
@one_operator
def unsqueeze(in_dims: Dims, x: Tensor, dim: int) -> Any:
    """One dimension more to count."""
    bdim, op = in_dims[0], aten.unsqueeze.default
    dim = wrap_dim(dim, x.dim())
    return (op, (x, dim), bdim + 1) if dim < bdim else (op, (x, dim + 1), bdim)


def squeezed(in_dims: Dims, x: Tensor, dim: int) -> Any:
    """The batch dimension is never one to squeeze, even where its size is 1."""
    bdim, rank = in_dims[0], x.dim() - 1
    dim = physical_dim(dim, rank, bdim)
    return (aten.squeeze.dim, (x, dim), bdim - (dim < bdim)) if rank and x.shape[dim] == 1 else None


def viewed(info: BatchInfo, in_dims: Dims, x: Tensor, *args: Any) -> Output:
    """A view all the same: what vmap returns of it is a tensor of its own, and not the caller's."""
    return aten.alias.default(x), in_dims[0]


batching_rule(aten.squeeze.dim)(any_rank(one_operator(squeezed, viewed)))


@batching_rule(aten.squeeze.default, aten.squeeze.dims)
@any_rank
def squeeze(info: BatchInfo, in_dims: Dims, x: Tensor, dims: Any = None) -> Output:
    """As above, for several dimensions."""
    bdim = in_dims[0]
    places = [d if d < bdim else d + 1 for d in reduced_dims(dims, x.dim() - 1, empty_means_all=False)]
    gone = [] if x.dim() == 1 else [d for d in places if x.shape[d] == 1]
    return x.squeeze(gone), bdim - sum(d < bdim for d in gone)


@batching_rule(aten.unbind.int)
def unbind(info: BatchInfo, in_dims: Dims, x: Tensor, dim: int = 0) -> Output:
    """As ``select``, for every index."""
    bdim = in_dims[0]
    dim = physical_dim(dim, nonzero_rank(x), bdim)
    outputs = x.unbind(dim)
    return outputs, (bdim - (dim < bdim),) * len(outputs)


@batching_rule(aten.diag_embed.default)
def diag_embed(info: BatchInfo, in_dims: Dims, x: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Output:
    """Dimensions count in the output."""
    x, rank = to_front(x, in_dims[0]), nonzero_rank(x) + 1
    return torch.diag_embed(x, offset, 1 + wrap_dim(dim1, rank), 1 + wrap_dim(dim2, rank)), 0


# ---------------------------------------------------------------------------------------------------------------
# Dimensions trade places


def swap_rule(dims: Callable[..., tuple[int, int]]) -> Callable[..., Output]:
    """The batch dimension stays."""

    def swapped(in_dims: Dims, x: Tensor, *args: Any) -> Any:
        bdim, rank = in_dims[0], x.dim() - 1
        if not rank and not args:
            return None
        dim0, dim1 = dims(*args)
        dim0, dim1 = physical_dim(dim0, rank, bdim), physical_dim(dim1, rank, bdim)
        return (aten.transpose.int, (x, dim0, dim1), bdim) if rank else None

    return one_operator(swapped, viewed)


def conjugated(rule: Callable[..., Output]) -> Callable[..., Output]:
    """What is complex is conjugated, too."""

    def conjugate(info: BatchInfo, in_dims: Dims, x: Tensor) -> Output:
        x, bdim = rule(info, in_dims, x)
        return x.conj() if x.is_complex() else x, bdim

    return conjugate


def permute_rule(order: Callable[..., Sequence[int]]) -> Callable[..., Output]:
    """One view, wherever the batch dimension is."""

    def permuted(in_dims: Dims, x: Tensor, *args: Any) -> Any:
        bdim, rank = in_dims[0], x.dim() - 1
        dims = order(rank, *args)
        if len(dims) != rank:
            raise RuntimeError(f"permute(sparse_coo): number of dimensions in the tensor input does not match the "
                               f"length of the desired ordering of dimensions i.e. input.dim() = {rank} is not equal "
                               f"to len(dims) = {len(dims)}")
        return aten.permute.default, (x, (bdim, *[physical_dim(d, rank, bdim) for d in dims])), 0

    return one_operator(permuted)


for _op, _dims in SWAPS.items():
    _rule = swap_rule(_dims)
    if len(_op._schema.arguments) > 1:  # the dimensions, which are counted
        any_rank(_rule)
    BATCHING_RULES.add(_op, conjugated(_rule) if _op in CONJUGATED else _rule)
for _op, _order in PERMUTATIONS.items():
    _rule = permute_rule(_order)
    BATCHING_RULES.add(_op, any_rank(_rule) if _op is aten.permute.default else _rule)


# ---------------------------------------------------------------------------------------------------------------
# Parts


def part_rule(op: OpOverload, dims: Sequence[int], drops: bool) -> Callable[..., Output]:
    """``op(x, *where)``: the dimensions in ``where``, at the places ``dims``, are renumbered; they may be gone then."""

    def part(in_dims: Dims, x: Tensor, *where: Any) -> Any:
        bdim = out_dim = in_dims[0]
        rank = nonzero_rank(x)
        physical = [x, *where] if len(where) > dims[-1] else with_defaults(op, (x, *where))
        for place in dims:
            physical[place + 1] = dim = physical_dim(physical[place + 1], rank, bdim)
            if drops and dim < bdim:
                out_dim -= 1
        return op, physical, out_dim

    return one_operator(part)


diagonal = part_rule(aten.diagonal.default, *PARTS[aten.diagonal.default][:2])
batching_rule(aten.diagonal.default)(diagonal)
for _op, _part in PARTS.items():
    if _op is not aten.diagonal.default:
        BATCHING_RULES.add(_op, any_rank(part_rule(_op, _part.dims, _part.drops)))


@batching_rule(aten.linalg_diagonal.default)
def linalg_diagonal(
    info: BatchInfo, in_dims: Dims, x: Tensor, *, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> Output:
    """Another order of arguments."""
    return diagonal(info, in_dims, x, offset, dim1, dim2)


@batching_rule(aten.diag.default)
def diag(info: BatchInfo, in_dims: Dims, x: Tensor, offset: int = 0) -> Output:
    """From a vector, or to one."""
    if nonzero_rank(x) > 2:
        raise RuleDeclined("diag takes vectors and matrices")
    return diag_embed(info, in_dims, x, offset) if x.dim() == 2 else diagonal(info, in_dims, x, offset)


@family
def splitting(op: OpOverload) -> Callable[..., Output]:
    """``op(x, how, dim=0)``, with a list of parts as output."""

    def split(info: BatchInfo, in_dims: Dims, x: Tensor, how: Any, dim: int = 0) -> Output:
        bdim = in_dims[0]
        outputs = tuple(op(x, how, physical_dim(dim, nonzero_rank(x), bdim)))
        return outputs, (bdim,) * len(outputs)

    return split


splitting(*SPLITS, aten.tensor_split.sections, aten.tensor_split.indices)
