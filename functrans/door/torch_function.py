"""``__torch_function__``: where a call with a wrapper among its arguments comes before PyTorch has parsed it.

Frequent functions have an *entrance*, which takes their place on wrappers (door/entrances.py); all others go PyTorch's
own way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from functrans.boundary.facades import Facade
from functrans.boundary.leftovers import has_leftovers
from functrans.boundary.made_at import note_site, several
from functrans.core.tensor import WrapperTensor
from functrans.door.autocast import in_pieces
from functrans.door.lost_arguments import MENDED
from functrans.door.torch_dispatch import DOOR
from functrans.door.torch_func_inside import for_torch_func
from functrans.errors.call_sites import USER_FILES
from functrans.pytorch.thread_state import STATE, behind_autograd
from functrans.pytorch.torch_private import (
    AUTOGRAD,
    OpOverload,
    autocast_enabled,
    is_key_excluded,
    mode_stack_size,
    push_mode,
    tensor_torch_function,
    without_torch_function,
)
from functrans.tensors.subclasses import keeps_class

STRIDED = torch.strided

#: By torch function or method: what takes its place on wrappers. That of ``OpOverload`` is called with the operator,
#: the types of tensors, the arguments, and how many frames up that is.
ENTRANCES: dict[Callable[..., Any], Callable[..., Any]] = {}
#: Those functions among them that are called with tensors of other types beside wrappers.
OF_ANY_TYPES: set[Callable[..., Any]] = set()


@classmethod  # type: ignore[misc]
def torch_function(
    cls: type, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """A torch function was called with a wrapper among its arguments."""
    if type(func) is OpOverload:
        return otherwise(func, types, args, kwargs, 2) if kwargs else ENTRANCES[OpOverload](func, types, args, 2)
    entrance = ENTRANCES.get(func)
    if entrance is None or (len(types) > 1 and func not in OF_ANY_TYPES):
        return otherwise(func, types, args, kwargs or {}, 4 if type(func) is FunctionType else 2)  # 1 + frames_above
    return entrance(*args, **kwargs) if kwargs else entrance(*args)


WrapperTensor.__torch_function__ = torch_function  # type: ignore[method-assign, assignment]


def otherwise(function: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any], up: int) -> Any:
    """PyTorch's own way, on which other tensor subclasses among the arguments have their say first, as if wrappers had
    none.

    ``up``: how many frames up ``function`` was called.
    """
    if function in MENDED:
        function, kwargs = MENDED[function](function, kwargs)
    if STATE.foreign:
        args, kwargs = for_torch_func(function, args, kwargs)
    if STATE.top is None and not is_key_excluded(AUTOGRAD) and has_leftovers((*args, *kwargs.values())):
        with behind_autograd():
            return otherwise(function, types, args, kwargs, up + 1)
    if len(types) != 1 or types[0] is not WrapperTensor:
        given = types or {type(a): None for a in (*args, *kwargs.values())}
        others = [t for t in given if t not in ORDINARY and answers(t)]
        for t in others:
            out = t.__torch_function__(function, tuple(others), args, kwargs)
            if out is not NotImplemented:
                return out
    if autocast_enabled() and STATE.top is not None:
        out = in_pieces(without_torch_function, function, types, args, kwargs)
    else:
        out = without_torch_function(function, types, args, kwargs)
    kind = type(out)
    if kind is WrapperTensor:
        if args and out is args[0]:  # written
            return out
        if kwargs and kwargs.get("requires_grad"):
            out.requires_grad_()
        frame = sys._getframe(up)
        code = frame.f_code
        if code.co_filename in USER_FILES:
            out.made_at = (code, frame.f_lasti)
        else:
            note_site((out,), frame, up)
    elif several(out):
        note_site(out, sys._getframe(up), up)
    return out


def answers(kind: type) -> bool:
    """Whether a class has its say: one that answers operators only where it has more than ``Tensor``'s protocol."""
    if keeps_class(kind) or issubclass(kind, Facade):
        return True
    protocol = getattr(kind, "__torch_function__", without_torch_function)
    return protocol is not without_torch_function and getattr(protocol, "__func__", None) is not tensor_torch_function


#: Types that have no say in what a function does with them.
ORDINARY = frozenset((
    WrapperTensor, Tensor, torch.nn.Parameter, int, float, type(None), bool, str, list, tuple, torch.Size, torch.dtype,
    torch.device,
))  # fmt: skip


def reopen() -> None:
    """Put the door back on PyTorch's mode stack, unless it is there."""
    if mode_stack_size() < STATE.door_depth:
        push_mode(DOOR)
