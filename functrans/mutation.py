"""Writes and views made pure, at the door: interpreters, rules and traces see neither.

A write becomes its pure counterpart plus an update of the wrapper that the user holds. A view remembers how it was
made (ViewLink); a write to a view is carried back through that chain to the base, and every other view of the base
is replayed at its next use.

NOTE [What may be written]
A wrapper may be written with values of its own level and below: arguments of its transform, and all that was made
inside it, since the door gives every new tensor to the innermost transform. A tensor of an outer level ("captured")
cannot hold an inner level's value and is refused, unless the value is a constant of the inner level. Under vmap a
captured tensor would also be written once instead of once per example; only writes that do not read the old contents are the same.

NOTE [Writes and grad mode]
A write under no_grad changes the numbers and leaves the derivative of what is written as it was, as in eager PyTorch;
level by level, ``with_history_of`` does the same for the pure result. A write through ``detach()`` does so at every level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans import stack
from functrans.errors import CapturedOnceError, CapturedWriteError, NoPureFormError, WriteShapeError
from functrans.operators import VIEW, WRITE, Facts, facts
from functrans.stack import STATE, Interpreter, interpreter_stack, running_at
from functrans.tensor import (
    Root,
    ViewLink,
    WrapperTensor,
    base,
    dispatch,
    highest,
    lift,
    refresh,
    set_content,
)
from functrans.torch_private import OpOverload, no_dispatch

aten = torch.ops.aten

def run(known: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator that writes or makes views."""
    if known.kind == VIEW:
        return run_view(known, args, kwargs)
    if known.kind == WRITE:
        return run_write(known, args, kwargs)
    return known.special(known, args, kwargs)


# --- views ----------------------------------------------------------------------------------------------------------


def run_view(known: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a view operator and link what it returns to what it was taken from."""
    op = known.op
    owner = highest(args, kwargs, known.tensor_lists)
    if owner is None:
        out = base(op, args, kwargs)
        if STATE.top is not None and not _shares_memory(out, args[0]):
            out = lift(out, None, STATE.top)
        return out
    viewed = args[0]
    out = owner.process(op, args, kwargs)
    if type(viewed) is not WrapperTensor:  # a captured tensor seen through an inner level's index: no such view op
        return out
    if out is viewed:
        return out
    if type(out) is WrapperTensor:
        link_view(out, viewed, op, args, kwargs, None)
    elif type(out) in (list, tuple):
        for index, part in enumerate(out):
            link_view(part, viewed, op, args, kwargs, index)
    return out


def _shares_memory(out: Any, viewed: Any) -> bool:
    first = out[0] if isinstance(out, list | tuple) and out else out
    return isinstance(first, Tensor) and (first is viewed or first._is_view() or first.untyped_storage()._cdata == viewed.untyped_storage()._cdata)


def link_view(view: WrapperTensor, viewed: WrapperTensor, op: OpOverload, args: Any, kwargs: Any, index: int | None) -> None:
    parent = viewed.view_link
    if parent is not None:
        owner, root = parent.owner, parent.root
    else:
        owner, root = viewed, viewed.root
        if root is None:
            root = viewed.root = Root()
    view.view_link = ViewLink(owner, parent, root, op, args[1:], kwargs, index)
    view.seen = root.version


#: Operators that copy where they cannot view; which of the two it was depends on the strides.
MAYBE_VIEWS = {
    op
    for name in ("reshape", "contiguous", "to", "flatten", "ravel", "reshape_as", "view_as_real", "resolve_conj", "resolve_neg", "type_as",
                 "_reshape_alias", "_conj", "_to_cpu", "unflatten", "real", "positive", "expand_as", "data", "float")
    for op in (getattr(getattr(aten, name), o) for o in (getattr(aten, name).overloads() if hasattr(aten, name) else ()))
}  # fmt: skip


def is_true_view(link: ViewLink, x: Tensor) -> bool:
    """Whether the step ``link`` taken from ``x`` is a view and not a copy, by the strides of ``x``."""
    if link.op not in MAYBE_VIEWS:
        return True
    with running_at(None), torch.no_grad():
        # One element more than the view sees would not do: only strides decide, so empty data of the same layout will.
        probe = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        args = [torch.empty_like(a, device="meta") if isinstance(a, Tensor) else a for a in link.args]
        kwargs = {k: v for k, v in link.kwargs.items() if k != "device"}
        try:
            out = link.op(probe, *args, **kwargs)
        except RuntimeError:
            return True
        out = out if link.index is None else out[link.index]
        return out is probe or out._is_view()


def settle(view: WrapperTensor) -> None:
    """Cut the link of a ``view`` that turns out to be a copy (reshape of what cannot be viewed); it keeps its contents."""
    steps = []
    link = view.view_link
    while link is not None:
        steps.append(link)
        link = link.parent
    if not any(s.op in MAYBE_VIEWS for s in steps):
        return
    x: Tensor = steps[-1].base_content()
    for step in reversed(steps):
        if not is_true_view(step, x):
            view.view_link = None
            return
        x = step.apply(x)


# --- writes ---------------------------------------------------------------------------------------------------------


def run_write(known: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an in-place or ``out=`` operator: its pure form, then the update of what it writes."""
    op = known.op
    owner = highest(args, kwargs, True)
    targets = [_argument(known, i, args, kwargs) for i in known.written]
    if owner is None and all(type(t) is not WrapperTensor for t in targets if isinstance(t, Tensor)):
        if not (known.random and STATE.top is not None):
            return write_captured(known, targets, args, kwargs)
    if known.functional is None:
        resolve_functional(known)
    if known.functional is NotImplemented:
        if known.composite:
            with running_at(STATE.top):
                return op.decompose(*args, **kwargs)
        raise NoPureFormError(op)
    if len(targets) == 1 and known.metadata_write and op not in (aten.resize_.default,):
        return write_metadata(known, targets[0], args, kwargs)
    new = known.functional(args, kwargs)
    news = list(new) if isinstance(new, tuple | list) else [new]
    if len(news) > len(targets):  # pure form returns the operator's own outputs first, then what is written
        outputs, news = news[: len(news) - len(targets)], news[len(news) - len(targets) :]
    else:
        outputs = None
    out_form = known.returns_written and bool(known.written) and known.op._schema.arguments[known.written[0]].kwarg_only
    for target, value in zip(targets, news, strict=True):
        write(target, value, op, resize=out_form, reads=known.reads_target)
    if outputs is not None:
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
    if not known.returns_written:
        return None
    return targets[0] if len(targets) == 1 else tuple(targets)


def _argument(known: Facts, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if i < len(args):
        return args[i]
    return kwargs.get(known.arguments[i], known.defaults[i])


def write(target: Any, new: Tensor, op: OpOverload, *, resize: bool = False, reads: bool = True) -> None:
    """Let ``target``, the tensor that the user holds, have the contents of ``new``."""
    if new.dtype != target.dtype:
        if not torch.can_cast(new.dtype, target.dtype):
            raise RuntimeError(f"result type {_short(new.dtype)} can't be cast to the desired output type {_short(target.dtype)}")
        new = dispatch(aten.to.dtype, (new, target.dtype), {})
    if type(target) is not WrapperTensor:
        write_plain(target, new, op, resize, reads)
        return
    if new.shape != target.shape:
        if not resize:
            raise WriteShapeError(target.shape, new.shape)
        _set_shape(target, new)
    new = strip(new, target.interpreter, op, target)
    check_written_once(target.interpreter.level, op, reads)
    invalidate_saved(target)
    if target.view_link is not None:
        settle(target)
    if target.view_link is None:
        set_content(target, with_history_of(target, new))
        if target.root is not None:
            target.root.version += 1
    else:
        write_through(target, new)


def strip(new: Tensor, level: Interpreter | None, op: OpOverload, target: Tensor) -> Tensor:
    """``new`` without the constant layers above ``level``; see NOTE [What may be written]."""
    limit = 0 if level is None else level.level
    while type(new) is WrapperTensor and new.interpreter.level > limit:
        if not new.interpreter.is_constant(new):
            raise CapturedWriteError(op, target, new.interpreter, limit)
        new = new.value
    return new


def with_history_of(old: Tensor, new: Tensor, *, everywhere: bool = False) -> Tensor:
    """``new``, but with ``old``'s derivative at each level where nothing is recorded now, or at every level.

    See NOTE [Writes and grad mode].
    """
    recording = torch.is_grad_enabled()
    level = old.interpreter.level if type(old) is WrapperTensor else 0
    usual = recording and not everywhere
    for interpreter in interpreter_stack():
        usual = usual and interpreter.outer_grad_mode
        if interpreter.level > level:
            recording = recording and interpreter.outer_grad_mode
    return new if usual else _merge(old, new, recording, everywhere)


def _merge(old: Tensor, new: Tensor, recording: bool, everywhere: bool) -> Tensor:
    if type(old) is not WrapperTensor:
        if recording and not everywhere or not old.requires_grad:
            return new
        with running_at(None), torch.enable_grad():
            merged = old.clone()
            with torch.no_grad():
                return merged.copy_(new)
    interpreter = old.interpreter
    if type(new) is not WrapperTensor or new.interpreter is not interpreter:
        new = interpreter.constant(new)
    value = _merge(interpreter.aligned(old, new), new.value, recording and interpreter.outer_grad_mode, everywhere)
    return interpreter.rewrap(old if interpreter.keeps_history(recording, everywhere) else new, value)


def write_through(view: WrapperTensor, new: Tensor) -> None:
    """Write ``new`` to a view: carried back through its chain to the base."""
    link = view.view_link
    steps: list[ViewLink] = []
    while link is not None:
        steps.append(link)
        link = link.parent
    steps.reverse()
    content = steps[0].base_content()
    stages: list[Tensor] = [content]
    for step in steps[:-1]:
        stages.append(step.apply(stages[-1]))
    changed = new
    for step, before in zip(reversed(steps), reversed(stages), strict=True):
        changed = write_back(step, before, changed)
    set_content(content, with_history_of(content, changed))
    set_content(view, with_history_of(view, new))
    root = steps[0].root
    root.version += 1
    view.seen = root.version


def write_metadata(known: Facts, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator such as ``unsqueeze_`` that turns a tensor into a view of itself."""
    if type(target) is not WrapperTensor:
        raise NoPureFormError(known.op)
    invalidate_saved(target)
    op = known.functional.op
    if known.op is aten.detach_.default:
        set_content(target, dispatch(aten.detach.default, (target,), {}))
        return target
    before = _hold(target)
    new = dispatch(op, (before, *args[1:]), kwargs)
    _set_shape(target, new)
    set_content(target, new)
    link_view(target, before, op, args, kwargs, None)
    return target


def _hold(target: WrapperTensor) -> WrapperTensor:
    """A wrapper that takes over ``target``'s place as base or view, so that ``target`` can become a view of it."""
    held = target.interpreter.rewrap(target, target.value)
    held.view_link, held.root, held.seen = target.view_link, target.root, target.seen
    if held.view_link is None:
        if held.root is None:
            held.root = Root()
        held.root.content = held
    target.root = None
    return held


def _set_shape(wrapper: WrapperTensor, like: Tensor) -> None:
    with no_dispatch():
        wrapper.as_strided_(like.shape, like.stride())  # metadata only: a wrapper has no data


def write_captured(known: Facts, targets: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A write that no wrapper takes part in: eager PyTorch, on the captured tensor itself."""
    check_written_once(0, known.op, known.reads_target)
    for target in targets:
        if isinstance(target, Tensor):
            invalidate_saved(target)
    return base(known.op, args, kwargs)


def write_plain(target: Tensor, new: Tensor, op: OpOverload, resize: bool, reads: bool) -> None:
    new = strip(new, None, op, target)
    check_written_once(0, op, reads)
    invalidate_saved(target)
    if new.shape != target.shape:
        if not resize:
            raise WriteShapeError(target.shape, new.shape)
        base(aten.resize_.default, (target, list(new.shape)), {})
    base(aten.copy_.default, (target, new), {})


def check_written_once(level: int, op: OpOverload, reads: bool) -> None:
    """Refuse a write to a captured tensor that a loop over the examples would repeat."""
    if not reads:
        return
    interpreter = STATE.top
    while interpreter is not None and interpreter.level > level:
        if interpreter.repeats_writes:
            raise CapturedOnceError(op, interpreter)
        interpreter = interpreter.below


def invalidate_saved(target: Tensor) -> None:
    """Tell the levels above ``target``'s that values they saved are about to change."""
    level = target.interpreter.level if type(target) is WrapperTensor else 0
    interpreter = STATE.top
    while interpreter is not None and interpreter.level > level:
        interpreter.before_write(target)
        interpreter = interpreter.below


# --- pure forms -----------------------------------------------------------------------------------------------------


class Functional:
    """The pure form of a writing operator: called with the writing operator's arguments."""

    def __init__(self, op: OpOverload, known: Facts) -> None:
        self.op = op
        written = known.op._schema.arguments
        self.out_names = {written[i].name for i in known.written if written[i].kwarg_only}
        self.drops_out = bool(self.out_names)
        # PyTorch leaves out arguments that have the writing operator's default; the pure one may have none (bernoulli_'s p)
        positional = [a for a in op._schema.arguments if not a.kwarg_only]
        self.names = tuple(a.name for a in positional)
        self.required = max((i + 1 for i, a in enumerate(positional) if not a.has_default_value()), default=0)
        self.defaults = {a.name: a.default_value for a in written if a.has_default_value()}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.drops_out:
            kwargs = {k: v for k, v in kwargs.items() if k not in self.out_names}
        if len(args) < self.required and self.defaults:
            args = (*args, *[self.defaults[n] for n in self.names[len(args) : self.required] if n not in kwargs])
        return stack.DOOR.enter(self.op, args, kwargs)


def pure_copy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``copy_``: the source, in the dtype, device and shape of what it is written to."""
    target, source, enter = args[0], args[1], stack.DOOR.enter
    if source.dtype is not target.dtype or source.device != target.device:
        source = enter(aten._to_copy.default, (source,), {"dtype": target.dtype, "device": target.device})
    if source.shape != target.shape:
        source = enter(aten.expand.default, (source, list(target.shape)), {})
    return enter(aten.clone.default, (source,), {})


def pure_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return stack.DOOR.enter(aten.zeros_like.default, args, kwargs)


#: Pure forms that are not an operator of the same name: those exist without a derivative at the base.
PURE_FORMS: dict[OpOverload, Callable[..., Any]] = {aten.copy_.default: pure_copy, aten.zero_.default: pure_zero}


def resolve_functional(known: Facts) -> None:
    """Find the pure form of a writing operator by its name and schema; NotImplemented if there is none."""
    op = known.op
    if op in PURE_FORMS:
        known.functional = PURE_FORMS[op]
        return
    schema = op._schema
    known.functional = NotImplemented
    namespace, name = schema.name.split("::")
    library = getattr(torch.ops, namespace)
    out_form = any(schema.arguments[i].kwarg_only for i in known.written)
    wanted = [(a.name, str(a.type)) for i, a in enumerate(schema.arguments) if not (out_form and i in known.written)]
    names = [name] if out_form else []
    if name.endswith("_") and not name.endswith("__"):
        names += [name[:-1], name[:-1] + "_functional"]
    elif name.startswith("__i") and name.endswith("__"):
        names += ["__" + name[3:], name[3:-2]]
    names += [name + "_functional", name]
    for candidate in names:
        packet = getattr(library, candidate, None)
        if packet is None:
            continue
        overloads = [getattr(packet, o) for o in packet.overloads()]
        overloads.sort(key=lambda o: o._overloadname != op._overloadname)
        for other in overloads:
            other_schema = other._schema
            if any(a.alias_info is not None and a.alias_info.is_write for a in other_schema.arguments):
                continue
            if [(a.name, str(a.type)) for a in other_schema.arguments] == wanted and other_schema.returns:
                known.functional = Functional(other, known)
                return


def _short(dtype: torch.dtype) -> str:
    names = {"float32": "Float", "float64": "Double", "int64": "Long", "int32": "Int", "bool": "bool", "float16": "Half"}
    text = str(dtype).removeprefix("torch.")
    return names.get(text, text)


# --- writing back through one view step -----------------------------------------------------------------------------


def write_back(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """What ``before`` becomes when its view ``step`` becomes ``changed``."""
    rule = WRITE_BACK.get(step.op)
    if rule is None:
        return write_back_by_index(step, before, changed)
    return rule(step, before, changed)


def _arg(step: ViewLink, position: int, default: Any = None) -> Any:
    return step.args[position] if position < len(step.args) else default


def _back_select(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.select_scatter.default, (before, changed, *step.args), {})


def _back_slice(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.slice_scatter.default, (before, changed, *step.args), {})


def _back_diagonal(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.diagonal_scatter.default, (before, changed, *step.args), {})


def _back_shape(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.reshape.default, (changed, list(before.shape)), {})


def _back_same(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return changed


def _back_transpose(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.transpose.int, (changed, *step.args), {})


def _back_t(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.t.default, (changed,), {})


def _back_permute(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    rank = max(before.dim(), 1)
    inverse = [0] * before.dim()
    for i, d in enumerate(step.args[0]):
        inverse[d % rank] = i
    return dispatch(aten.permute.default, (changed, inverse), {})


def _back_unbind(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return dispatch(aten.select_scatter.default, (before, changed, _arg(step, 0, 0), step.index), {})


def _back_detach(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    return with_history_of(before, changed, everywhere=True)


def write_back_by_index(step: ViewLink, before: Tensor, changed: Tensor) -> Tensor:
    """Any view that moves elements without changing them: its own positions say where each one came from."""
    count = math.prod(before.shape)
    positions = torch.arange(count, device=before.device).reshape(before.shape)
    with running_at(None):
        seen = step.op(positions, *step.args, **step.kwargs)
    seen = seen if step.index is None else seen[step.index]
    flat_positions = dispatch(aten.reshape.default, (seen, [-1]), {})
    flat = dispatch(aten.reshape.default, (before, [-1]), {})
    values = dispatch(aten.reshape.default, (changed, [-1]), {})
    if len(torch.unique(seen)) != math.prod(seen.shape):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    flat = dispatch(aten.index_put.default, (flat, [flat_positions], values), {})
    return dispatch(aten.reshape.default, (flat, list(before.shape)), {})


WRITE_BACK: dict[OpOverload, Callable[[ViewLink, Tensor, Tensor], Tensor]] = {
    aten.select.int: _back_select,
    aten.slice.Tensor: _back_slice,
    aten.diagonal.default: _back_diagonal,
    aten.transpose.int: _back_transpose,
    aten.swapaxes.default: _back_transpose,
    aten.swapdims.default: _back_transpose,
    aten.t.default: _back_t,
    aten.numpy_T.default: lambda s, b, c: dispatch(aten.numpy_T.default, (c,), {}),
    aten.mT.default: lambda s, b, c: dispatch(aten.mT.default, (c,), {}),
    aten.permute.default: _back_permute,
    aten.unbind.int: _back_unbind,
    aten.detach.default: _back_detach,
    aten._conj.default: lambda s, b, c: dispatch(aten._conj.default, (c,), {}),
    aten._neg_view.default: lambda s, b, c: dispatch(aten.neg.default, (c,), {}),
    aten.real.default: lambda s, b, c: torch.complex(c, b.imag) if b.is_complex() else c,
    aten.imag.default: lambda s, b, c: torch.complex(b.real, c),
    aten.view_as_real.default: lambda s, b, c: torch.view_as_complex(c.contiguous()),
    aten.view_as_complex.default: lambda s, b, c: torch.view_as_real(c),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
         aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.ravel.default, aten.view_as.default,
         aten.reshape_as.default, aten._reshape_alias.default, aten.unflatten.int),
        _back_shape,
    ),
    **dict.fromkeys((aten.alias.default, aten.contiguous.default, aten.lift_fresh.default, aten.positive.default), _back_same),
}  # fmt: skip
