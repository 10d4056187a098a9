"""The door: the one place where operators enter, from user code to the interpreter stack.

There are two ways to it. The whole of PyTorch comes through ``__torch_dispatch__``: PyTorch parses the call, walks its dispatcher,
and hands over an operator. The short way is ``__torch_function__``: PyTorch hands over the function that was called (``torch.sin``)
as soon as it sees a wrapper among the arguments, and Python's operators (``x * y``) are methods of the wrapper to begin
with. What is a pointwise program (programs.py) enters there; everything else goes back to PyTorch's parser and comes the first way.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functrans import mutation, programs, stack
from functrans.errors import DeadWrapperError
from functrans.operators import PURE, Facts, facts, normalized
from functrans.programs import REAL, Program, operator_program, traced
from functrans.spellings import BINARY, DUNDERS, OTHER_NAMES, UNARY, spellings
from functrans.stack import STATE
from functrans.tensor import WrapperTensor, base, highest, lift
from functrans.torch_private import (
    CONJUGATE,
    NEGATIVE,
    OpOverload,
    autocast_enabled,
    mode_stack_size,
    pop_mode,
    push_mode,
    set_key_excluded,
    without_torch_function,
)

aten = torch.ops.aten


class Door(TorchDispatchMode):
    """Brings in the operators that have no wrapper among their arguments: factories, random ones, captured tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default wraps the handler against Dynamo, which costs more than the rest of the door.
        return False

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Every operator that code runs inside a transform enters here, once.

        Writes and views become pure operators (mutation.py); what was made inside belongs to the innermost transform.
        """
        # While a handler runs, PyTorch excludes every key above it: among them those that make conj() and .imag of base
        # tensors what they are. (Autograd's comes back in tensor.base.)
        set_key_excluded(CONJUGATE, False)
        set_key_excluded(NEGATIVE, False)
        try:
            known: Facts = op._functrans  # type: ignore[attr-defined]
        except AttributeError:
            known = facts(op)
        if kwargs:
            args, kwargs = normalized(op, args, kwargs)
        else:
            kwargs = {}
        if known.kind != PURE:
            return mutation.run(known, args, kwargs)
        top = STATE.top
        owner = top if known.random else highest(args, kwargs, known.tensor_lists)
        out = base(op, args, kwargs) if owner is None else owner.process(op, args, kwargs)
        if owner is not top:
            out = lift(out, owner, top)
        if type(out) is WrapperTensor:
            frame = sys._getframe(1)
            out.made_at = (frame.f_code, frame.f_lasti)
        return out

    def enter(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        """The door for operators that functrans itself starts."""
        return self.__torch_dispatch__(op, (), args, kwargs)


stack.DOOR = DOOR = Door()

# ---------------------------------------------------------------------------------------------------- the short way

#: By torch function or method: what takes its place, (*args) -> output or NotImplemented.
ENTRANCES: dict[Callable[..., Any], Callable[..., Any]] = {}


@classmethod  # type: ignore[misc]
def torch_function(
    cls: type, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """A torch function was called with a wrapper among its arguments."""
    entrance = ENTRANCES.get(func)
    if entrance is not None and not kwargs:
        out = entrance(*args)
        if out is not NotImplemented:
            return out
    return without_torch_function(func, types, args, kwargs or {})


WrapperTensor.__torch_function__ = torch_function  # type: ignore[method-assign, assignment]


def through(program: Program, args: tuple[Any, ...], x: WrapperTensor) -> Any:
    """Send ``program`` in; ``x`` is a wrapper among ``args``, the only one or of no lower level than the others."""
    top, owner = STATE.top, x.interpreter
    if owner.process_program is None:
        return NotImplemented
    pop_mode(None)  # as PyTorch does while a handler runs
    try:
        out = owner.process_program(program, args)
    finally:
        push_mode(DOOR)
    if owner is not top:
        out = lift(out, owner, top)
    frame = sys._getframe(3)
    out.made_at = (frame.f_code, frame.f_lasti)
    return out


def unary(op: OpOverload) -> Callable[..., Any]:
    """The entrance of a function of one tensor."""
    program: Program | None = None

    def entrance(x: Any, *more: Any) -> Any:
        nonlocal program
        if more or type(x) is not WrapperTensor or x.dtype not in REAL or mode_stack_size() != STATE.door_depth or autocast_enabled():
            return NotImplemented
        if program is None:
            program = operator_program(op)
            if program is None:
                return NotImplemented
        if x.view_link is not None:
            x.view_link.refresh(x)
        if not x.interpreter.alive:
            raise DeadWrapperError(x)
        return through(program, (x,), x)

    def forget() -> None:
        nonlocal program
        program = None

    programs.FORGET.append(forget)
    return entrance


def binary(find: Callable[[bool], Program | None], *, reflected: bool = False) -> Callable[..., Any]:
    """The entrance of a function of two operands; ``find(is_tensor)`` is its program, by what the second one is.

    ``reflected``: of two tensors the second comes first, as in ``x.__rsub__(y)``; with a number the program sees to that.
    """
    found: dict[bool, Program | None] = {}

    def entrance(x: Any, y: Any, *more: Any) -> Any:
        if more or mode_stack_size() != STATE.door_depth or autocast_enabled():
            return NotImplemented
        kind = type(y)
        tensor = kind is not float and kind is not int
        if tensor and reflected:
            x, y, kind = y, x, type(x)
        if type(x) is WrapperTensor:
            if x.dtype not in REAL:
                return NotImplemented
            w = x
            if x.view_link is not None:
                x.view_link.refresh(x)
            if kind is WrapperTensor:
                if y.dtype is not x.dtype:
                    return NotImplemented
                if y.view_link is not None:
                    y.view_link.refresh(y)
                if y.interpreter is not x.interpreter:
                    if not x.interpreter.alive:
                        raise DeadWrapperError(x)
                    if not y.interpreter.alive or y.interpreter.level > x.interpreter.level:
                        w = y
            elif tensor and (kind is not Tensor or y.dtype is not x.dtype):
                return NotImplemented
        elif type(x) is Tensor and kind is WrapperTensor and x.dtype in REAL and y.dtype is x.dtype:
            w = y
            if y.view_link is not None:
                y.view_link.refresh(y)
        else:
            return NotImplemented
        if not w.interpreter.alive:
            raise DeadWrapperError(w)
        try:
            program = found[tensor]
        except KeyError:
            program = found[tensor] = find(tensor)
        return NotImplemented if program is None else through(program, (x, y), w)

    programs.FORGET.append(found.clear)
    return entrance


def named(name: str) -> Callable[[bool], Program | None]:
    return lambda tensor: operator_program(BINARY[name]["TT" if tensor else "Tn"])


def power(x: Any, exponent: Any, *more: Any) -> Any:
    """``x ** exponent``, whose program depends on the number that the exponent is."""
    if type(exponent) is not int and type(exponent) is not float:
        return NotImplemented
    if more or type(x) is not WrapperTensor or x.dtype not in REAL or mode_stack_size() != STATE.door_depth or autocast_enabled():
        return NotImplemented
    program = operator_program(aten.pow.Tensor_Scalar, exponent)
    if program is None:
        return NotImplemented
    if x.view_link is not None:
        x.view_link.refresh(x)
    if not x.interpreter.alive:
        raise DeadWrapperError(x)
    return through(program, (x,), x)


def method(function: Callable[..., Any], entrance: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the wrapper that takes the place of the tensor's method ``function``."""

    @functools.wraps(function)
    def short(*args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            out = entrance(*args)
            if out is not NotImplemented:
                return out
        return without_torch_function(function, (), args, kwargs)

    return short


def set_up() -> None:
    """Fill ``ENTRANCES``, and give the wrapper its methods."""
    by_name: dict[str, Callable[..., Any]] = {name: unary(getattr(aten, name).default) for name in UNARY}
    by_name |= {name: binary(named(name)) for name in BINARY if name != "pow"}
    by_name["pow"] = power
    for function, name in spellings().items():
        if name in by_name:
            ENTRANCES[function] = by_name[name]
    for name in (*DUNDERS, *by_name, *OTHER_NAMES):
        function = getattr(Tensor, name, None)
        if function in ENTRANCES:
            setattr(WrapperTensor, name, method(function, ENTRANCES[function]))
    minus, over = BINARY["sub"]["TT"], BINARY["div"]["TT"]
    by_number = {
        "__rsub__": (lambda tensor: operator_program(minus if tensor else BINARY["rsub"]["Tn"])),
        "__rtruediv__": (lambda tensor: operator_program(over) if tensor else traced(lambda x, y: x.reciprocal() * y, 2)),
    }
    for name, find in by_number.items():
        setattr(WrapperTensor, name, method(getattr(Tensor, name), binary(find, reflected=True)))


set_up()
