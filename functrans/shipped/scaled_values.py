"""Arithmetic that is written down as instructions of a program (functrans.programs), as little of it as can be: numbers
among the factors are multiplied while it is written, zeros are not written at all, and nothing is written twice."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import torch

from functrans.programs.program import Value
from functrans.programs.tracing import Builder, Untraceable
from functrans.pytorch.torch_private import OpOverload

aten = torch.ops.aten

#: The most terms that are added one after the other. The Python code of a program is nested as deep as a sum is long.
LONG = 16


class Scaled(NamedTuple):
    """A number times a value of a program; without a value it is the number. Zero is None."""

    factor: Any
    value: Value | None


def scaled(factor: Any, value: Value | None = None) -> Scaled | None:
    """A whole factor is kept as a fraction, so that what is divided by it and multiplied again stays as it is."""
    if type(factor) is int:
        factor = Fraction(factor)
    return None if factor == 0 else Scaled(factor, value)


def plain_number(x: Any) -> Any:
    """A number as Python code has it."""
    if type(x) is not Fraction:
        return x
    return x.numerator if x.denominator == 1 else x.numerator / x.denominator


class Arithmetic:
    """What is computed of scaled values is written to a builder."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        #: the values of the program that are numbers
        self.numbers: set[Value] = set()

    def is_tensor(self, a: Any) -> bool:
        return type(a) is Value and a not in self.numbers

    def plain(self, a: Scaled | None) -> Any:
        """A value of the program, or a number."""
        if a is None:
            return 0
        if a.value is None:
            return plain_number(a.factor)
        if a.factor == 1:
            return a.value
        if a.value in self.numbers:
            raise Untraceable(aten.mul.Tensor)
        if a.factor != -1:
            return self.builder.emit(aten.mul.Tensor, (a.value, plain_number(a.factor)))
        if a.value >= self.builder.inputs:
            op, operands = self.builder.instructions[a.value - self.builder.inputs]
            if op is aten.sub.Tensor and all(map(self.is_tensor, operands)):
                return self.builder.emit(op, operands[::-1])
        return self.builder.emit(aten.neg.default, (a.value,))

    def plain_tensor(self, a: Scaled | None) -> Value | None:
        """A value of the program that is a tensor; None: zero."""
        if a is None:
            return None
        value = self.plain(a)
        if not self.is_tensor(value):
            raise Untraceable(value)
        return value

    # Torch functions take a number in the second place, and not two numbers.

    def commuting(self, op: OpOverload, x: Value, y: Value) -> Value:
        if x in self.numbers:
            x, y = y, x
        if x in self.numbers:
            raise Untraceable(op)
        return self.builder.emit(op, (x, y))

    def minus(self, x: Value, y: Value) -> Value:
        if x not in self.numbers:
            return self.builder.emit(aten.sub.Tensor, (x, y))
        if y in self.numbers:
            raise Untraceable(aten.sub.Tensor)
        return self.builder.emit(aten.rsub.Scalar, (y, x))

    def times(self, a: Scaled | None, b: Scaled | None) -> Scaled | None:
        if a is None or b is None:
            return None
        factor = a.factor * b.factor
        if a.value is None or b.value is None:
            return scaled(factor, b.value if a.value is None else a.value)
        return scaled(factor, self.commuting(aten.mul.Tensor, a.value, b.value))

    def over(self, a: Scaled | None, b: Scaled | None) -> Scaled | None:
        if a is None:
            return None
        if b is None:
            raise Untraceable(aten.div.Tensor)
        factor = a.factor if b.factor == 1 else a.factor * (1 / b.factor)
        if b.value is None:
            return scaled(factor, a.value)
        if a.value is None or a.value in self.numbers:
            if b.value in self.numbers:
                raise Untraceable(aten.div.Tensor)
            inverse = scaled(factor, self.builder.emit(aten.reciprocal.default, (b.value,)))
            return inverse if a.value is None else self.times(inverse, scaled(1, a.value))
        return scaled(factor, self.builder.emit(aten.div.Tensor, (a.value, b.value)))

    def total(self, *terms: Scaled | None, largest: bool = False) -> Scaled | None:
        """The sum. Terms of one factor are added before they are multiplied by it.

        One of the factors is left to the sum as a whole: 1 if it is among them, or else the first; or the ``largest``.
        """
        if len(terms) > LONG:
            parts = [self.total(*terms[i : i + LONG], largest=largest) for i in range(0, len(terms), LONG)]
            return self.total(*parts, largest=largest)
        number: Any = 0
        groups: dict[Any, Value] = {}
        for term in terms:
            if term is None:
                continue
            if term.value is None:
                number = number + term.factor
            elif term.factor in groups:
                groups[term.factor] = self.commuting(aten.add.Tensor, groups[term.factor], term.value)
            else:
                groups[term.factor] = term.value
        if not groups:
            return scaled(number)
        factor = max(groups, key=abs) if largest else 1 if 1 in groups else next(iter(groups))
        found = groups.pop(factor)
        for other, value in groups.items():
            if other == -factor:
                found = self.minus(found, value)
            else:
                rest = self.plain(scaled(other if factor == 1 else other * (1 / factor), value))
                found = self.commuting(aten.add.Tensor, found, rest)
        if not number:
            return scaled(factor, found)
        if found in self.numbers:
            raise Untraceable(aten.add.Tensor)
        if factor == -1:
            return scaled(1, self.builder.emit(aten.rsub.Scalar, (found, plain_number(number))))
        return scaled(factor, self.builder.emit(aten.add.Tensor, (found, plain_number(number * (1 / factor)))))
