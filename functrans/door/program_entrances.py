"""The short way in of pointwise functions: each enters as the program of its operators.

The short way is open where nothing else has to see what is called before the door does: a mode of the user's, or
autocast. The condition is written out at each entrance, where a call of a function would cost as much as what it asks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.calls import lift
from functrans.boundary.leftovers import check_thread
from functrans.boundary.made_at import SENT_ON, note_site
from functrans.core.dispatch import NO_KWARGS, dispatch
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.door.torch_dispatch import DOOR
from functrans.door.torch_function import STRIDED, otherwise, reopen
from functrans.errors.call_sites import USER_FILES
from functrans.interpreters.failures import explain
from functrans.operators.info import op_info
from functrans.operators.rules import RuleCache
from functrans.operators.scopes import SCOPES
from functrans.programs.fusible import REAL
from functrans.programs.operators import as_key, operator_program
from functrans.programs.program import Program
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import (
    OpOverload,
    autocast_enabled,
    function_mode_enabled,
    is_torch_func_active,
    mode_stack_size,
    pop_mode,
    push_mode,
)

aten = torch.ops.aten
NUMBERS = frozenset((int, float, type(None)))
#: for how many choices of numbers a function has programs: those in a network, and not what changes with every call
MOST = 32
#: as nn.ReLU says it to a function of Python's, which have the option
NOT_INPLACE = {"inplace": False}
#: an operand that was given by name, or not at all
NOT_HERE: Any = object()


def through(program: Program, args: tuple[Any, ...], owner: Interpreter, above: int) -> Any:
    """Send ``program`` in, to ``owner``, which is of the top level among ``args``.

    ``above``: how many frames up the code is that called the function.
    """
    top = STATE.top
    if owner is not top:
        if owner.thread != get_ident():
            check_thread(owner)
        if top is not None and top.within is not None and owner.level < top.within.level:
            owner = top.within  # which takes captured tensors in
    watcher = None if owner is top or top is None else top.watcher
    try:
        pop_mode(None)  # as PyTorch does while a handler runs
        if watcher is None:
            out = owner.process(program, args, NO_KWARGS)  # type: ignore[arg-type]
        else:
            out = dispatch(program, args, NO_KWARGS, watcher)
            owner = watcher if watcher.level > owner.level else owner
    except BaseException as error:
        reopen()
        explain(error)
        raise
    push_mode(DOOR)
    if owner is not top:
        out = lift(out, owner, top)
    frame = sys._getframe(above)
    code = frame.f_code
    if code.co_filename in USER_FILES:
        out.made_at = (code, frame.f_lasti)
    elif code.co_filename not in SENT_ON:
        note_site((out,), frame, above)
    return out


def unary(function: Callable[..., Any], find: Callable[[], Program | None], up: int) -> Callable[..., Any]:
    """What takes the place of ``function``, of one tensor; ``find()`` is its program."""
    programs = RuleCache()
    above = up + 1  # seen from what the entrance calls
    by_python = type(function) is FunctionType

    def entrance(x: Any = NOT_HERE, /, *more: Any, **kwargs: Any) -> Any:
        if kwargs and by_python and kwargs == NOT_INPLACE:
            kwargs = {}
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        if closed or more or kwargs or type(x) is not WrapperTensor or x.dtype not in REAL or x.layout is not STRIDED:
            return otherwise(function, (), by_place(x, *more), kwargs, above)
        if x.view_link is not None:
            x.view_link.refresh(x)
        owner = x.interpreter
        if not owner.alive:
            return otherwise(function, (), (x,), kwargs, above)  # see NOTE [Leftovers]
        try:
            program = programs.entries[0] if not SCOPES else programs.find(0, find)
        except KeyError:
            program = programs.find(0, find)
        if program is None or not owner.whole:
            return otherwise(function, (), (x,), kwargs, above)
        return through(program, (x,), owner, above)

    return entrance


def by_place(*operands: Any) -> tuple[Any, ...]:
    """The operands that were given by their place."""
    return tuple(a for a in operands if a is not NOT_HERE)


#: What Python's reflected operators are with the operands in their order.
IN_ORDER: dict[str, Callable[..., Any]] = {
    "__radd__": torch.add, "__rsub__": torch.sub, "__rmul__": torch.mul, "__rtruediv__": torch.div,
}  # fmt: skip


def binary(
    function: Callable[..., Any], find: Callable[[bool], Program | None], up: int, *, reflected: bool = False
) -> Callable[..., Any]:
    """What takes the place of ``function``, of two operands; ``find(is_tensor)`` is its program, by what the second
    one is.

    ``reflected``: of two tensors the second comes first, as in ``x.__rsub__(y)``; with a number the program sees to
    that.
    """
    programs = RuleCache()
    above = up + 1
    in_order = IN_ORDER.get(getattr(function, "__name__", ""))

    def entrance(x: Any = NOT_HERE, y: Any = NOT_HERE, /, *more: Any, **kwargs: Any) -> Any:
        kind = type(y)
        number = kind is float or kind is int
        if reflected and not number:
            x, y, kind = y, x, type(x)
        owner: Interpreter | None = None
        if more or kwargs or mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled():
            pass
        elif type(x) is WrapperTensor:
            if x.view_link is not None:
                x.view_link.refresh(x)
            fit = number or (  # what is frequent, without a call
                kind is WrapperTensor and y.view_link is None and y.dtype is x.dtype and y.layout is STRIDED and x.shape
            )
            if x.dtype in REAL and x.layout is STRIDED and (fit or similar(x, y, kind)):
                owner = x.interpreter
                other = y.interpreter if kind is WrapperTensor else owner
                if other is not owner and owner.alive and (not other.alive or other.level >= owner.level):
                    owner = other if other.level != owner.level or not other.alive else None
        elif kind is WrapperTensor and y.dtype in REAL and y.layout is STRIDED and similar(y, x, type(x)):
            if y.view_link is not None:
                y.view_link.refresh(y)
            owner = y.interpreter
        if owner is not None and owner.alive and owner.whole:
            try:
                program = programs.entries[number] if not SCOPES else programs.find(number, find, not number)
            except KeyError:
                program = programs.find(number, find, not number)
            if program is not None:
                return through(program, (x, y), owner, above)
        if reflected and not number:
            x, y = y, x
        if in_order is not None and isinstance(y, Tensor) and not (x.layout is STRIDED and y.layout is STRIDED):
            return otherwise(in_order, (), (y, x, *more), kwargs, above)  # PyTorch has dense + sparse, not the other
        return otherwise(function, (), by_place(x, y, *more), kwargs, above)

    return entrance


def similar(x: WrapperTensor, y: Any, kind: type) -> bool:
    """Whether ``y`` is a tensor that a program may take together with ``x``."""
    if kind is WrapperTensor:
        if y.view_link is not None:
            y.view_link.refresh(y)
    elif kind is not Tensor or is_torch_func_active():  # a tensor of another library's transform looks like a plain one
        return False
    # A result shows the device of one of its operands: two numbers on different devices are left to PyTorch.
    return y.dtype is x.dtype and y.layout is STRIDED and (bool(x.shape) or y.device == x.device)


def numeric(function: Callable[..., Any], op: OpOverload, names: tuple[str, ...], up: int) -> Callable[..., Any]:
    """What takes the place of ``function``, of one tensor and the numbers ``names``, which are in its program.

    Numbers that ``op`` takes beside those have their defaults.
    """
    programs = RuleCache()
    above = up + 1
    by_python = type(function) is FunctionType
    count = len(names)
    defaults = op_info(op).defaults[1:]
    ordered = names == ("min_val", "max_val")  # which Python's function makes sure of

    def entrance(x: Any = NOT_HERE, /, *more: Any, **kwargs: Any) -> Any:
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        if not closed and type(x) is WrapperTensor and x.dtype in REAL and x.layout is STRIDED:
            numbers = more
            if len(more) != count or kwargs:
                if by_python and (more[count:] == (False,) or kwargs.get("inplace") is False):
                    kwargs, more = {n: v for n, v in kwargs.items() if n != "inplace"}, more[:count]
                left = dict(kwargs)
                numbers = (*more, *[left.pop(n, d) for n, d in zip(names[len(more) :], defaults[len(more) :])])
                closed = bool(left) or len(numbers) != count
            if ordered and not closed and not numbers[0] <= numbers[1]:
                closed = True
            owner = x.interpreter
            if not closed and NUMBERS.issuperset(map(type, numbers)) and owner.alive and owner.whole:
                if x.view_link is not None:
                    x.view_link.refresh(x)
                key, known = as_key(numbers), programs.entries
                if key in known or len(known) < MOST or SCOPES:
                    program = programs.find(key, operator_program, op, *numbers)
                    if program is not None:
                        return through(program, (x,), owner, above)
        return otherwise(function, (), by_place(x, *more), kwargs, above)

    return entrance


def power(function: Callable[..., Any], up: int) -> Callable[..., Any]:
    """What takes the place of ``x ** exponent``, which has a program of its own for every small exponent, whole or
    half."""
    above = up + 1

    def entrance(x: Any = NOT_HERE, exponent: Any = NOT_HERE, /, *more: Any, **kwargs: Any) -> Any:
        if mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled() or more or kwargs:
            return otherwise(function, (), by_place(x, exponent, *more), kwargs, above)
        small = (type(exponent) is int or type(exponent) is float) and -8 <= exponent <= 8 and 2 * exponent % 1 == 0
        if small and type(x) is WrapperTensor and x.dtype in REAL and x.layout is STRIDED:
            program = operator_program(aten.pow.Tensor_Scalar, exponent)
            if x.view_link is not None:
                x.view_link.refresh(x)
            owner = x.interpreter
            if program is not None and owner.alive and owner.whole:
                return through(program, (x,), owner, above)
        return otherwise(function, (), by_place(x, exponent, *more), kwargs, above)

    return entrance
