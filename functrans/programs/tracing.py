"""Formulas of the derivative table written down as instructions, by running them once on objects that stand for
tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from functrans.programs.fusible import fusible
from functrans.programs.program import Instruction, Value, key_of
from functrans.programs.torch_functions import OPERATORS, operator_of, spellings
from functrans.pytorch.torch_private import (
    EnableTorchFunction,
    OpOverload,
    function_mode_stack_size,
    pop_function_mode,
    push_function_mode,
)


class Untraceable(Exception):
    """A formula does something that a program cannot: look at a number, a shape, a dtype."""


class Builder:
    """Instructions being written down, no two of which are the same."""

    def __init__(self, inputs: int, instructions: Iterable[Instruction] = ()) -> None:
        self.inputs = inputs
        self.instructions = list(instructions)
        self.known = {key_of(*code): Value(inputs + i) for i, code in enumerate(self.instructions)}

    def emit(self, op: OpOverload, operands: Sequence[Any]) -> Value:
        if not fusible(op):
            raise Untraceable(op)
        plain = tuple(o.value if type(o) is Tracer else o for o in operands)
        key = key_of(op, plain)
        if key not in self.known:
            self.instructions.append(Instruction(op, plain))
            self.known[key] = Value(self.inputs + len(self.instructions) - 1)
        return self.known[key]

    def tracer(self, value: Value) -> Tracer:
        return Tracer(self, value)


class RealDtype:
    """The dtype of a traced value: all that a formula may ask it."""

    is_complex = False
    is_floating_point = True


class Tracer:
    """Stands for a tensor while a formula is traced; knows nothing but that it is real."""

    __slots__ = ("builder", "value")
    dtype = RealDtype()
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, builder: Builder, value: Value) -> None:
        self.builder = builder
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return Tensor  # formulas ask isinstance(x, Tensor) to tell tensors from numbers

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tracer:
        builder = next(a.builder for a in args if type(a) is Tracer)
        if kwargs:
            raise Untraceable(func)
        op = func if isinstance(func, OpOverload) else None
        if op is None and SPELLINGS.get(func) in OPERATORS:
            op = operator_of(SPELLINGS[func], args, lambda a: type(a) is Tracer)
        if op is None:
            raise Untraceable(func)
        return builder.tracer(builder.emit(op, args))

    def __getattr__(self, name: str) -> Any:
        method: Any = getattr(Tensor, name, None)
        if SPELLINGS.get(method, "") not in OPERATORS:
            raise Untraceable(name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def is_complex(self) -> bool:
        return False

    def __bool__(self) -> bool:
        raise Untraceable("bool")

    def __rtruediv__(self, other: Any) -> Any:
        return self.reciprocal() * other


def _dunder(name: str) -> Any:
    function = getattr(Tensor, name)
    return lambda self, *args: self.__torch_function__(function, (), (self, *args), None)


for _name in (
    "neg",
    "abs",
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "pow",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
):
    setattr(Tracer, f"__{_name}__", _dunder(f"__{_name}__"))

SPELLINGS = spellings()


@contextmanager
def tracing() -> Iterator[None]:
    """Context: torch functions see tracers, and nobody else sees the torch functions."""
    modes = [pop_function_mode() for _ in range(function_mode_stack_size())]
    try:
        with EnableTorchFunction():
            yield
    finally:
        for mode in reversed(modes):
            push_function_mode(mode)
