"""The derivative of ``segment_reduce``, which is a ``scatter_reduce`` whose places are given by lengths or offsets.

PyTorch (torch 2.14) has no tangent of it, and its gradient no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.derivatives.named import with_names
from functrans.derivatives.scatter_reduce import slopes
from functrans.derivatives.table import derivative

aten = torch.ops.aten
Values = dict[str, Any]


def axis_of(v: Values) -> int:
    return v["axis"] % v["data"].dim()


def places(v: Values) -> Tensor:
    """The segment of each element of ``data``, counted from 1; 0 and the number after the last mean none."""
    data, axis, offsets = v["data"], axis_of(v), v["offsets"]
    if offsets is None:
        ends = v["lengths"].to(torch.int64).cumsum(-1)
        offsets = torch.cat([torch.zeros_like(ends[..., :1]), ends], -1)
    n = data.shape[axis]
    positions = torch.arange(n, device=data.device).expand(*data.shape[:axis], n).contiguous()
    found = torch.searchsorted(offsets.to(torch.int64).contiguous(), positions, right=True)
    return found.reshape(*found.shape, *[1] * (data.dim() - axis - 1)).expand(data.shape)


def with_ends(x: Tensor, axis: int, value: float) -> Tensor:
    """``x``, of the segments, with a row for what is before them and one for what is after."""
    row = x.new_full((*x.shape[:axis], 1, *x.shape[axis + 1 :]), value)
    return torch.cat([row, x, row], axis)


def partials(v: Values, place: Tensor) -> Tensor:
    """The derivative of each segment's result by each of its elements."""
    axis, reduce, data = axis_of(v), v["reduce"], v["data"]
    result = with_ends(v["result"], axis, 1)
    # Only for products it matters what they start from; a maximum shares among equal elements, not with its start.
    start = torch.full_like(result, 1 if v["initial"] is None else v["initial"])
    scattered = {
        "self": start,
        "dim": axis,
        "index": place,
        "src": data,
        "result": result,
        "include_self": reduce == "prod",
    }
    found = slopes(scattered | {"reduce": {"max": "amax", "min": "amin"}.get(reduce, reduce)}).src
    return found * ((place > 0) & (place < result.shape[axis] - 1))


def cotangent(v: Values) -> Tensor:
    axis, place = axis_of(v), places(v)
    return with_ends(v["grad"], axis, 0).gather(axis, place) * partials(v, place)


def tangent(v: Values) -> Tensor:
    axis, place = axis_of(v), places(v)
    moved = torch.zeros_like(with_ends(v["result"], axis, 0)).scatter_add(axis, place, partials(v, place) * v["data_t"])
    return moved.narrow(axis, 1, v["result"].shape[axis])


NAMES = ("data", "reduce", "lengths", "offsets", "axis", "initial", "result")
derivative(
    aten.segment_reduce.default,
    tangent=with_names((*NAMES, "data_t"), tangent),
    data=with_names(("grad", *NAMES), cotangent),
)
