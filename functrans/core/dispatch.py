"""How an operator gets from the door to an interpreter, and down the stack to plain PyTorch.

    y = torch.sin(x)                   x: a wrapper of level 2 around a wrapper of level 1 around plain data
      └ door                           make it pure                    (door/torch_function.py, functionalize/writes.py)
        └ dispatch                     highest level among the arguments: 2
          └ level 2 .process           its rule lowers: dispatch again, a Python call
            └ level 1 .process
              └ base                   plain PyTorch
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functrans.core import thread_state
from functrans.core.errors import DeadWrapperError
from functrans.core.operators import Facts, facts
from functrans.core.stack import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import STATE, lowered, pack_as_outside, same_hooks
from functrans.core.torch_private import (
    AUTOGRAD,
    VIEWS_AND_VERSIONS,
    ZERO_TENSOR,
    OpOverload,
    function_mode_enabled,
    is_forward_enabled,
    is_key_excluded,
    mode_stack_size,
    pop_mode,
    pop_packing,
    push_mode,
    set_forward_enabled,
    set_grad_enabled,
    set_key_excluded,
    top_packing,
)


def dispatch(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Send a pure ``op`` to the interpreter that has to interpret it.

    The order of look-up: a wrapper of a transform that ended is an error; without wrappers the base runs ``op``; else the
    highest-level interpreter among the arguments' wrappers processes it, by (1) its rule for ``op``, (2) the decomposition
    of a composite ``op``, whose pieces come through the same level again, (3) its declared policy for operators without
    a rule: grad and jvp borrow PyTorch's derivative (interpreters/autograd_fallback.py), vmap decomposes by ``torch._decomp`` and then loops
    over the examples with a warning, any other transform raises MissingRuleError. Nothing passes through in silence.
    """
    known: Facts = op._functrans if hasattr(op, "_functrans") else facts(op)
    owner: Interpreter | None = None
    recorded = False
    for a in args:
        kind = type(a)
        if kind is Tensor:
            recorded = recorded or a.requires_grad
        elif kind is WrapperTensor:
            if a.view_link is not None:
                a.view_link.refresh(a)
            i = a.interpreter
            if i is not owner:
                if not i.alive:
                    raise DeadWrapperError(a)
                if owner is None or i.level > owner.level:
                    owner = i
        elif kind not in WITHOUT_TENSORS and (known.tensor_lists or not isinstance(a, list | tuple)):
            return _dispatch_slowly(op, args, kwargs)
    if kwargs and any(type(a) not in WITHOUT_TENSORS for a in kwargs.values()):
        return _dispatch_slowly(op, args, kwargs)
    if owner is not None:
        return owner.process(op, args, kwargs)
    if recorded or forward_ad._current_level >= 0:
        return base_recorded(op, args, kwargs)
    if known.quick is not None and type(args[0]) is Tensor and not function_mode_enabled():
        return known.quick(*args, **kwargs)
    return op._op(*args, **kwargs)


#: Types of arguments that are no tensors and hold none.
WITHOUT_TENSORS = frozenset((int, float, bool, complex, type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format))


def _dispatch_slowly(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    owner = highest(args, kwargs, True)
    return base(op, args, kwargs) if owner is None else owner.process(op, args, kwargs)


def highest(args: Any, kwargs: dict[str, Any], lists: bool) -> Interpreter | None:
    """The interpreter of highest level among the wrappers in ``args``; brings views up to date on the way."""
    found: Interpreter | None = None
    for a in args:
        if type(a) is WrapperTensor:
            if a.view_link is not None:
                a.view_link.refresh(a)
            owner = a.interpreter
            if owner is not found:
                if not owner.alive:
                    raise DeadWrapperError(a)
                if found is None or owner.level > found.level:
                    found = owner
        elif lists and type(a) in (list, tuple):
            owner_in_list = highest(a, NO_KWARGS, False)
            if owner_in_list is not None and (found is None or owner_in_list.level > found.level):
                found = owner_in_list
    if kwargs:
        owner_in_list = highest(kwargs.values(), NO_KWARGS, True)
        if owner_in_list is not None and (found is None or owner_in_list.level > found.level):
            found = owner_in_list
    return found


NO_KWARGS: dict[str, Any] = {}


def base(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as plain PyTorch. Autograd's key comes back only where autograd has something to record."""
    for a in args:
        kind = type(a)
        if kind is Tensor:
            if a.requires_grad:
                return base_recorded(op, args, kwargs)
        elif kind not in WITHOUT_TENSORS and any_requires_grad((a,)):
            return base_recorded(op, args, kwargs)
    if forward_ad._current_level >= 0 or (kwargs and any_requires_grad(kwargs.values())):
        return base_recorded(op, args, kwargs)
    try:
        quick = op._functrans.quick  # type: ignore[attr-defined]
    except AttributeError:
        quick = facts(op).quick
    if quick is not None and type(args[0]) is Tensor and not function_mode_enabled():
        return quick(*args, **kwargs)
    return op._op(*args, **kwargs)


def base_recorded(op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` as plain PyTorch with all that PyTorch itself records."""
    excluded, views_excluded = is_key_excluded(AUTOGRAD), is_key_excluded(VIEWS_AND_VERSIONS)
    hooks = top_packing(True)
    try:
        set_key_excluded(AUTOGRAD, False)
        set_key_excluded(VIEWS_AND_VERSIONS, False)
        set_key_excluded(ZERO_TENSOR, False)
        if hooks is not None:
            pack_as_outside()
        return op(*args, **kwargs)
    finally:
        set_key_excluded(AUTOGRAD, excluded)
        set_key_excluded(VIEWS_AND_VERSIONS, views_excluded)
        while hooks is not None and not same_hooks(top_packing(True), hooks):
            pop_packing()


def any_requires_grad(args: Any) -> bool:
    for a in args:
        kind = type(a)
        if kind in WITHOUT_TENSORS:
            continue
        if kind is Tensor or isinstance(a, Tensor):
            if a.requires_grad:
                return True
        elif kind is list or kind is tuple:
            if any_requires_grad(a):
                return True
        elif kind is dict and any_requires_grad(a.values()):
            return True
    return False


def lower(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``op`` one level below ``interpreter``, on values of that level: a Python call, no trip through PyTorch."""
    if interpreter.on_base:
        return base(op, args, kwargs)
    if not interpreter.outer_modes_on and modes_differ(interpreter):
        return in_outer_modes(interpreter, lower, op, args, kwargs)
    try:
        random = op._functrans.random  # type: ignore[attr-defined]
    except AttributeError:
        random = facts(op).random
    below = interpreter.below
    if below is None:
        return base(op, args, kwargs)
    if random:  # every level decides whether its examples draw for themselves
        return below.process(op, args, kwargs)
    return dispatch(op, args, kwargs)


def modes_differ(interpreter: Interpreter) -> bool:
    """Whether a mode is on that was off when ``interpreter`` was entered; see NOTE [Grad mode per level]."""
    return (torch.is_grad_enabled() and not interpreter.outer_grad_mode) or (is_forward_enabled() and not interpreter.outer_forward_mode)


def in_outer_modes(interpreter: Interpreter, lowering: Callable[..., Any], *args: Any) -> Any:
    """``lowering(interpreter, *args)`` with what was off when ``interpreter`` was entered switched off."""
    grad, forward = torch.is_grad_enabled(), is_forward_enabled()
    try:
        set_grad_enabled(grad and interpreter.outer_grad_mode)
        set_forward_enabled(forward and interpreter.outer_forward_mode)
        return lowering(interpreter, *args)
    finally:
        set_grad_enabled(grad)
        set_forward_enabled(forward)


def call_below(interpreter: Interpreter, function: Any, args: Any, kwargs: dict[str, Any], inputs: Any = None) -> Any:
    """Call ``function``, plain ``torch`` code, one level down, from a handler.

    What ``lowered`` does, without what the state of a handler makes superfluous: autograd's key is excluded already, and
    at the base it has to come back only where something among ``inputs`` (None: ``args``) requires grad.
    """
    if not interpreter.outer_modes_on or forward_ad._current_level >= 0:
        with lowered(interpreter):
            return function(*args, **kwargs)
    top = STATE.top
    if interpreter.below is not None:
        views_excluded = is_key_excluded(VIEWS_AND_VERSIONS)
        try:
            STATE.top = interpreter.below
            set_key_excluded(VIEWS_AND_VERSIONS, True)
            push_mode(thread_state.DOOR)
            return function(*args, **kwargs)
        finally:
            if mode_stack_size() >= STATE.door_depth:
                pop_mode(None)
            set_key_excluded(VIEWS_AND_VERSIONS, views_excluded)
            STATE.top = top
    if any_requires_grad(args if inputs is None else inputs):
        with lowered(interpreter):
            return function(*args, **kwargs)
    try:
        STATE.top = None
        return function(*args, **kwargs)
    finally:
        STATE.top = top


def map_tensors(function: Any, out: Any) -> Any:
    """``function`` applied to every tensor of an operator's output; other values stay."""
    if isinstance(out, Tensor):
        return function(out)
    if isinstance(out, tuple | list):
        mapped = [map_tensors(function, o) for o in out]
        return mapped if type(out) is list else tuple(mapped)
    return out


def lift(out: Any, owner: Interpreter | None, top: Interpreter | None) -> Any:
    """Values made at ``owner``'s level (None: the base), as constants of every level up to ``top``."""
    if top is None or (owner is not None and owner.level >= top.level):
        return out
    between = []
    interpreter: Interpreter | None = top
    while interpreter is not None and interpreter is not owner:
        between.append(interpreter)
        interpreter = interpreter.below
    for interpreter in reversed(between):
        out = map_tensors(interpreter.constant, out)
    return out
