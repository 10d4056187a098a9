"""Operators, and functions made of them, as programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from functrans.operators.rules import RuleCache
from functrans.operators.scopes import SCOPES
from functrans.programs.deriving import pullback, slice_out, tangent
from functrans.programs.program import Program, Value
from functrans.programs.tracing import Builder, Untraceable, tracing
from functrans.pytorch.torch_private import OpOverload

PROGRAMS = RuleCache()


def operator_program(op: OpOverload, *numbers: Any) -> Program | None:
    """The program of one operator whose last operands are ``numbers``; None if its derivatives cannot be written as
    programs."""
    key = op, as_key(numbers)
    if not SCOPES:
        try:
            return PROGRAMS.entries[key]
        except KeyError:
            pass
    return PROGRAMS.find(key, program_or_none, probe, op, numbers)


def as_key(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """The numbers in a dictionary, where 0.0 and -0.0 are equal and make different programs."""
    return numbers if 0 not in numbers else (*map(repr, numbers),)


def traced_program(function: Callable[..., Any], inputs: int) -> Program | None:
    """A pointwise function as a program; None if it cannot be written as one."""
    return PROGRAMS.find(function, program_or_none, traced, function, inputs)


def program_or_none(make: Callable[..., Program], *args: Any) -> Program | None:
    try:
        return make(*args)
    except Untraceable:
        return None


def traced(function: Callable[..., Any], inputs: int) -> Program:
    """A pointwise function of real tensors as a program."""
    builder = Builder(inputs)
    values = [Value(i) for i in range(inputs)]
    with tracing():
        result = function(*map(builder.tracer, values))
    return slice_out(builder, values, [result.value])


def probe(op: OpOverload, numbers: tuple[Any, ...]) -> Program:
    """The program of ``op``, after its first and second derivatives have been derived for a test."""
    positional = [a for a in op._schema.arguments if not a.kwarg_only]
    arguments = [a for a in positional if not a.has_default_value() or "Tensor" in str(a.type)]
    if numbers:  # which stand behind the tensors
        arguments = positional[: sum("Tensor" in str(a.type) for a in positional) + len(numbers)]
    inputs = len(arguments) - len(numbers)
    builder = Builder(inputs)
    value = builder.emit(op, (*(Value(i) for i in range(inputs)), *numbers))
    program = slice_out(builder, [Value(i) for i in range(inputs)], [value])
    tensors = [i for i, a in enumerate(arguments[:inputs]) if "Tensor" in str(a.type)]
    for count in range(1, len(tensors) + 1):
        for moving in itertools.combinations(tensors, count):
            tangent(program, moving)
            back = pullback(program, moving).pull((0,)).program
            if back.outputs:
                tangent(back, tuple(range(back.inputs)))
    return program
