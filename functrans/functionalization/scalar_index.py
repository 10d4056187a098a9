"""Indexing by a tensor without dimensions, an integer or a truth value, where each example has one of its own.

NOTE [Scalar indices]
PyTorch's indexing reads such an index as a Python number, which a batch does not have. It makes an exception for
tensors that carry a dispatch key of torch.func's batched nested tensors: those are passed on to ``aten.index`` and
``aten.index_put_``. So wrappers without dimensions and of an integer dtype, or bool, carry that key, and every thread
that has run a transform excludes it, so that nothing is ever dispatched to it. What arrives at the door is taken here
for what it is outside of vmap: an integer is a selection, that comes before all indexing by tensors that have
dimensions, and that is a view; a truth value is a mask of a new dimension of size 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import lift
from functrans.core.dispatch import dispatch, scan
from functrans.core.tensor import NOT_READ, WrapperTensor
from functrans.errors import CapturedWriteError
from functrans.functionalization.hidden_effects import as_usual, enter, stands_in_for
from functrans.functionalization.views import AliasGroup, ViewLink, link_view
from functrans.functionalization.write_back import WRITE_BACK
from functrans.functionalization.writes import run_write, unwrap_constants
from functrans.operators.info import OpInfo
from functrans.pytorch.thread_state import STATE, is_recorded
from functrans.tensors.answers import concrete

aten = torch.ops.aten

#: The dtypes of which a tensor without dimensions selects one row when it is an index; a truth value selects all or
#: nothing.
SCALAR_INDICES = NOT_READ - {torch.bool}


class CapturedAliasGroup(AliasGroup):
    """Of views of a plain captured tensor, which must not be written."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


@stands_in_for(aten.index.Tensor)
def index(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[indices]``: scalars first, each of them a view."""
    if not any(is_scalar(i) or is_scalar_mask(i) for i in args[1]):
        return as_usual(known, args, kwargs)
    scan(args, kwargs)
    x, rest = select_scalars(*args)
    return x if all(i is None for i in rest) else enter(known.op, x, rest)


@stands_in_for(aten.index_put_.default)
def index_put(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``x[indices] = values``, written through the views that the scalars are."""
    target, indices, values, *accumulate = args
    if not any(is_scalar(i) or is_scalar_mask(i) for i in indices):
        return run_write(known, args, kwargs)
    scan(args, kwargs)
    x, rest = select_scalars(target, indices)
    masks = [i for i in indices if is_scalar_mask(i)]
    adding = bool(accumulate and accumulate[0])
    whole = values.numel() > 0 or x.numel() == 0  # else they were read by the mask, and it is False
    if len(masks) == sum(i is not None for i in rest) <= 1 and values.dtype is x.dtype and whole:
        for mask in masks:  # all of x is written, or nothing
            values = enter(aten.where.self, mask, values, enter(aten.zeros_like.default, x) if adding else x)
        enter(aten.add_.Tensor if adding else aten.copy_.default, x, values)
    else:
        enter(known.op, x, rest, values, *accumulate)
    return target


def is_scalar(i: Any) -> bool:
    return type(i) is WrapperTensor and i.dtype in SCALAR_INDICES and i.dim() == 0


def is_scalar_mask(i: Any) -> bool:
    return type(i) is WrapperTensor and i.dtype is torch.bool and i.dim() == 0


def select_scalars(x: Tensor, indices: Any) -> tuple[Tensor, list[Any]]:
    """``x`` where its scalar indices say, and the other indices, which have dimensions."""
    rest, dim = [], 0
    for i in indices:
        if is_scalar(i):
            x = select_at(x, dim, i)
            continue
        if is_scalar_mask(i):
            x, i = enter(aten.unsqueeze.default, x, dim), enter(aten.unsqueeze.default, i, 0)
        rest.append(i)
        mask = i is not None and i.dtype in (torch.bool, torch.uint8)
        dim += i.dim() if mask else 1
    return x, rest


def select_at(x: Tensor, dim: int, i: WrapperTensor) -> Tensor:
    """``x.select(dim, i)``."""
    number = concrete(i)
    if type(number) is Tensor and (type(x) is not WrapperTensor or not is_recorded()):
        return enter(aten.select.int, x, dim, int(number.item()))
    places = enter(aten.add.Tensor, i, enter(aten.mul.Tensor, enter(aten.lt.Scalar, i, 0), x.shape[dim]))
    places = enter(aten.reshape.default, enter(aten.to.dtype, places, torch.int64), [1])
    rows = enter(aten.index_select.default, x, dim, places)
    viewed = x
    if type(viewed) is not WrapperTensor:
        viewed = lift(x, None, STATE.top)
        viewed.alias_group = CapturedAliasGroup(x)
    link_view(rows, viewed, aten.index_select.default, (x, dim, places), {}, None)
    return enter(aten.squeeze.dim, rows, dim)


def write_rows(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """What ``before`` becomes when the row that ``step`` selected becomes ``changed``."""
    dim, places = step.args
    new = dispatch(aten.index_copy.default, (before, dim, places, changed), {})
    op = aten.index_put_.default
    if isinstance(step.group, CapturedAliasGroup):
        raise CapturedWriteError(op, step.group.tensor, places.interpreter, 0)
    assert type(before) is WrapperTensor
    return unwrap_constants(new, before.interpreter, op, before)


WRITE_BACK[aten.index_select.default] = write_rows
