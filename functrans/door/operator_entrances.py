"""The short way in of views, products, reductions and the like: each enters as the operator that it is.

When that way is open is said in door/program_entrances.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.made_at import SENT_ON, note_site, several
from functrans.core.dispatch import NO_KWARGS
from functrans.core.tensor import WrapperTensor
from functrans.door.torch_dispatch import DOOR, handle
from functrans.door.torch_function import STRIDED, otherwise, reopen
from functrans.errors import DeadWrapperError
from functrans.errors.call_sites import USER_FILES
from functrans.interpreters.failures import explain
from functrans.operators.info import OpInfo, op_info
from functrans.programs.torch_functions import DIRECT
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

#: Letters for the kinds of arguments in ``torch_functions.DIRECT``.
KINDS = {WrapperTensor: "T", Tensor: "T", torch.nn.Parameter: "T", int: "i", float: "f", type(None): "N"}
LISTS = (list, tuple)


def direct(
    function: Callable[..., Any], patterns: dict[str, OpOverload], up: int, *, dim_by_name: bool = False
) -> Callable[..., Any]:
    """What takes the place of ``function``, whose operator is found in ``patterns`` by the kinds of the arguments.

    ``dim_by_name``: its second one may be given as ``dim=``.
    """
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
        if dim_by_name and len(kwargs) == len(args) == 1 and type(kwargs.get("dim")) is int:
            args, kwargs = (*args, kwargs["dim"]), {}
        if not (closed or kwargs or is_torch_func_active()):
            types = (*map(type, args),)
            known, listed = found.get(types) or meant(types)
            top = STATE.top
            if known is not None and args[0].layout is STRIDED and top is not None and not top.carries_autograd:
                out = handled(known, (args[0], list(args[1:])) if listed else args, above)
                if out is not LEFTOVER:
                    return out
        return otherwise(function, (), args, kwargs, above)

    return entrance


#: what ``handled`` returns where a transform that has ended left an argument: PyTorch's way knows what to do with it
LEFTOVER: Any = object()


def handled(known: OpInfo, args: tuple[Any, ...], above: int) -> Any:
    """Handle an operator that is called ``above`` frames up, as the door would."""
    try:
        pop_mode(None)
        out = handle(known.op, known, args, NO_KWARGS)
    except BaseException as error:
        reopen()
        if type(error) is DeadWrapperError:
            return LEFTOVER
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
                if out is not LEFTOVER:
                    return out
        return otherwise(function, (), args, kwargs, above)

    return entrance


def is_strided(x: Any) -> bool:
    """Whether ``x`` is an ordinary tensor."""
    return KINDS.get(type(x)) == "T" and x.layout is STRIDED


def indexed(function: Callable[..., Any], up: int) -> Callable[..., Any]:
    """What takes the place of ``x[index]``, which selects where the index is a number that is in range."""
    select = direct(Tensor.select, DIRECT["select"], up + 1)

    def entrance(x: Any, index: Any) -> Any:
        if type(index) is int and type(x) is WrapperTensor and x.shape and not function_mode_enabled():
            size = x.shape[0]
            if type(size) is int and -size <= index < size:
                return select(x, 0, index)
        return otherwise(function, (), (x, index), {}, up + 1)

    return entrance
