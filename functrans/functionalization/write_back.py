"""Writes to views, carried back through the steps that made them to what they are views of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import dispatch
from functrans.core.tensor import WrapperTensor
from functrans.errors import InsideTransformError
from functrans.functionalization.history import recorded_everywhere, with_history_of
from functrans.functionalization.memory import places, positions, storage_offset_of
from functrans.functionalization.views import ViewLink
from functrans.operators.views import (
    CONJUGATED,
    EXPANSIONS,
    PARTS,
    PERMUTATIONS,
    RESHAPES,
    SPLITS,
    SWAPS,
    inverse,
    order_of,
)
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten


def write_back(steps: list[ViewLink], content: Tensor, new: Tensor, filled: bool) -> Tensor:
    """What ``content`` becomes when its view by ``steps`` becomes ``new``; ``filled``: with one value everywhere."""
    # From a step without a way back of its own on, the elements of several steps may share a place: they are looked at
    # as one.
    first = next((i for i, step in enumerate(steps) if step.op not in WRITE_BACK), len(steps))
    if not MOVES.issuperset(step.op for step in steps[first:] if step.op in WRITE_BACK):
        first = len(steps)
    stages: list[Tensor] = [content]
    for step in steps[:first] if first < len(steps) else steps[:-1]:
        stages.append(step.apply(stages[-1]))
    if first < len(steps):
        new = write_back_by_index(steps[first:], stages.pop(), new, filled)
    for step, before in zip(reversed(steps[:first]), reversed(stages), strict=True):
        rule = WRITE_BACK.get(step.op)
        new = rule(step, before, new) if rule is not None else write_back_by_index([step], before, new, False)
    return new


def write_back_by_index(steps: list[ViewLink], before: Tensor, new: Tensor, filled: bool) -> Tensor:
    """Views that move elements without changing them: their own positions say where each one came from."""
    for step in steps:
        if step.op not in MOVES and step.op not in BY_INDEX:
            raise InsideTransformError(f"a write through a view that {step.op} made", "a transform", "a copy of it")
    at = torch.arange(math.prod(before.shape), device=before.device).reshape(before.shape)
    with running_at(None):
        for step in steps:
            at = step.op(at, *step.args, **step.kwargs)
            at = at if step.index is None else at[step.index]
    return put(at, before, new, filled)


def put(at: Tensor, before: Tensor, new: Tensor, filled: bool) -> Tensor:
    """``before`` with the elements of ``new`` at the positions ``at``."""
    flat_positions = dispatch(aten.reshape.default, (at, [-1]), {})
    flat = dispatch(aten.reshape.default, (before, [-1]), {})
    values = dispatch(aten.reshape.default, (new, [-1]), {})
    if not filled and len(torch.unique(at)) != math.prod(at.shape):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    flat = dispatch(aten.index_put.default, (flat, [flat_positions], values), {})
    return dispatch(aten.reshape.default, (flat, list(before.shape)), {})


def _send(op: OpOverload, *args: Any) -> Any:
    return dispatch(op, args, {})


def _back_as_strided(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    size, stride, offset = (*step.args, None)[:3]
    if 0 in size:
        return before  # wherever the nothing is that was written
    start = storage_offset_of(before)
    offset = start if offset is None else offset
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    own_last = start + sum((n - 1) * s for n, s in zip(before.shape, before.stride(), strict=True))
    if start <= offset <= last <= own_last and own_last - start + 1 == math.prod(before.shape):
        return _send(aten.as_strided_scatter.default, before, changed, *step.args)
    at = positions(places(size, stride, offset), places(before.shape, before.stride(), start))
    if at is None:
        raise InsideTransformError(
            "a write through as_strided beyond the tensor that it was called on", "a transform", "indices"
        )
    return put(at, before, changed, False)


def _back_permuted(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return _send(aten.permute.default, changed, inverse(order_of(step.op, before.dim(), *step.args)))


def _back_shape(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return _send(aten.reshape.default, changed, list(before.shape))


def _back_conjugated(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """Computed, since a base is not conjugated lazily, which view_as_real asks."""
    if step.op in CONJUGATED:
        changed = _back_permuted(step, before, changed)
    return _send(aten.conj_physical.default, changed)


def _back_detached(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    own = changed if recorded_everywhere() else with_history_of(step.apply(before), changed)
    # the wrapper may be the user's, who may write it
    step.history = own.interpreter.rewrap(own, own.value) if type(own) is WrapperTensor else own
    return with_history_of(before, changed, everywhere=True)


def _back_dtype(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """The same bits in another dtype have no derivative, and leave that of what was there, as ``detach`` does."""
    new = _send(aten.view.dtype, _send(aten.contiguous.default, changed), before.dtype)
    return with_history_of(before, new, everywhere=True)


def _back_piece(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    how, dim = (*step.args, 0)[:2]
    start, end = SPLITS[step.op](before.shape[dim], how, step.index)
    return _send(aten.slice_scatter.default, before, changed, dim, start, end)


def _back_narrow(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    dim, start, length = step.args
    start = start + before.shape[dim] if start < 0 else start
    return _send(aten.slice_scatter.default, before, changed, dim, start, start + length)


def _back_part(scatter: OpOverload, step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return _send(scatter, before, changed, *step.args)


#: For a view's operator: (step, before, changed) -> the new contents of what it was taken from.
WRITE_BACK: dict[OpOverload, Callable[[ViewLink, Tensor, Tensor], Tensor]] = {
    aten.as_strided.default: _back_as_strided,
    aten.unbind.int: lambda step, before, changed: _send(
        aten.select_scatter.default, before, changed, step.args[0] if step.args else 0, step.index
    ),
    aten.detach.default: _back_detached,
    aten.real.default: lambda step, before, changed: (
        torch.complex(changed, before.imag) if before.is_complex() else changed
    ),
    aten.imag.default: lambda step, before, changed: torch.complex(before.real, changed),
    aten.view_as_real.default: lambda step, before, changed: torch.view_as_complex(changed.contiguous()),
    aten.view_as_complex.default: lambda step, before, changed: torch.view_as_real(changed),
    **dict.fromkeys((*SWAPS, *PERMUTATIONS), _back_permuted),
    **dict.fromkeys((aten._conj.default, aten.conj.default, *CONJUGATED), _back_conjugated),
    aten.view.dtype: _back_dtype,
    aten._neg_view.default: lambda step, before, changed: _send(aten.neg.default, changed),
    **dict.fromkeys(RESHAPES, _back_shape),
    **{view: partial(_back_part, part.scatter) for view, part in PARTS.items() if part.scatter is not None},
    **dict.fromkeys(SPLITS, _back_piece),
    aten.narrow.default: _back_narrow,
    # conversions that had nothing to convert: where they copied, the link was cut
    **dict.fromkeys(
        (aten.alias.default, aten.contiguous.default, aten.positive.default, aten.resolve_conj.default,
         aten.resolve_neg.default, aten.type_as.default, *(getattr(aten.to, o) for o in aten.to.overloads())),
        lambda step, before, changed: changed,
    ),
}  # fmt: skip

#: Those of them that move elements, and neither look into them nor ask for derivatives.
MOVES = frozenset((
    *SWAPS, *PERMUTATIONS, *RESHAPES, *(view for view in PARTS if view in WRITE_BACK), *SPLITS, aten.unbind.int,
    aten.alias.default,
)) - CONJUGATED  # fmt: skip

#: Views without a way back of their own that do no more than that, either.
BY_INDEX = frozenset((
    *(
        getattr(getattr(aten, name), overload)
        for name in ("dsplit", "hsplit", "tensor_split", "vsplit")
        for overload in getattr(aten, name).overloads()
    ),
    *EXPANSIONS, aten.linalg_diagonal.default, aten.narrow.Tensor, aten.unfold.default,
))  # fmt: skip
