"""Views by their normal forms: each is said once, and every transform's rule is made of that.

A view that moves elements without looking into them is a *swap* of two dimensions, another *permutation* of them, a
*reshape*, an *expansion*, or it shows a *part*: what lies at some places along one or two dimensions. A *split* shows
several parts, each a slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def wrap_dim(dim: int, rank: int) -> int:
    """A dimension as a non-negative number; rank 0 counts as rank 1, as in PyTorch."""
    rank = max(rank, 1)
    if not -rank <= dim < rank:
        raise IndexError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
    return dim % rank


# ---------------------------------------------------------------------------------------------- dimensions trade places

#: The two dimensions that an operator swaps, from its other arguments. (What has less than two is left as it is.)
SWAPS: dict[OpOverload, Callable[..., tuple[int, int]]] = {
    aten.transpose.int: lambda dim0, dim1: (dim0, dim1),
    aten.swapaxes.default: lambda dim0, dim1: (dim0, dim1),
    aten.swapdims.default: lambda dim0, dim1: (dim0, dim1),
    aten.t.default: lambda: (0, -1),
    aten.mT.default: lambda: (-2, -1),
    aten.mH.default: lambda: (-2, -1),
    aten.adjoint.default: lambda: (-2, -1),
    aten.matrix_H.default: lambda: (-2, -1),
}

#: Those that conjugate complex numbers, too.
CONJUGATED = frozenset((aten.mH.default, aten.adjoint.default, aten.matrix_H.default))


def moved(rank: int, source: Any, destination: Any) -> list[int]:
    """The order that ``movedim`` makes."""
    order = list(range(rank))
    if isinstance(source, int):
        source, destination = wrap_dim(source, rank), wrap_dim(destination, rank)
        if rank:
            order.insert(destination, order.pop(source))
        return order
    froms, tos = ([wrap_dim(d, rank) for d in dims] for dims in (source, destination))
    if not len(froms) == len(tos) == len(set(froms)) == len(set(tos)):
        raise RuntimeError(f"movedim: expected a destination for each source, none twice; got {source}, {destination}")
    order = [d for d in order if d not in froms]
    for place, d in sorted(zip(tos, froms)) if rank else ():
        order.insert(place, d)
    return order


#: The order that an operator brings dimensions into, for each of the view the one that it was, from their number and
#: its other arguments.
PERMUTATIONS: dict[OpOverload, Callable[..., Sequence[int]]] = {
    aten.permute.default: lambda rank, dims: dims,
    aten.numpy_T.default: lambda rank: range(rank)[::-1],
    **dict.fromkeys((aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist), moved),
}


def order_of(op: OpOverload, rank: int, *args: Any) -> list[int]:
    """The order that a swap or permutation brings dimensions into."""
    if op in PERMUTATIONS:
        return [d % rank for d in PERMUTATIONS[op](rank, *args)]
    order = list(range(rank))
    if rank > 1:
        first, second = SWAPS[op](*args)
        order[first], order[second] = order[second], order[first]
    return order


def inverse(order: Sequence[int]) -> list[int]:
    """The order that undoes ``order``."""
    found = [0] * len(order)
    for place, dim in enumerate(order):
        found[dim] = place
    return found


# -------------------------------------------------------------------------------------------------------------- shapes

#: All elements, in their order, in another shape.
RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default,
    aten.reshape_as.default, aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int, aten.ravel.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip

#: Each element along new dimensions, and along those of size 1.
EXPANSIONS = (aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)

# --------------------------------------------------------------------------------------------------------------- parts


class Part(NamedTuple):
    """The view ``op(x, *where)``, and the two operators that put something in its place."""

    #: where in ``where`` dimensions are named
    dims: tuple[int, ...]
    #: whether these are gone in the view
    drops: bool
    #: ``backward(grad, shape, *where)``: zeros of ``shape`` with ``grad`` in the view's place
    backward: OpOverload | None = None
    #: ``scatter(x, src, *where)``: ``x`` with ``src`` in the view's place
    scatter: OpOverload | None = None


PARTS: dict[OpOverload, Part] = {
    aten.select.int: Part((0,), True, aten.select_backward.default, aten.select_scatter.default),
    aten.slice.Tensor: Part((0,), False, aten.slice_backward.default, aten.slice_scatter.default),
    aten.diagonal.default: Part((1, 2), True, aten.diagonal_backward.default, aten.diagonal_scatter.default),
    aten.unfold.default: Part((0,), False, aten.unfold_backward.default),
    aten.narrow.default: Part((0,), False),
}

# -------------------------------------------------------------------------------------------------------------- splits


def piece_of_size(length: int, size: int, index: int) -> tuple[int, int]:
    """Where pieces of one size begin and end; the last may be shorter."""
    return index * size, min((index + 1) * size, length)


def piece_of_sizes(length: int, sizes: Sequence[int], index: int) -> tuple[int, int]:
    start = sum(sizes[:index])
    return start, start + sizes[index]


def piece_of_chunks(length: int, chunks: int, index: int) -> tuple[int, int]:
    return piece_of_size(length, -(-length // chunks), index)


#: For ``op(x, how, dim)``, which returns all pieces of a dimension: where a piece begins and where it ends, from the
#: dimension's length, ``how`` and the piece's index.
SPLITS: dict[OpOverload, Callable[[int, Any, int], tuple[int, int]]] = {
    **dict.fromkeys((aten.split.Tensor, aten.unsafe_split.Tensor), piece_of_size),
    **dict.fromkeys(
        (aten.split.sizes, aten.split_with_sizes.default, aten.unsafe_split_with_sizes.default), piece_of_sizes
    ),
    **dict.fromkeys((aten.chunk.default, aten.unsafe_chunk.default), piece_of_chunks),
}
