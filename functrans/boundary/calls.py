"""Calls from one level to another that are no operator on its way down: of code at a level, and of a rule's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.autograd import forward_ad

from functrans.core.dispatch import base, dispatch, entered, map_tensors, scan
from functrans.core.interpreter import Interpreter
from functrans.operators.info import Operator
from functrans.pytorch import thread_state
from functrans.pytorch.thread_state import STATE, door_closed, lowered
from functrans.pytorch.torch_private import (
    VIEWS_AND_VERSIONS,
    DisableTorchFunction,
    OpOverload,
    function_mode_enabled,
    is_key_excluded,
    mode_stack_size,
    pop_mode,
    push_mode,
    set_key_excluded,
)


def start(op: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Dispatch ``op`` from code that runs at a level, where the door is open."""
    top = STATE.top
    if top is not None and top.within is not None:
        args, kwargs = entered(top, args, kwargs)
    if function_mode_enabled():
        with DisableTorchFunction():
            return start(op, args, kwargs)
    if top is None:
        return base(op, args, kwargs)
    watcher, depth, modes = top.watcher, STATE.door_depth, mode_stack_size()
    if modes < depth:
        return dispatch(op, args, kwargs, watcher)
    if modes > depth:
        with door_closed():
            return dispatch(op, args, kwargs, watcher)
    door = None
    try:
        door = pop_mode(None)
        return dispatch(op, args, kwargs, watcher)
    finally:
        if door is not None:
            push_mode(door)


def run(op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    """``op(*args, **kwargs)`` of a pure operator, as formulas write it, with the arguments in the schema's order: a
    Python call, where PyTorch's trip from an operator to the door takes longer than all else."""
    if mode_stack_size() > STATE.door_depth or function_mode_enabled():
        return op(*args, **kwargs)  # a mode of the user's is to see it
    return start(op, args, kwargs)  # type: ignore[arg-type]


def through_door(function: Callable[..., Any], *args: Any) -> Any:
    """Call ``function``, plain ``torch`` code of a level, where a walk back may have taken the door off.

    Without the door, modes of the user's would be asked about wrappers.
    """
    if STATE.top is None or mode_stack_size() >= STATE.door_depth:
        return function(*args)
    try:
        push_mode(thread_state.DOOR)
        return function(*args)
    finally:
        if mode_stack_size() >= STATE.door_depth:
            pop_mode(None)


def call_below(interpreter: Interpreter, function: Any, args: Any, kwargs: dict[str, Any], inputs: Any = None) -> Any:
    """Call ``function``, plain ``torch`` code, one level down, from a handler.

    What ``lowered`` does, without what the state of a handler makes superfluous: autograd's key is excluded already,
    and at the base it has to come back only where something among ``inputs`` (None: ``args``) requires grad.
    """
    if not interpreter.lowers_plainly or forward_ad._current_level >= 0:
        with lowered(interpreter):
            return function(*args, **kwargs)
    top = STATE.top
    if not interpreter.on_base:
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
    if scan(args if inputs is None else inputs)[1]:
        with lowered(interpreter):
            return function(*args, **kwargs)
    try:
        STATE.top = interpreter.below
        return function(*args, **kwargs)
    finally:
        STATE.top = top


def lift(out: Any, owner: Interpreter | None, top: Interpreter | None) -> Any:
    """Values made at ``owner``'s level (None: the base), as constants of every level up to ``top``."""
    if top is None or (owner is not None and owner.level >= top.level):
        return out
    return map_tensors(top.constant, lift(out, owner, top.below))
