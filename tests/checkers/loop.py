"""What vmap means: a loop over the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, _broadcast_to_and_flatten, tree_flatten, tree_unflatten

#: an int for all arguments, or one for each argument or subtree of it; None: the same for every example
InDims = Any


def flat_dims(in_dims: InDims, spec: TreeSpec) -> list[int | None]:
    """The batch dimension of every leaf of the arguments."""
    if isinstance(in_dims, int):
        return [in_dims] * spec.num_leaves
    dims = _broadcast_to_and_flatten(tuple(in_dims), spec)
    assert dims is not None, f"in_dims {in_dims} do not fit {spec}"
    return dims


def examples(leaves: Sequence[Any], dims: Sequence[int | None]) -> Iterator[list[Any]]:
    """The leaves of each example: views of the batch."""
    size = next(x.shape[d] for x, d in zip(leaves, dims) if d is not None)
    for i in range(size):
        yield [x if d is None else x.select(d, i) for x, d in zip(leaves, dims)]


def stacked(results: Sequence[Any], out_dims: int = 0) -> Any:
    """The results of all examples as one tree of batches."""
    columns = zip(*(tree_flatten(result)[0] for result in results))
    return tree_unflatten([torch.stack(column, out_dims) for column in columns], tree_flatten(results[0])[1])


def for_each(f: Callable[..., Any], in_dims: InDims = 0, out_dims: int = 0) -> Callable[..., Any]:
    """``vmap`` by a loop."""

    def looped(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        rows = examples(leaves, flat_dims(in_dims, spec))
        return stacked([f(*tree_unflatten(row, spec)) for row in rows], out_dims)

    return looped


def for_each_alone(f: Callable[..., Any], in_dims: InDims = 0) -> Callable[..., Any]:
    """``vmap`` by a loop over examples with memory and random numbers of their own, whose writes reach the batch."""

    def looped(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        dims = flat_dims(in_dims, spec)
        state = torch.get_rng_state()
        results = []
        for views in examples(leaves, dims):
            torch.set_rng_state(state)
            row = [x if d is None else x.clone() for x, d in zip(views, dims)]  # as_strided looks at storage
            results.append(f(*tree_unflatten(row, spec)))
            write_back(views, row)
        return stacked(results)

    return looped


@torch.no_grad()
def write_back(views: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for view, copy in zip(views, copies):
        if copy is not view and copy.shape == view.shape and not torch.equal(copy, view):
            view.copy_(copy)
