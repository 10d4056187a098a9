"""Derivatives of ``scatter_reduce`` and ``index_reduce``.

PyTorch (torch 2.13) has no tangent of ``"prod"``: it is 0 without a word, and its gradients divide by the factors, so
that zeros among them are wrong at second order. Here a product is differentiated without a division. Ties of ``"amax"``
and ``"amin"`` share evenly, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.helpers import add, conj
from functrans.derivatives.named import with_names
from functrans.derivatives.table import derivative
from functrans.functionalization.without_data import refuse_as, run_on_zeros

aten = torch.ops.aten
Values = dict[str, Any]


class Slopes(NamedTuple):
    """Partial derivatives of every place by its own element of ``self`` (None: 1), and by each of ``src`` put there."""

    self: Tensor | None
    src: Tensor


def of_vectors(formula: Callable[[Values], Tensor | None], of: str) -> Callable[[Values], Tensor | None]:
    """``formula``, in the shape of ``of``: PyTorch takes a number and a vector of one element for each other."""

    def reshaped(v: Values) -> Tensor | None:
        if all(v[name].dim() for name in ("self", "index", "src")):
            return formula(v)
        found = formula({k: x.reshape(1) if isinstance(x, Tensor) and not x.dim() else x for k, x in v.items()})
        return None if found is None else found.reshape(v[of].shape)

    return reshaped


def slopes(v: Values) -> Slopes:
    self, dim, index, reduce, result = v["self"], v["dim"], v["index"], v["reduce"], v["result"]
    src = corner(v["src"], index)
    # 0 where elements of src arrive
    kept = None if v["include_self"] else 1 - torch.zeros_like(self).scatter(dim, index, 1)
    if reduce == "prod":
        return slopes_of_products(self, dim, index, src, kept)
    if reduce == "sum":
        return Slopes(kept, torch.ones_like(src))
    if reduce == "mean":
        start = torch.ones_like(self) if kept is None else kept
        count = start.scatter_add(dim, index, torch.ones_like(src))
        return Slopes(start / count, (1 / count).gather(dim, index))
    of_self = (self == result).to(self.dtype)
    of_self = of_self if kept is None else of_self * kept
    of_src = (src == result.gather(dim, index)).to(self.dtype)
    ties = of_self.scatter_add(dim, index, of_src)
    ties = ties.masked_fill(ties == 0, 1)
    # What nothing is scattered to stays as it is, NaN included.
    of_self = (of_self / ties).masked_fill(torch.ones_like(self).scatter(dim, index, 0) == 1, 1)
    return Slopes(of_self, of_src / ties.gather(dim, index))


def slopes_of_products(self: Tensor, dim: int, index: Tensor, src: Tensor, kept: Tensor | None) -> Slopes:
    """The products of all other factors. Sorted by where they go, those before and those after a factor are runs."""
    place, order = index.sort(dim=dim, stable=True)
    factors = src.gather(dim, order)
    before, after = (
        products_before(factors, place, dim),
        products_before(factors.flip([dim]), place.flip([dim]), dim).flip([dim]),
    )
    whole = factors * after
    n = place.shape[dim]
    first = torch.ones_like(whole)
    if n > 1:
        same = place.narrow(dim, 1, n - 1) == place.narrow(dim, 0, n - 1)
        first = torch.cat([first.narrow(dim, 0, 1), (~same).to(first.dtype)], dim)
    arrived = torch.zeros_like(self).scatter(dim, index, 1)
    product = torch.zeros_like(self).scatter_add(dim, place, whole * first) + (1 - arrived)
    others = before * after
    if kept is None:
        others = others * self.gather(dim, place)
    return Slopes(product if kept is None else kept, torch.zeros_like(src).scatter(dim, order, others))


def products_before(factors: Tensor, place: Tensor, dim: int) -> Tensor:
    """For each factor the product of those before it with the same ``place``, which stand together, by doubling."""
    n = place.shape[dim]

    def moved(x: Tensor, step: int, same: Tensor) -> Tensor:
        """``x[k - step]`` where that has the place of ``k``, and 1 elsewhere."""
        far = torch.where(same, x.narrow(dim, 0, n - step), 1)
        return torch.cat([torch.ones_like(x.narrow(dim, 0, step)), far], dim)

    if n <= 1:
        return torch.ones_like(factors)
    found, step = moved(factors, 1, place.narrow(dim, 1, n - 1) == place.narrow(dim, 0, n - 1)), 1
    while step < n:
        same = place.narrow(dim, step, n - step) == place.narrow(dim, 0, n - step)
        found, step = found * moved(found, step, same), step * 2
    return found


def corner(src: Tensor, index: Tensor) -> Tensor:
    """The part of ``src`` that ``index`` speaks of."""
    for d in range(index.dim()):
        if src.shape[d] != index.shape[d]:
            src = src.narrow(d, 0, index.shape[d])
    return src


def self_cotangent(v: Values) -> Tensor:
    slope = slopes(v).self
    return v["grad"] if slope is None else v["grad"] * conj(slope)


def src_cotangent(v: Values) -> Tensor:
    found, index, src = v["grad"].gather(v["dim"], v["index"]) * conj(slopes(v).src), v["index"], v["src"]
    for d in range(index.dim()):
        if src.shape[d] != index.shape[d]:
            rest = list(found.shape)
            rest[d] = src.shape[d] - index.shape[d]
            found = torch.cat([found, found.new_zeros(rest)], d)
    return found


def tangent(v: Values) -> Tensor | None:
    found, self_t, src_t = slopes(v), v["self_t"], v["src_t"]
    if self_t is not None and found.self is not None:
        self_t = self_t * found.self
    if src_t is None:
        return self_t
    arriving = found.src * corner(src_t, v["index"])
    return add(self_t, torch.zeros_like(v["self"]).scatter_add(v["dim"], v["index"], arriving))


NAMES = ("self", "dim", "index", "src", "reduce", "include_self", "result")
derivative(
    aten.scatter_reduce.two,
    tangent=with_names((*NAMES, "self_t", "src_t"), of_vectors(tangent, "self")),
    self=with_names(("grad", *NAMES), of_vectors(self_cotangent, "self")),
    src=with_names(("grad", *NAMES), of_vectors(src_cotangent, "src")),
)


def index_reduce(
    self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    refuse_as(aten.index_reduce.default, self, dim, index, source, reduce, run=run_on_zeros)
    if self.dim() == 0:
        return index_reduce(self.reshape(1), 0, index, source.reshape(1), reduce, include_self=include_self).reshape(())
    shape = [1] * self.dim()
    shape[dim] = -1
    return torch.scatter_reduce(
        self, dim, index.reshape(shape).expand(source.shape), source, reduce, include_self=include_self
    )


DECOMPOSITIONS.add(aten.index_reduce.default, index_reduce)


# ------------------------------------------------------------------------------------------- the older reduce=

REDUCTIONS = {"add": "sum", "multiply": "prod"}


def by_later_name(reduce: str) -> str:
    if reduce not in REDUCTIONS:
        raise RuntimeError(f"scatter: got reduce={reduce!r}, expected 'add' or 'multiply'.")
    return REDUCTIONS[reduce]


@DECOMPOSITIONS.register(aten.scatter.reduce)
def scatter(self: Tensor, dim: int, index: Tensor, src: Tensor, *, reduce: str) -> Tensor:
    return torch.scatter_reduce(self, dim, index, src, by_later_name(reduce))


@DECOMPOSITIONS.register(aten.scatter.value_reduce)
def scatter_value(self: Tensor, dim: int, index: Tensor, value: Any, *, reduce: str) -> Tensor:
    return torch.scatter_reduce(self, dim, index, self.new_full(index.shape, value), by_later_name(reduce))
