"""The short way in: frequent functions as programs or operators, before PyTorch has parsed the call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from functrans.core.dispatch import NO_KWARGS, lift
from functrans.core.errors import DeadWrapperError
from functrans.core.errors.call_sites import USER_FILES
from functrans.core.errors.made_at import SENT_ON, note_site, several
from functrans.core.errors.refusals import concrete
from functrans.core.interpreter import Interpreter
from functrans.core.operators import OpInfo, op_info
from functrans.core.pytrees import tree_map
from functrans.core.rules import FORGET, SCOPES, RuleTable, scope_here
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import STATE
from functrans.core.torch_private import (
    OpOverload,
    autocast_enabled,
    function_mode_enabled,
    is_torch_func_active,
    mode_stack_size,
    pop_mode,
    push_mode,
    tensor_torch_function,
    without_torch_function,
)
from functrans.door.lost_arguments import LOST, recovered
from functrans.door.torch_dispatch import DOOR, check_thread, handle
from functrans.interpreters.failures import explain
from functrans.programs.fusible import REAL
from functrans.programs.operators import operator_program, traced_program
from functrans.programs.program import Program
from functrans.programs.torch_functions import BINARY, DIRECT, DUNDERS, OPERATORS, OTHER_NAMES, UNARY, spellings

aten = torch.ops.aten
STRIDED = torch.strided


# What takes the place of a function, an *entrance*, is made twice: to be called by ``torch_function``, and as a method
# of the wrapper, where the code that called it is one frame ``up``.
BY_METHOD = 1


def frames_above(function: Callable[..., Any]) -> int:
    """How many frames above ``torch_function`` the code is that called ``function``; one of Python's own calls
    handle_torch_function first."""
    return 3 if type(function) is FunctionType else 1


#: By torch function or method: what takes its place on wrappers.
ENTRANCES: dict[Callable[..., Any], Callable[..., Any]] = {}


@classmethod  # type: ignore[misc]
def torch_function(
    cls: type, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """A torch function was called with a wrapper among its arguments."""
    entrance = ENTRANCES.get(func)
    if entrance is None or len(types) > 1:
        return otherwise(func, types, args, kwargs or {}, 4 if type(func) is FunctionType else 2)  # 1 + frames_above
    return entrance(*args, **kwargs) if kwargs else entrance(*args)


WrapperTensor.__torch_function__ = torch_function  # type: ignore[method-assign, assignment]


def otherwise(function: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any], up: int) -> Any:
    """PyTorch's own way, on which other tensor subclasses among the arguments have their say first, as if wrappers had
    none.

    One that does not answer for itself only wants results of its type, which a wrapper cannot be. ``up``: how many
    frames up ``function`` was called.
    """
    if function in LOST:
        kwargs = recovered(function, kwargs)
    elif function is torch.autograd.grad:  # of what captured tensors alone were made into: constants hold its graph
        args = tree_map(without_constants, args)
    if len(types) != 1 or types[0] is not WrapperTensor:
        others = [t for t in types or {type(a): None for a in args} if t not in ORDINARY and answers(t)]
        for t in others:
            out = t.__torch_function__(function, tuple(others), args, kwargs)
            if out is not NotImplemented:
                return out
    out = without_torch_function(function, types, args, kwargs)
    kind = type(out)
    if kind is WrapperTensor:
        if args and out is args[0]:  # written
            return out
        frame = sys._getframe(up)
        code = frame.f_code
        if code.co_filename in USER_FILES:
            out.made_at = (code, frame.f_lasti)
        else:
            note_site((out,), frame, up)
    elif several(out):
        note_site(out, sys._getframe(up), up)
    return out


def without_constants(x: Any) -> Any:
    """The plain tensor that ``x`` is at every level, or ``x``."""
    plain = concrete(x) if type(x) is WrapperTensor else None
    return x if plain is None else plain


def answers(kind: type) -> bool:
    protocol = getattr(kind, "__torch_function__", without_torch_function)
    return protocol is not without_torch_function and getattr(protocol, "__func__", None) is not tensor_torch_function


#: Letters for the kinds of arguments in ``spellings.DIRECT``.
KINDS = {WrapperTensor: "T", Tensor: "T", torch.nn.Parameter: "T", int: "i", float: "f", type(None): "N"}
ORDINARY = frozenset((*KINDS, bool, str, list, tuple, torch.Size, torch.dtype, torch.device))


# The short way is open where nothing else has to see what is called before the door does: a mode of the user's, or
# autocast. The condition is written out at each entrance, where a call of a function would cost as much as what it
# asks.


def through(program: Program, args: tuple[Any, ...], owner: Interpreter, above: int) -> Any:
    """Send ``program`` in, to ``owner``, which is of the top level among ``args``.

    ``above``: how many frames up the code is that called the function.
    """
    top = STATE.top
    if owner is not top and owner.thread != get_ident():
        check_thread(owner)
    try:
        pop_mode(None)  # as PyTorch does while a handler runs
        out = owner.process(program, args, NO_KWARGS)  # type: ignore[arg-type]
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


def reopen() -> None:
    """Put the door back on PyTorch's mode stack, unless it is there."""
    if mode_stack_size() < STATE.door_depth:
        push_mode(DOOR)


NOT_INPLACE = {"inplace": False}


def unary(function: Callable[..., Any], find: Callable[[], Program | None], up: int) -> Callable[..., Any]:
    """What takes the place of ``function``, of one tensor; ``find()`` is its program."""
    found: dict[Any, Program | None] = {}
    above = up + 1  # seen from what the entrance calls

    def entrance(x: Any, *more: Any, **kwargs: Any) -> Any:
        if kwargs and kwargs == NOT_INPLACE:  # as nn.ReLU says it
            kwargs = {}
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        if closed or more or kwargs or type(x) is not WrapperTensor or x.dtype not in REAL or x.layout is not STRIDED:
            return otherwise(function, (), (x, *more), kwargs, above)
        if x.view_link is not None:
            x.view_link.refresh(x)
        owner = x.interpreter
        if not owner.alive:
            raise DeadWrapperError(x)
        try:
            program = found[0] if not SCOPES else program_here(found, 0, find)
        except KeyError:
            program = program_here(found, 0, find)
        if program is None or not owner.whole:
            return otherwise(function, (), (x,), kwargs, above)
        return through(program, (x,), owner, above)

    def forget(table: RuleTable[Any], op: OpOverload) -> None:
        nonlocal found
        found = {}

    FORGET.append(forget)
    return entrance


def program_here(
    found: dict[Any, Program | None], key: Any, find: Callable[..., Program | None], *args: Any
) -> Program | None:
    """``find(*args)`` by the rules that hold in this context; ``found`` keeps those for outside of scopes."""
    outside = scope_here() is None
    if outside and key in found:
        return found[key]
    program = find(*args)
    if outside:
        found[key] = program
    return program


def binary(
    function: Callable[..., Any], find: Callable[[bool], Program | None], up: int, *, reflected: bool = False
) -> Callable[..., Any]:
    """What takes the place of ``function``, of two operands; ``find(is_tensor)`` is its program, by what the second
    one is.

    ``reflected``: of two tensors the second comes first, as in ``x.__rsub__(y)``; with a number the program sees to
    that.
    """
    found: dict[bool, Program | None] = {}
    above = up + 1

    def entrance(x: Any, y: Any, *more: Any, **kwargs: Any) -> Any:
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
                if other is not owner and owner.alive and (not other.alive or other.level > owner.level):
                    owner = other
        elif kind is WrapperTensor and y.dtype in REAL and y.layout is STRIDED and similar(y, x, type(x)):
            if y.view_link is not None:
                y.view_link.refresh(y)
            owner = y.interpreter
        if owner is not None and owner.alive and owner.whole:
            try:
                program = found[number] if not SCOPES else program_here(found, number, find, not number)
            except KeyError:
                program = program_here(found, number, find, not number)
            if program is not None:
                return through(program, (x, y), owner, above)
        if reflected and not number:
            x, y = y, x
        return otherwise(function, (), (x, y, *more), kwargs, above)

    def forget(table: RuleTable[Any], op: OpOverload) -> None:
        nonlocal found
        found = {}

    FORGET.append(forget)
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


def power(function: Callable[..., Any], up: int) -> Callable[..., Any]:
    """What takes the place of ``x ** exponent``, which has a program of its own for every small exponent, whole or
    half."""
    above = up + 1

    def entrance(x: Any, exponent: Any, *more: Any, **kwargs: Any) -> Any:
        if mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled() or more or kwargs:
            return otherwise(function, (), (x, exponent, *more), kwargs, above)
        small = (type(exponent) is int or type(exponent) is float) and -8 <= exponent <= 8 and 2 * exponent % 1 == 0
        if small and type(x) is WrapperTensor and x.dtype in REAL and x.layout is STRIDED:
            program = operator_program(aten.pow.Tensor_Scalar, exponent)
            if x.view_link is not None:
                x.view_link.refresh(x)
            owner = x.interpreter
            if program is not None and owner.alive and owner.whole:
                return through(program, (x,), owner, above)
        return otherwise(function, (), (x, exponent, *more), kwargs, above)

    return entrance


def direct(function: Callable[..., Any], patterns: dict[str, OpOverload], up: int) -> Callable[..., Any]:
    """What takes the place of ``function``, whose operator is found in ``patterns`` by the kinds of the arguments."""
    found: dict[tuple[type, ...], tuple[OpInfo | None, bool]] = {}
    above = up + 1

    def meant(types: tuple[type, ...]) -> tuple[OpInfo | None, bool]:
        """The operator for arguments of these types, and whether all after the first are one list."""
        kinds = "".join([KINDS.get(kind, "?") for kind in types])
        op, listed = patterns.get(kinds), False
        if op is None and len(kinds) > 1 and kinds == "T" + "i" * (len(kinds) - 1):
            op, listed = patterns.get("T*"), True
        if op is None:
            return None, False
        found[types] = op_info(op), listed
        return found[types]

    def entrance(*args: Any, **kwargs: Any) -> Any:
        closed = mode_stack_size() != STATE.door_depth or autocast_enabled() or function_mode_enabled()
        if not (closed or kwargs or is_torch_func_active()):
            types = (*map(type, args),)
            known, listed = found.get(types) or meant(types)
            top = STATE.top
            if known is not None and args[0].layout is STRIDED and top is not None and not top.carries_autograd:
                try:
                    pop_mode(None)
                    out = handle(known.op, known, (args[0], list(args[1:])) if listed else args, NO_KWARGS)
                except BaseException as error:
                    reopen()
                    explain(error)
                    raise
                push_mode(DOOR)
                kind = type(out)
                if kind is WrapperTensor:
                    frame = sys._getframe(up)
                    code = frame.f_code
                    if code.co_filename in USER_FILES:
                        out.made_at = (code, frame.f_lasti)
                    elif code.co_filename not in SENT_ON:
                        note_site((out,), frame, up)
                elif several(out):
                    note_site(out, sys._getframe(up), up)
                return out
        return otherwise(function, (), args, kwargs, above)

    return entrance


def reversed_div(x: Any, y: Any) -> Any:
    return x.reciprocal() * y


#: Python's reflected operators, whose program depends on what the other operand is.
REFLECTED: dict[str, Callable[[bool], Program | None]] = {
    "__rsub__": lambda tensor: operator_program(aten.sub.Tensor if tensor else aten.rsub.Scalar),
    "__rtruediv__": lambda tensor: operator_program(aten.div.Tensor) if tensor else traced_program(reversed_div, 2),
}


def entrance_of(function: Callable[..., Any], name: str, up: int) -> Callable[..., Any] | None:
    """What takes the place of the torch function or method that ``name`` stands for in programs/torch_functions.py."""
    if name == "pow":
        return power(function, up)
    if name in BINARY:
        operators = BINARY[name]
        return binary(function, lambda tensor: operator_program(operators["TT" if tensor else "Tn"]), up)
    if name in UNARY:
        return unary(function, lambda: operator_program(getattr(aten, name).default), up)
    if name in REFLECTED:
        return binary(function, REFLECTED[name], up, reflected=True)
    return direct(function, DIRECT[name], up) if name in DIRECT else None


def set_up() -> None:
    """Fill ``ENTRANCES``, and give the wrapper methods of its own."""
    names = spellings()
    names.update({getattr(Tensor, name): name for name in REFLECTED})
    for function, name in names.items():
        entrance = entrance_of(function, name, 1 + frames_above(function))
        if entrance is not None:
            ENTRANCES[function] = entrance
    for name in (*DUNDERS, *OPERATORS, *DIRECT, *OTHER_NAMES, *REFLECTED):
        method: Any = getattr(Tensor, name, None)
        if method in ENTRANCES:
            setattr(WrapperTensor, name, entrance_of(method, names[method], BY_METHOD))
    for function in (torch.is_conj, Tensor.is_conj):  # no operators, and PyTorch would look at the wrapper
        ENTRANCES[function] = lambda input: input.is_conj()
    for function in (torch.is_neg, Tensor.is_neg):
        ENTRANCES[function] = lambda input: input.is_neg()


set_up()
