"""Writes and views made pure, at the door: interpreters, rules and traces see neither.

A write becomes its pure counterpart plus an update of the wrapper that the user holds. A view remembers how it was
made (ViewLink); a write to a view is carried back through that chain to the base, and every other view of the base
is replayed at its next use.

NOTE [What may be written]
A wrapper may be written with values of its own level and below: arguments of its transform, and all that was made
inside it, since the door gives every new tensor to the innermost transform. A tensor of an outer level ("captured")
cannot hold an inner level's value and is refused, unless the value is a constant of the inner level. Under vmap a
captured tensor would also be written once instead of once per example; only writes that do not read the old contents
are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.fresh import FRESH
from functrans.boundary.leftovers import check_thread
from functrans.core.dispatch import base, dispatch, scan
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor, strides_of
from functrans.errors import (
    CapturedOnceError,
    CapturedWriteError,
    InsideTransformError,
    NoPureFormError,
    WriteShapeError,
)
from functrans.functionalization.history import with_history_of
from functrans.functionalization.in_place import is_same_part, write_in_place
from functrans.functionalization.layouts import as_shown, laid_out_like, note_moved, set_content, set_metadata
from functrans.functionalization.made_pure import made_pure
from functrans.functionalization.memory import storage_offset_of
from functrans.functionalization.out_of_place import Functional, pure_form
from functrans.functionalization.views import AliasGroup, check_recorded, link_view, part, run_view
from functrans.functionalization.without_data import run_without_data
from functrans.functionalization.write_back import write_back
from functrans.operators.info import STAND_INS, VIEW, WRITE, OpInfo, kind_here
from functrans.operators.schemas import arguments_by_position, taken_apart
from functrans.operators.scopes import SCOPES
from functrans.pytorch.thread_state import STATE, door_closed, running_at
from functrans.pytorch.torch_private import (
    VIEWS_AND_VERSIONS,
    OpOverload,
    is_key_excluded,
    set_grad_enabled,
    set_key_excluded,
)
from functrans.tensors.pytrees import tensors_in

aten = torch.ops.aten


def run(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator that writes or makes views."""
    # Base tensors that are written or viewed tell PyTorch's version counters, which autograd outside checks.
    if is_key_excluded(VIEWS_AND_VERSIONS):
        try:
            set_key_excluded(VIEWS_AND_VERSIONS, False)
            return run(known, args, kwargs)
        finally:
            set_key_excluded(VIEWS_AND_VERSIONS, True)
    kind = known.kind if not SCOPES else kind_here(known)
    if kind == VIEW:
        return run_view(known, args, kwargs)
    if kind == WRITE:
        return run_write(known, args, kwargs)
    stand_in: Any = STAND_INS.get(known.op)
    for a in args:
        if type(a) is WrapperTensor and a.view_link is FRESH:
            FRESH.refresh(a)
    return stand_in(known, args, kwargs)


def run_write(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an in-place or ``out=`` operator: its pure form, then the update of what it writes."""
    op = known.op
    if op is aten.copy_.default and is_same_part(args[0], args[1]):
        return args[0]
    owner = scan(args, kwargs)[0]
    targets = [_argument(known, i, args, kwargs) for i in known.written]
    draws_inside = known.random and STATE.top is not None
    if owner is not None and owner is not STATE.top:
        check_thread(owner)
    if owner is None and not draws_inside:
        return write_captured(known, targets, args, kwargs)
    try:
        functional = known.specialized[Functional] if not SCOPES else pure_form(known)
    except KeyError:
        functional = pure_form(known)
    if functional is NotImplemented:
        if known.composite:
            with running_at(STATE.top):
                return taken_apart(op, *args, **kwargs)
        functional = made_pure(op)
        if functional is NotImplemented:
            raise NoPureFormError(op)
        given = [x for i, x in enumerate(arguments_by_position(op, args, kwargs)) if i not in known.written]
        check_apart(op, targets, given)
        targets = tensors_in(targets)
    if len(targets) == 1 and known.metadata_write and op is not aten.resize_.default and type(functional) is Functional:
        return write_metadata(known, functional.op, targets[0], args, kwargs)
    written = len(targets)  # tensors, or lists of them
    if any(isinstance(target, list | tuple) for target in targets):
        check_apart(op, targets)
        targets = tensors_in(targets)
    new = functional(args, kwargs)
    news = list(new) if isinstance(new, tuple | list) else [new]
    expected = written if any(isinstance(value, list | tuple) for value in news) else len(targets)
    if len(news) > expected:  # pure form returns the operator's own outputs first, then what is written
        outputs, news = news[: len(news) - expected], news[len(news) - expected :]
    else:
        outputs = None
    news = tensors_in(news)
    if len(news) != len(targets):  # it writes more than its pure form returns
        raise NoPureFormError(op)
    out_form = known.returns_written and bool(known.written) and known.op._schema.arguments[known.written[0]].kwarg_only
    for target, value in zip(targets, news, strict=True):
        if value.dtype is not target.dtype and not out_form:
            run_without_data(op, args, kwargs)  # some operators refuse to work in place on what would be converted
        write(target, value, op, resize=out_form, reads=reads(known, target, args))
    if outputs is not None:
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    if not known.returns_written:
        return None
    return targets[0] if len(targets) == 1 else tuple(targets)


def check_apart(op: OpOverload, targets: Iterable[Any], others: Iterable[Any] = ()) -> None:
    """Refuse to write several tensors at once that share memory, or one that shares it with what is read meanwhile.

    What is written is computed for all of them first, of copies maybe, so none may be written through another.
    """
    written = tensors_in(targets)
    places = [memory_of(x) for x in written]
    if len({*places}) < len(places) or not {*places}.isdisjoint(map(memory_of, tensors_in(others))):
        top = scan(written, {})[0] or STATE.top
        what = f"{op} of tensors that share memory"
        raise InsideTransformError(what, "a transform" if top is None else top.name, "a call for each, or clones")


def _argument(known: OpInfo, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if i < len(args):
        return args[i]
    return kwargs.get(known.arguments[i], known.defaults[i])


def write(target: Any, new: Tensor, op: OpOverload, *, resize: bool = False, reads: bool = True) -> None:
    """Let ``target``, the tensor that the user holds, have the contents of ``new``."""
    if new.dtype != target.dtype:
        if not torch.can_cast(new.dtype, target.dtype):
            raise RuntimeError(
                f"result type {_short(new.dtype)} can't be cast to the desired output type {_short(target.dtype)}"
            )
        new = dispatch(aten.to.dtype, (new, target.dtype), {})
    if type(target) is not WrapperTensor:
        write_plain(target, new, op, resize, reads)
        return
    if new.shape != target.shape:
        if not resize:
            raise WriteShapeError(list(target.shape), list(new.shape))
        set_metadata(target, new)
    new = unwrap_constants(new, target.interpreter, op, target)
    link = target.view_link
    written = target if link is None else link.owner
    check_written_once(last_level(written), op, reads)
    written.updated |= reads
    written.recorded |= torch.is_grad_enabled() and (link is None or link.op is not aten.detach.default)
    invalidate_saved(target)
    if target.view_link is not None and target.view_link.doubtful:
        part(target)
    if target.view_link is None:
        replace(target, new)
        if target.alias_group is not None:
            target.alias_group.version += 1
    else:
        write_through(target, new, filled=op in FILLS)


def write_outside_of_operators(target: Any, new: Tensor, what: Any) -> None:
    """``write``, for what enters the door by itself and updates ``target``."""
    with at_the_door():
        write(target, new, what)


@contextmanager
def at_the_door() -> Iterator[None]:
    """The state in which operators that write or make views are run."""
    excluded = is_key_excluded(VIEWS_AND_VERSIONS)
    try:
        set_key_excluded(VIEWS_AND_VERSIONS, False)
        with door_closed():
            yield
    finally:
        set_key_excluded(VIEWS_AND_VERSIONS, excluded)


#: Writes of one value to all elements, which may share their places.
FILLS = frozenset((aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor))


def replace(target: WrapperTensor, new: Tensor) -> None:
    """Let ``target``, which is no view, have the contents ``new``, where it has its own in memory."""
    offset = storage_offset_of(target)
    set_content(target, with_history_of(target, laid_out_like(target, new)))
    note_moved(target, offset)


def unwrap_constants(new: Tensor, level: Interpreter | None, op: OpOverload, target: Tensor) -> Tensor:
    """``new`` without the constant layers above ``level``; see NOTE [What may be written]."""
    limit = 0 if level is None else level.level
    while type(new) is WrapperTensor and new.interpreter.level > limit:
        if not new.interpreter.is_constant(new):
            raise CapturedWriteError(op, target, new.interpreter, limit)
        new = new.value
    return new


def write_through(view: WrapperTensor, new: Tensor, filled: bool) -> None:
    """Write ``new`` to a view: carried back through its chain to the base."""
    steps = view.view_link.chain()
    group = steps[0].group
    if write_in_place(view, steps, new):
        group.version += 1
        view.synced_version = group.version
        return
    content = steps[0].base_content()
    check_recorded(view, content, new)
    changed = write_back(steps, content, new, filled)
    replace(content, changed)
    group.version += 1
    if strides_of(new) == view.strides:
        set_content(view, with_history_of(view, new))
        view.synced_version = group.version  # else it is taken from the base again at its next use


def write_metadata(known: OpInfo, op: OpOverload, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator such as ``unsqueeze_`` that turns a tensor into a view of itself, by ``op``."""
    if type(target) is not WrapperTensor:
        raise NoPureFormError(known.op)
    if target.maybe_same:
        what = "of a tensor that may be another one (contiguous() copies or not as strides say, which the batch hides)"
        cure = "a .clone(memory_format=torch.contiguous_format)"
        raise InsideTransformError(f"{known.op} {what}", target.interpreter.name, cure)
    invalidate_saved(target)
    if known.op is aten.detach_.default:
        set_content(target, dispatch(aten.detach.default, (target,), {}))
        target.leaf = None
        target.view_link = target.view_link or FRESH  # the last that torch.tensor calls
        return target
    before, enabled = hold(target), torch.is_grad_enabled()
    try:
        set_grad_enabled(True)  # no_grad leaves the derivative of what is written as it was, in the new shape
        new = dispatch(op, (before, *args[1:]), kwargs)
        if target.moved:
            new = as_shown(new, before, op, (before, *args[1:]), kwargs, None)
        set_metadata(target, new)
        set_content(target, new)
        link_view(target, before, op, args, kwargs, None)
    finally:
        set_grad_enabled(enabled)
    if target.view_link.base is before:
        target.view_link.base = None
    return target


def hold(target: WrapperTensor) -> WrapperTensor:
    """A wrapper that takes over ``target``'s place as base or view, so that ``target`` can become a view of it."""
    held = target.interpreter.rewrap(target, target.value)
    held.view_link, held.alias_group, held.synced_version = target.view_link, target.alias_group, target.synced_version
    held.strides, held.moved, held.shown_offset = target.strides, target.moved, target.shown_offset
    held.version, held.updated, held.recorded = target.version, target.updated, target.recorded
    if held.view_link is None:
        if held.alias_group is None:
            held.alias_group = AliasGroup()
        held.alias_group.content = held
    target.alias_group = None
    return held


def write_captured(known: OpInfo, targets: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A write that no wrapper takes part in: eager PyTorch, on the captured tensor itself."""
    for target in targets:
        check_written_once(0, known.op, reads(known, target, args))
        if isinstance(target, Tensor):
            invalidate_saved(target)
    return base(known.op, args, kwargs)


def write_plain(target: Tensor, new: Tensor, op: OpOverload, resize: bool, reads: bool) -> None:
    new = unwrap_constants(new, None, op, target)
    check_written_once(0, op, reads)
    invalidate_saved(target)
    if new.shape != target.shape:
        if not resize:
            raise WriteShapeError(list(target.shape), list(new.shape))
        base(aten.resize_.default, (target, list(new.shape)), {})
    base(aten.copy_.default, (target, new), {})


def reads(known: OpInfo, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether the operator makes what it writes to ``target`` of what that held: also where ``out`` is an operand."""
    if known.reads_target or not known.op._schema.arguments[known.written[0]].kwarg_only:
        return known.reads_target
    return any(memory_of(x) == memory_of(target) for x in tensors_in(args))


def memory_of(x: Tensor) -> int:
    """A number that tensors of one memory have in common."""
    if type(x) is not WrapperTensor:
        return x.untyped_storage()._cdata if x.layout is torch.strided else id(x)
    return id(x.alias_group or x if x.view_link is None or x.view_link is FRESH else x.view_link.group)


def last_level(target: Tensor) -> int:
    """The last level at which ``target`` has one value for all."""
    return target.interpreter.level - target.shared if type(target) is WrapperTensor else 0


def write_for_caller(origin: Tensor, wrapper: WrapperTensor, value: Tensor) -> None:
    """Let ``origin``, an argument of a transform that has ended, have the ``value`` written to ``wrapper`` there."""
    check_written_once(last_level(origin), aten.copy_.default, wrapper.updated)
    value = value if wrapper.leaf is None else value.detach()
    if value.shape != origin.shape:
        what = "Tensor.data of another shape, assigned to an argument"
        raise InsideTransformError(what, wrapper.interpreter.name, "the new tensor itself")
    allowed = not wrapper.recorded and origin.requires_grad and origin.is_leaf  # of a leaf, under no_grad
    with torch.set_grad_enabled(torch.is_grad_enabled() and not allowed):
        origin.copy_(value)


def check_written_once(level: int, op: OpOverload, reads: bool) -> None:
    """Refuse a write to a tensor that all examples share, and that a loop over them would repeat: over two or more."""
    if not reads:
        return
    interpreter = STATE.top
    while interpreter is not None and interpreter.level > level:
        if interpreter.repeats_writes and getattr(interpreter, "batch_size", None) != 1:
            raise CapturedOnceError(op, interpreter)
        interpreter = interpreter.below


def invalidate_saved(target: Tensor) -> None:
    """Tell the levels above ``target``'s that values they saved are about to change."""
    level = target.interpreter.level if type(target) is WrapperTensor else 0
    interpreter = STATE.top
    while interpreter is not None and interpreter.level > level:
        interpreter.before_write(target)
        interpreter = interpreter.below


def _short(dtype: torch.dtype) -> str:
    names = {
        "float32": "Float",
        "float64": "Double",
        "int64": "Long",
        "int32": "Int",
        "bool": "bool",
        "float16": "Half",
    }
    text = str(dtype).removeprefix("torch.")
    return names.get(text, text)
