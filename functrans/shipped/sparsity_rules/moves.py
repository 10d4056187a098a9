"""Elements that move."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import map_tensors
from functrans.operators.views import PARTS, PERMUTATIONS, RESHAPES, SPLITS, SWAPS
from functrans.shipped.sparsity_level import OperatorCall, everything, pattern_of

aten = torch.ops.aten


#: of the arguments, those whose elements move; the other tensors say where to
MOVED = ("self", "tensors", "src", "grad_output", "weight")


@pattern_of(aten.expand_as.default)
def expand_as(call: OperatorCall) -> Any:
    return call.numbers(call["self"]).expand(call.outs[0].shape)


@pattern_of(*RESHAPES, aten.view_copy.default, aten._reshape_alias_copy.default)
def reshape(call: OperatorCall) -> Any:
    return call.numbers(call["self"]).reshape(call.outs[0].shape)


#: operators that move elements, and nothing else
MOVES = (
    *SWAPS, *PERMUTATIONS, *PARTS, *(part.scatter for part in PARTS.values() if part.scatter is not None),
    aten.select_backward.default, aten.slice_backward.default, aten.diagonal_backward.default,
    aten.expand.default, aten.broadcast_to.default, aten.repeat.default, aten.diag_embed.default, aten.tril.default,
    aten.triu.default, aten.flip.default, aten.roll.default, aten.rot90.default, aten.cat.default, aten.stack.default,
    *SPLITS, aten.unbind.int, aten.index.Tensor, aten._unsafe_index.Tensor, aten.gather.default,
    aten.index_select.default, aten.take.default, aten.masked_select.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.diagonal_copy.default, aten.expand_copy.default, aten.permute_copy.default,
    aten.select_copy.int, aten.slice_copy.Tensor, aten.split_copy.Tensor, aten.split_with_sizes_copy.default,
    aten.squeeze_copy.default, aten.squeeze_copy.dim, aten.squeeze_copy.dims, aten.t_copy.default,
    aten.transpose_copy.int, aten.unbind_copy.int, aten.unfold_copy.default, aten.unsqueeze_copy.default,
)  # fmt: skip


@pattern_of(*MOVES)
def moved(call: OperatorCall) -> Any:
    """The operator itself, on the numbers."""
    return by_moving(call, {})


@pattern_of(aten.constant_pad_nd.default)
def padded(call: OperatorCall) -> Any:
    return by_moving(call, {"value": 0})


@pattern_of(aten.scatter.value, aten.index_fill.int_Scalar)
def overwritten(call: OperatorCall) -> Any:
    return by_moving(call, {"value": 0})


@pattern_of(aten.embedding.default)
def embedding(call: OperatorCall) -> Any:
    indices = call.known(call["indices"])
    return everything(call) if indices is None else call.numbers(call["weight"])[indices]


@pattern_of(aten.view_as_real.default)
def view_as_real(call: OperatorCall) -> Any:
    return call.numbers(call["self"]).unsqueeze(-1)


@pattern_of(aten.view_as_complex.default)
def view_as_complex(call: OperatorCall) -> Any:
    return call.sets.union_last(call.numbers(call["self"]))


def by_moving(call: OperatorCall, instead: dict[str, Any]) -> Any:
    unknown = False

    def given(name: str, a: Tensor) -> Any:
        nonlocal unknown
        if name in MOVED:
            return call.numbers(a)
        known = call.known(a)
        unknown = unknown or known is None
        return known

    named = {name: instead.get(name, map_tensors(partial(given, name), a)) for name, a in call.named.items()}
    if unknown:
        return everything(call)
    found = call.op(**named)
    return found if isinstance(found, list | tuple) else [found]


def added(call: OperatorCall, source: str, places: Tensor, keeps: bool = True) -> Tensor:
    """``source`` added to ``self`` at ``places``, positions in ``self`` for each of its elements.

    ``keeps``: what was there stays there. If not, it goes where one element comes; of several that come to one place
    any may win.
    """
    numbers = call.numbers(call["self"])
    out = numbers.flatten().clone()
    coming = call.numbers(call[source])
    if coming.shape != places.shape:  # a source may be larger than the index of scatter, or broadcast
        larger = coming.dim() == places.dim() and all(a >= b for a, b in zip(coming.shape, places.shape, strict=True))
        coming = coming[tuple(slice(n) for n in places.shape)] if larger else coming.expand(places.shape)
    places, coming = places.flatten(), coming.flatten()
    if not keeps and len(torch.unique(places)) == len(places):
        out[places] = coming
        return out.reshape(numbers.shape)
    order = torch.argsort(places, stable=True)
    for_place: dict[int, list[int]] = {}
    for place, n in zip(places[order].tolist(), coming[order].tolist(), strict=True):
        for_place.setdefault(place, []).append(n)
    for place, several in for_place.items():
        out[place] = call.sets.union_of([*several, int(out[place])] if keeps else several)
    return out.reshape(numbers.shape)


def positions(call: OperatorCall) -> Tensor:
    shape = call["self"].shape
    return torch.arange(math.prod(shape)).reshape(shape)


@pattern_of(aten.index_put.default, aten._unsafe_index_put.default)
def index_put(call: OperatorCall) -> Any:
    indices = [i if i is None else call.known(i) for i in call["indices"]]
    if any(i is None and given is not None for i, given in zip(indices, call["indices"], strict=True)):
        return everything(call)
    return added(call, "values", aten.index.Tensor(positions(call), indices), call["accumulate"])


@pattern_of(aten.scatter.src, aten.scatter_add.default)
def scatter(call: OperatorCall) -> Any:
    index = call.known(call["index"])
    if index is None or call["self"].dim() == 0:
        return everything(call)
    places = positions(call)
    room = [slice(n) for n in index.shape]
    room[call["dim"]] = slice(None)
    return added(call, "src", places[tuple(room)].gather(call["dim"], index), call.op is aten.scatter_add.default)


@pattern_of(aten.index_add.default, aten.index_copy.default)
def index_add(call: OperatorCall) -> Any:
    index = call.known(call["index"])
    if index is None or call["self"].dim() == 0:
        return everything(call)
    places = positions(call).index_select(call["dim"], index)
    return added(call, "source", places, call.op is aten.index_add.default)
