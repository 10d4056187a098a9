"""Programs on the interpreter stack: what core/dispatch.py does with operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

from functrans.core.dispatch import base, dispatch, in_outer_modes, modes_differ
from functrans.core.errors import DeadWrapperError
from functrans.core.rules import SCOPES, scope_here
from functrans.core.stack import Interpreter
from functrans.core.tensor import PendingWrapper, WrapperTensor, tensor_of
from functrans.core.thread_state import STATE, door_closed
from functrans.core.torch_private import (
    DisableTorchFunction,
    function_mode_enabled,
    mode_stack_size,
    pop_mode,
    push_mode,
)
from functrans.programs.program import Program


def run(program: Program, args: Sequence[Any]) -> Any:
    """Send ``program`` to the highest level among ``args``, or run it at the base; what lowering.dispatch does with an operator."""
    if SCOPES and program.scope is not scope_here():  # recorded where other rules hold
        return program.step_by_step(args, dispatch)
    owner: Interpreter | None = None
    plain = True
    for a in args:
        kind = type(a)
        if kind is WrapperTensor or kind is PendingWrapper:
            if a.view_link is not None:
                a.view_link.refresh(a)
            i = a.interpreter
            if i is not owner:
                if not i.alive:
                    raise DeadWrapperError(a)
                if owner is None or i.level > owner.level:
                    owner = i
        elif kind is Tensor:
            if a.requires_grad:
                plain = False
        elif kind is not float and kind is not int:
            plain = False
    if owner is not None:
        process = owner.process_program
        if process is None:
            return program.step_by_step(args, dispatch)
        return process(program, args, True)
    if not plain or forward_ad._current_level >= 0:
        return program.step_by_step(args, base)
    return program.run(*args)


def constants(interpreter: Interpreter, program: Program, outs: Any) -> Any:
    """A program's outputs from one level down as constants of ``interpreter``."""
    if program.single:
        return interpreter.constant(tensor_of(outs))
    return [interpreter.constant(tensor_of(o)) for o in outs]


def start(program: Program, args: Sequence[Any]) -> Any:
    """Run ``program`` from code that runs at a level, where the door is open."""
    depth = STATE.door_depth
    if function_mode_enabled():
        with DisableTorchFunction():
            return start(program, args)
    modes = mode_stack_size()
    if modes < depth or depth == 0:
        return run(program, args)
    if modes > depth:
        with door_closed():
            return run(program, args)
    door = None
    try:
        door = pop_mode(None)
        return run(program, args)
    finally:
        if door is not None:
            push_mode(door)


def lower_program(interpreter: Interpreter, program: Program, args: Sequence[Any]) -> Any:
    """Run ``program`` one level below ``interpreter``; what lowering.lower does with an operator."""
    if interpreter.on_base:
        for a in args:
            kind = type(a)
            if kind is Tensor:
                if a.requires_grad:
                    break
            elif kind is not float and kind is not int:
                break
        else:
            if forward_ad._current_level < 0:
                return program.run(*args)
        return program.step_by_step(args, base)
    if not interpreter.outer_modes_on and modes_differ(interpreter):
        return in_outer_modes(interpreter, lower_program, program, args)
    return run(program, args)
