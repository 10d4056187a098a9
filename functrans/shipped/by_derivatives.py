"""Transforms whose rules follow from the derivative table, for every operator that their own table does not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.autograd.function import Function

from functrans.core.dispatch import map_tensors
from functrans.core.operators import op_info
from functrans.core.tensor import WrapperTensor
from functrans.core.thread_state import lowered
from functrans.core.torch_private import OpOverload
from functrans.derivatives.table import DERIVATIVES
from functrans.door.autograd_function import FUNCTION_RULES
from functrans.extension.table_interpreter import TableInterpreter
from functrans.interpreters.jvp.interpreter import TableMethod


class DerivativeRule:
    """The rule of an operator that the derivative table has; a subclass is called as rules are."""

    def __init__(self, method: TableMethod) -> None:
        self.method = method
        self.entry = method.entry
        self.op = method.entry.op

    def __call__(self, interpreter: Any, /, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class DerivativeInterpreter(TableInterpreter):
    """A transform that has, beside its table, a kind of rule for whatever the derivative table has."""

    differentiates = True
    rule_kind: ClassVar[type[DerivativeRule]]
    #: the rules of that kind that were made, by operator
    made: ClassVar[dict[OpOverload, DerivativeRule]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.made = {}
        FUNCTION_RULES[cls] = function_rule

    def rule_for(self, op: Any) -> Callable[..., Any] | None:
        rule = self.rules.get(op)
        if rule is not None:
            return rule
        entry = DERIVATIVES.get(op) if isinstance(op, OpOverload) else None
        if entry is None or entry.tangent is None:
            return None
        known = self.made.get(op)
        if known is None or known.entry is not entry:
            known = self.made[op] = self.rule_kind(TableMethod(entry, op_info(op)))
        return known


def function_rule(interpreter: DerivativeInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """An autograd.Function: its own ``jvp``, which the table's policy differentiates as it does that of an operator."""
    given = [interpreter.own(a) if isinstance(a, Tensor) else a for a in args]
    if all(interpreter.is_constant(a) for a in given if interpreter.owns(a)):
        with lowered(interpreter):
            return map_tensors(interpreter.constant, cls.apply(*map(value_of, given)))
    return interpreter.without_rule(interpreter, cls.apply, given, {})


def value_of(a: Any) -> Any:
    """An argument one level down."""
    if isinstance(a, WrapperTensor):
        return a.value
    return [value_of(v) for v in a] if type(a) in (list, tuple) else a
