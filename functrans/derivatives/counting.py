"""Derivatives of ``bincount`` and ``histogram`` by their weights, and of the values that ``unique`` finds.

PyTorch has no formulas for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.factories import range_for
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.helpers import cast
from functrans.derivatives.table import derivative

aten = torch.ops.aten


def bincount_tangent(self: Tensor, minlength: int, weights_t: Tensor) -> Tensor:
    return torch.bincount(self, weights_t, minlength)


derivative(
    aten.bincount.default,
    tangent=bincount_tangent,
    weights=lambda grad, self, weights: cast(grad[self], weights.dtype),
)

# --------------------------------------------------------------------------- histograms: the counts by the weights, and
# by the edges' distances where they are densities; the edges by the extremes that they lie between


def counts_between(x: Tensor, edges: Tensor, weight: Tensor | None, density: bool, bounded: bool = False) -> Tensor:
    fits = {torch.float32, torch.float64} if bounded else {torch.float16, torch.bfloat16, torch.float32, torch.float64}
    given = [t for t in (x, edges, weight) if t is not None]
    alike = len({t.dtype for t in given}) == 1 and (weight is None or weight.numel() == x.numel())
    if not alike or x.dtype not in fits or edges.dim() != 1 or edges.numel() < 2:
        got = ", ".join(f"{t.dtype} of shape {tuple(t.shape)}" for t in given)
        raise RuntimeError(f"histogram: got values, edges and weights {got}; expected one dtype of {fits}, and a bin.")
    x, bins = x.detach().flatten(), edges.numel() - 1
    weights = torch.ones_like(x) if weight is None else weight.flatten()
    inside = (x >= edges[0]) & (x <= edges[-1])
    # the last bin has both its edges
    place = (torch.bucketize(x, edges.detach(), right=True) - 1).clamp(0, bins - 1)
    # A range that is not finite is an error: there is no such bin.
    place = torch.where((edges[0] - edges[-1]).detach().isfinite(), place, bins) if bounded else place
    counts = x.new_zeros(bins).index_add(0, place, torch.where(inside, weights, 0))
    return counts / (counts.sum() * edges.diff()) if density else counts


@DECOMPOSITIONS.register(aten.histogram.bins_tensor)
def histogram_between(
    self: Tensor, bins: Tensor, *, weight: Tensor | None = None, density: bool = False
) -> tuple[Tensor, Tensor]:
    return counts_between(self, bins, weight, density), bins.clone()


@DECOMPOSITIONS.register(aten.histogram.bin_ct)
def histogram(
    self: Tensor,
    bins: int = 100,
    *,
    range: Sequence[float] | None = None,
    weight: Tensor | None = None,
    density: bool = False,
) -> tuple[Tensor, Tensor]:
    if range is not None or not self.numel():
        low, high = (self.new_tensor(end) for end in range or (0.0, 1.0))
    else:
        low, high = self.aminmax()
    margin = (low == high).to(self.dtype) / 2
    edges = torch.linspace(low - margin, high + margin, bins + 1, dtype=self.dtype, device=self.device)
    return counts_between(self, edges, weight, density, bounded=True), edges


# --------------------------------------------------------------------------- unique: the first of equal values is taken


def taken(found: Any, x: Tensor, dim: int | None, wanted: bool) -> Any:
    """``found``, with its values taken from ``x``: each from the first place where its inverse index stands."""
    values, inverse, counts = found
    places = range_for(inverse, inverse.numel())
    size = values.shape[0 if dim is None else dim]
    first = places.new_full((size,), inverse.numel()).scatter_reduce(0, inverse.flatten(), places, "amin")
    values = x.flatten()[first] if dim is None else x.index_select(dim, first)
    return values, inverse if wanted else inverse.new_empty(0), counts


@DECOMPOSITIONS.register(aten._unique2.default)
def unique2(x: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False) -> Any:
    return taken(aten._unique2.default(x.detach(), sorted, True, return_counts), x, None, return_inverse)


@DECOMPOSITIONS.register(aten.unique_dim.default)
def unique_dim(
    x: Tensor, dim: int, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False
) -> Any:
    return taken(aten.unique_dim.default(x.detach(), dim, sorted, True, return_counts), x, dim, return_inverse)


@DECOMPOSITIONS.register(aten.unique_consecutive.default)
def unique_consecutive(
    x: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Any:
    return taken(aten.unique_consecutive.default(x.detach(), True, return_counts, dim), x, dim, return_inverse)


@DECOMPOSITIONS.register(aten.unique_dim_consecutive.default)
def unique_dim_consecutive(x: Tensor, dim: int, return_inverse: bool = False, return_counts: bool = False) -> Any:
    return taken(aten.unique_dim_consecutive.default(x.detach(), dim, True, return_counts), x, dim, return_inverse)
