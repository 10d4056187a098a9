"""The short way in of views, products, reductions and the like: each enters as the operator that it is.

When that way is open is said in door/program_entrances.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.made_at import SENT_ON, note_site, several
from functrans.core.dispatch import NO_KWARGS
from functrans.core.tensor import WrapperTensor
from functrans.door.torch_dispatch import DOOR, handle
from functrans.door.torch_function import ORDINARY, STRIDED, otherwise, reopen
from functrans.errors import DeadWrapperError
from functrans.errors.call_sites import USER_FILES
from functrans.interpreters.failures import explain
from functrans.operators.info import OpInfo, op_info
from functrans.operators.schemas import Form, form_of, formed
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import (
    OpOverload,
    autocast_enabled,
    function_mode_enabled,
    has_kernel,
    is_torch_func_active,
    mode_stack_size,
    pop_mode,
    push_mode,
)

aten = torch.ops.aten
#: The types of tensors that have no say of their own.
TENSORS = frozenset((WrapperTensor, Tensor, torch.nn.Parameter))
LISTS = (list, tuple)
#: the form of sizes that are given one by one
REST: Form = ((-1, 0),)


def direct(
    function: Callable[..., Any], overloads: Sequence[OpOverload], up: int, *, sizes: bool = False
) -> Callable[..., Any]:
    """What takes the place of ``function``, which is the first of ``overloads`` that takes the arguments.

    ``sizes``: the ints after the first argument may be given one by one.
    """
    found: dict[tuple[type, ...], tuple[OpInfo | None, Form]] = {}
    known = [op_info(op) for op in overloads]
    above = up + 1
    named = getattr(torch.return_types, function.__name__, None)  # what several results are shown as

    def meant(kinds: tuple[type, ...]) -> tuple[OpInfo | None, Form]:
        if sizes and len(kinds) > 1 and all(kind is int for kind in kinds[1:]):
            found[kinds] = known[0], REST
            return found[kinds]
        if not ORDINARY.issuperset(kinds):
            return None, ()
        forms = ((info, form_of(info.op, kinds, TENSORS)) for info in known)
        found[kinds] = next(((info, form) for info, form in forms if form is not None), (None, ()))
        return found[kinds]

    def entrance(*args: Any, **kwargs: Any) -> Any:
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        top = STATE.top
        if not closed and top is not None and not top.carries_autograd and not is_torch_func_active():
            given = placed(known, args, kwargs) if kwargs else args
            kinds = (*map(type, given),)
            info, form = found.get(kinds) or meant(kinds)
            if info is not None and given[0].layout is STRIDED:
                out = handled(info, given, above, form)
                if out is not LEFT_TO_PYTORCH:
                    if type(out) is tuple and named is not None:
                        return named(out)
                    return out if type(out) is not list else tuple(out)  # as functions return several
        return otherwise(function, (), args, kwargs, above)

    return entrance


def placed(known: Sequence[OpInfo], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments by position, where the next ones of an overload have the names in ``kwargs``; else none."""
    for info in known if args else ():
        values = list(args)
        for name in info.arguments[len(args) : len(args) + len(kwargs)]:
            if name not in kwargs:
                break
            values.append(kwargs[name])
        else:
            if len(values) == len(args) + len(kwargs):
                return tuple(values)
    return ()


CALL = OpOverload.__call__.__code__


def overload(op: OpOverload, types: Any, args: tuple[Any, ...], up: int) -> Any:
    """``aten.mm.default(x, y)``, which derivatives' formulas and rules are made of, called ``up`` frames up."""
    top = STATE.top
    closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
    closed = closed or sys._getframe(up).f_code is not CALL  # ``op.decompose(...)`` is to run its pieces
    if not closed and top is not None and not top.carries_autograd and not is_torch_func_active():
        try:
            known = op._functrans  # type: ignore[attr-defined]
        except AttributeError:
            if not has_kernel(op.name()):  # a form that TorchScript alone knows, which calls an operator
                return otherwise(op, types, args, {}, up + 1)
            known = op_info(op)
        kinds = (*map(type, args),)
        try:
            form = known.forms[kinds]
        except KeyError:
            form = None
            if known.settled and ORDINARY.issuperset(kinds):
                form = known.forms[kinds] = form_of(op, kinds, TENSORS)
        if form is not None and args[0].layout is STRIDED:
            out = handled(known, args, up + 1, form)
            if out is not LEFT_TO_PYTORCH:
                return out
    return otherwise(op, types, args, {}, up + 1)


#: what ``handled`` returns where its arguments are not what they seemed: a list holds more than ints, or a transform
#: that has ended left one of them
LEFT_TO_PYTORCH: Any = object()


def handled(known: OpInfo, args: tuple[Any, ...], above: int, form: Form = ()) -> Any:
    """Handle an operator that is called ``above`` frames up, on ``args`` brought to ``form``, as the door would."""
    if form:
        given = (args[0], list(args[1:])) if form is REST else formed(form, args)
        if given is None:
            return LEFT_TO_PYTORCH
        args = given
    try:
        pop_mode(None)
        out = handle(known.op, known, args, NO_KWARGS)
    except BaseException as error:
        reopen()
        if type(error) is DeadWrapperError:
            return LEFT_TO_PYTORCH
        explain(error)
        raise
    push_mode(DOOR)
    kind = type(out)
    if kind is WrapperTensor:
        frame = sys._getframe(above)
        code = frame.f_code
        if code.co_filename in USER_FILES:
            out.made_at = (code, frame.f_lasti)
        elif code.co_filename not in SENT_ON:
            note_site((out,), frame, above)
    elif several(out):
        note_site(out, sys._getframe(above), above)
    return out


def joining(function: Callable[..., Any], op: OpOverload, up: int) -> Callable[..., Any]:
    """What takes the place of ``function`` of a list of tensors and a dimension."""
    known = op_info(op)
    above = up + 1

    def entrance(*args: Any, **kwargs: Any) -> Any:
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        top = STATE.top
        known_form = len(args) == 2 and not kwargs or len(args) == 1 and kwargs.keys() <= {"dim"}
        if known_form and not (closed or is_torch_func_active()) and top is not None and not top.carries_autograd:
            tensors, dim = args[0], args[1] if len(args) == 2 else kwargs.get("dim", 0)
            if type(dim) is int and type(tensors) in LISTS and all(map(is_strided, tensors)):
                out = handled(known, (tensors, dim), above)
                if out is not LEFT_TO_PYTORCH:
                    return out
        return otherwise(function, (), args, kwargs, above)

    return entrance


def is_strided(x: Any) -> bool:
    """Whether ``x`` is an ordinary tensor."""
    return type(x) in TENSORS and x.layout is STRIDED


#: Operators that follow each other, and what each takes beside the tensor.
Steps = Sequence[tuple[OpInfo, tuple[Any, ...]]]
SELECT, SLICE, UNSQUEEZE, INDEX = map(
    op_info, (aten.select.int, aten.slice.Tensor, aten.unsqueeze.default, aten.index.Tensor)
)


def indexed(function: Callable[..., Any], up: int) -> Callable[..., Any]:
    """What takes the place of ``x[index]``: the operators that PyTorch makes of numbers that are in range, slices, None
    and an ellipsis, or of one tensor of numbers."""
    above = up + 1

    def entrance(x: Any, index: Any) -> Any:
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        top = STATE.top
        if type(x) is not WrapperTensor or x.layout is not STRIDED or closed or is_torch_func_active():
            return otherwise(function, (), (x, index), {}, above)
        if top is not None and not top.carries_autograd:
            steps: Steps = ()
            if type(index) in TENSORS:
                whole = index.dtype is torch.int64 and index.layout is STRIDED and index.shape
                steps = ((INDEX, ([index],)),) if whole else ()
            else:
                steps = steps_of(x.shape, index if type(index) is tuple else (index,))
            out = x
            for known, rest in steps:
                out = handled(known, (out, *rest), above)
                if out is LEFT_TO_PYTORCH:
                    break
            else:
                if steps:
                    return out
        return otherwise(function, (), (x, index), {}, above)

    return entrance


def steps_of(shape: tuple[int, ...], index: tuple[Any, ...]) -> Steps:
    """The operators that ``x[index]`` is; none if PyTorch has to say."""
    steps: list[tuple[OpInfo, tuple[Any, ...]]] = []
    given = sum(type(i) is int or type(i) is slice for i in index)  # one dimension each
    sizes, dim, seen = list(shape), 0, False
    if given > len(sizes):
        return ()
    for i in index:
        size = sizes[dim] if dim < len(sizes) else 0
        if type(i) is int and type(size) is int and -size <= i < size:
            steps.append((SELECT, (dim, i)))
            del sizes[dim]
        elif type(i) is slice:
            start = 0 if i.start is None else i.start
            stop = sys.maxsize if i.stop is None else i.stop
            step = 1 if i.step is None else i.step
            if not type(start) is type(stop) is type(step) is type(size) is int or step < 1:
                return ()
            if start != 0 or stop < size or step != 1:
                steps.append((SLICE, (dim, start, stop, step)))
            dim += 1
        elif i is None:
            steps.append((UNSQUEEZE, (dim,)))
            sizes.insert(dim, 1)
            dim += 1
        elif i is Ellipsis and not seen:
            seen = True
            dim += len(shape) - given
        else:
            return ()
    return steps
