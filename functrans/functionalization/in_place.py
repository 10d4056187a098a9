"""Writes to parts of a buffer in its own memory, where nothing can tell.

NOTE [Buffers]
A write to a part makes new contents of the whole, so a loop that fills a buffer row by row does work that grows with
the square of the rows. So under a vmap at the base a part is written in memory that is the buffer's alone, if no mode
or ``explain`` looks on and nothing is recorded. The buffer gets such memory at its first write, and again whenever
something else holds what it had: PyTorch's autograd, a tape, a view that was made before. PyTorch's and Python's counts
of references say whether that is so. Views that are linked to the buffer may remain: they are brought up to date at
their next use.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans.core.dispatch import base
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.functionalization.layouts import set_content
from functrans.functionalization.views import AliasGroup, ViewLink
from functrans.operators.schemas import arguments_by_position
from functrans.operators.views import CONJUGATED, PARTS, PERMUTATIONS, RESHAPES, SWAPS
from functrans.pytorch.thread_state import OBSERVERS, STATE
from functrans.pytorch.torch_private import mode_stack_size, no_dispatch, storage_count

aten = torch.ops.aten

#: Views that are parts of memory, of an example's and of the batch's. (Windows that ``unfold`` makes may overlap.)
PLACES = (
    frozenset((*PARTS, *SWAPS, *PERMUTATIONS, *RESHAPES, aten.unbind.int, aten.alias.default))
    - CONJUGATED - {aten.unfold.default}
)  # fmt: skip

#: What can be compared of the arguments that say where a part is.
PLAIN = (int, type(None))

#: By class of interpreter whose wrappers are written in place: (level, wrapper, new, alone) -> the wrapper, if it is
#: ``alone`` in its memory and ``new`` fits in there, or a copy of it that is.
OWN_MEMORY: dict[type[Interpreter], Callable[[Any, WrapperTensor, Tensor, bool], WrapperTensor]] = {}


def write_in_place(view: WrapperTensor, steps: list[ViewLink], new: Tensor) -> bool:
    """Write ``new`` to ``view``, made by ``steps``, in the memory of what it is a view of; False: that cannot be.

    See NOTE [Buffers].
    """
    content, group = steps[0].base_content(), steps[0].group
    level = content.interpreter
    own_memory = OWN_MEMORY.get(type(level))
    if own_memory is None or level.below is not None or view.interpreter is not level or STATE.foreign:
        return False
    if not is_plain(level.value_of(new)) or not is_plain(content.value) or mode_stack_size() or torch.jit.is_tracing():
        return False
    if OBSERVERS and STATE.observer is not None:
        return False
    if view.leaf is not None or content.leaf is not None or not PLACES.issuperset(step.op for step in steps):
        return False
    own = own_memory(level, content, new, is_alone(content, view, group))
    if own is not content:
        if own.strides != content.strides or content.value.storage_offset():
            return False
        set_content(content, own)
        set_content(view, steps[-1].replay())
        group.note(view)
    if memory(view) != memory(content):
        return False  # a reshape of the batch that is no view
    place, aligned = level.aligned(view, new if level.owns(new) else level.constant(new))  # type: ignore[arg-type]
    base(aten.copy_.default, (place, aligned.value), {})
    content.version += 1
    view.version += 1
    return True


def is_same_part(target: Any, source: Any) -> bool:
    """Whether a copy of ``source`` to ``target`` writes what is there: ``x[i] += y`` ends with one of ``x[i]``.

    (Where a run is compared with one without transforms, both are to have it.)
    """
    if OBSERVERS and STATE.observer is not None:
        return False
    step, beside = getattr(target, "view_link", None), getattr(source, "view_link", None)
    if type(step) is not ViewLink or type(beside) is not ViewLink:
        return False
    while step is not beside:
        if step is None or beside is None or step.doubtful or step.kwargs or beside.kwargs:
            return False
        if step.owner is not beside.owner or step.op is not beside.op or step.index != beside.index:
            return False
        if not step.grad_mode is beside.grad_mode is torch.is_grad_enabled():
            return False
        where, there = (arguments_by_position(step.op, (target, *s.args), {}) for s in (step, beside))
        if not all(type(a) in PLAIN for a in where[1:]) or where[1:] != there[1:]:
            return False
        step, beside = step.parent, beside.parent
    return True


def is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor of the base that PyTorch does not record."""
    return type(x) is Tensor and not x.requires_grad and x.layout is torch.strided and forward_ad._current_level < 0


def memory(x: WrapperTensor) -> Any:
    return x.value.untyped_storage()._cdata if type(x.value) is Tensor else None


def is_alone(content: WrapperTensor, view: WrapperTensor, group: AliasGroup) -> bool:
    """Whether nothing holds the memory of ``content`` but it, its part ``view``, and views that are linked to it."""
    if view.synced_version != group.version:
        return False
    found = counts(content, view)
    if found == ALONE:
        return True
    others = [x for x in group.others(view) if memory(x) == memory(content)]
    if any(counts(content, x)[2:4] != ALONE[2:4] for x in others):
        return False
    return found == tuple(n + len(others) * each for n, each in zip(ALONE, EACH_MORE, strict=True))


def counts(content: Any, view: Any) -> tuple[int, ...]:
    """How often the values of the two are held, and their memory."""
    value, part = content._value, view._value
    held = value._use_count(), sys.getrefcount(value), part._use_count(), sys.getrefcount(part)
    return (*held, storage_count(value.untyped_storage()._cdata), storage_count(part.untyped_storage()._cdata))


def with_views(more: int) -> tuple[int, ...]:
    """What ``counts`` says of a tensor and a part of it, held by one wrapper each, where others hold ``more`` parts."""
    with no_dispatch():  # no mode that holds whoever imports this takes a part
        content, view = SimpleNamespace(_value=torch.zeros(2, device="cpu")), SimpleNamespace()
        others = [content._value[1:] for _ in range(more)]
        view._value = content._value[:1]
    assert len(others) == more
    return counts(content, view)


ALONE = with_views(0)
EACH_MORE = tuple(n - m for n, m in zip(with_views(1), ALONE, strict=True))
