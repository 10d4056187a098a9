"""Strides: those that a tensor shows must be those of its contents, whatever is written to it.

NOTE [Strides of what is written]
A write replaces the contents of a wrapper; its strides stay, as in eager PyTorch. The pure result may lie in memory
otherwise, and operators that ask for strides (``as_strided``, ``empty_like``) ask the contents. So new contents are
brought into the order in memory that the target shows. What a target leaves out in memory (a column of a matrix, a part
that does not begin where its storage does) is left out only once: its new contents are dense. ``as_strided`` of such a
tensor is refused after a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrans.boundary.fresh import FRESH
from functrans.core.dispatch import dispatch
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import Strides, WrapperTensor, strides_of, wrap_as
from functrans.errors import InsideTransformError
from functrans.functionalization.memory import storage_offset_of
from functrans.operators.views import inverse
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import OpOverload, make_wrapper, no_dispatch, without_torch_function

aten = torch.ops.aten


def memory_order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The dimensions from the outermost in memory to the innermost."""
    return sorted(range(len(shape)), key=lambda d: (-strides[d], shape[d] == 1))


def dense_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps for the same order in memory."""
    found, step = [0] * len(shape), 1
    for d in reversed(memory_order(shape, strides)):
        found[d] = step
        step *= max(shape[d], 1)
    return tuple(found)


def laid_out_like(target: WrapperTensor, new: Tensor) -> Tensor:
    """``new``, of the shape of ``target``, in the order in memory that ``target`` shows.

    See NOTE [Strides of what is written].
    """
    own = strides_of(new)
    if own == target.strides or (
        target.strides is not None and own is not None and own == dense_strides(target.shape, target.strides)
    ):
        return new
    return copied_like(target, new)


def copied_like(target: Tensor, source: Tensor) -> Tensor:
    """A copy of ``source``, of the shape of ``target``, in the order in memory that ``target`` shows."""
    strides = strides_of(target)
    if strides == strides_of(source):
        return dispatch(aten.clone.default, (source,), {})
    order = None if strides is None else memory_order(target.shape, strides)
    if order is None or order == sorted(order):
        return dispatch(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
    moved = dispatch(aten.permute.default, (source, order), {})
    copied = dispatch(aten.clone.default, (moved,), {"memory_format": torch.contiguous_format})
    return dispatch(aten.permute.default, (copied, inverse(order)), {})


def note_moved(target: WrapperTensor, offset: int) -> None:
    """Note whether the new contents of ``target``, which began at ``offset``, lie elsewhere than it shows."""
    if offset and target.shown_offset is None and offset != storage_offset_of(target):
        target.shown_offset = offset
    moved = target.shown_offset is not None or target.strides is not None and shown(target) != target.strides
    if moved is not target.moved:
        target.moved = moved


def shown(x: WrapperTensor) -> tuple[int, ...] | None:
    """The strides that ``x`` would show if it were made now."""
    return x.interpreter.rewrap(x, x.value).strides


def as_shown(
    view: WrapperTensor, viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: Any, index: int | None
) -> WrapperTensor:
    """The view of a tensor whose contents moved, with the strides that it has by those that the tensor shows."""
    with running_at(None), no_dispatch():
        probe = aten.empty_strided.default(viewed.shape, viewed.stride(), dtype=viewed.dtype, device="meta")
        out = op(probe, *map(on_meta, args[1:]), **{name: on_meta(value) for name, value in kwargs.items()})
    strides = strides_of(out if index is None else out[index])
    wrapper = wrap_showing(view.interpreter, view.value, view.shape, strides, view.dtype)
    for name in view.interpreter.payload:
        setattr(wrapper, name, getattr(view, name))
    wrapper.moved = True
    return wrapper


def on_meta(a: Any) -> Any:
    """An argument for an operator that runs without data."""
    if isinstance(a, Tensor):
        return torch.empty(a.shape, dtype=a.dtype, device="meta")
    return torch.device("meta") if isinstance(a, torch.device) else a


def check_places(x: Tensor) -> None:
    """Refuse to look up places in memory that are not where ``x`` shows them, at any level."""
    while type(x) is WrapperTensor:
        if x.moved or (x.view_link not in (None, FRESH) and x.view_link.base_content().moved):
            raise InsideTransformError(
                "as_strided of a tensor that was written and leaves gaps in memory or begins within its storage",
                "a transform",
                "as_strided on its .clone()",
            )
        x = x.value


def set_metadata(wrapper: WrapperTensor, like: Tensor) -> None:
    """Let ``wrapper``, whose contents are about to change, have the shape, strides and dtype of ``like``."""
    shape, strides, dtype = like.shape, like.stride(), like.dtype
    with no_dispatch():
        room = make_wrapper(type(wrapper), shape, strides, None, None, dtype, wrapper.layout, wrapper.device)
        without_torch_function(DATA.__set__, (), (wrapper, room), {})
    wrapper.shape, wrapper.strides, wrapper.dtype = shape, strides_of(like), dtype


DATA: Any = Tensor.data


class Shown(NamedTuple):
    """What ``wrap_as`` asks of a value, where a wrapper shows something else."""

    dtype: torch.dtype
    layout: torch.layout
    device: torch.device


def wrap_showing(
    interpreter: Interpreter, value: Tensor, shape: torch.Size, strides: Strides, dtype: torch.dtype
) -> WrapperTensor:
    """A wrapper around ``value`` that shows a shape and a dtype of its own, as a dense tensor's."""
    wrapper = wrap_as(interpreter, Shown(dtype, torch.strided, value.device), shape, strides)  # type: ignore[arg-type]
    wrapper._value = value
    return wrapper


def set_content(wrapper: WrapperTensor, new: Tensor) -> None:
    """Let ``wrapper`` hold what ``new``, of the same level or below, holds."""
    interpreter = wrapper.interpreter
    if not interpreter.owns(new):
        new = interpreter.constant(new)
    wrapper.value = new.value
    for name in interpreter.payload:
        setattr(wrapper, name, getattr(new, name))
    wrapper.version += 1
