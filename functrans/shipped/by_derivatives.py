"""Transforms whose rules follow from the derivative table, for every operator that their own table does not have.

Pointwise code comes as programs (functrans.programs), which such a transform turns into programs of its own and sends
down whole; an operator that the door sends in by itself is made a program here. What that cannot be done with has a
``DerivativeRule``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import Function

from functrans.core.dispatch import lower, map_tensors, sending
from functrans.core.tensor import WrapperTensor
from functrans.decompositions.table import decompose
from functrans.derivatives.table import DERIVATIVES, NO_TANGENT
from functrans.door.autograd_function import FUNCTION_RULES
from functrans.extension.table_interpreter import TableInterpreter
from functrans.interpreters.jvp.interpreter import TableMethod
from functrans.operators.info import op_info
from functrans.operators.rules import RuleCache
from functrans.programs.deriving import slice_out
from functrans.programs.fusible import REAL, fusible, own_derivatives
from functrans.programs.program import Program, Value
from functrans.programs.tracing import Builder, Untraceable
from functrans.pytorch.thread_state import lowered, running_at
from functrans.pytorch.torch_private import OpOverload
from functrans.shipped import series_formulas  # noqa: F401 - it adds formulas
from functrans.shipped.power_series import DEFINITIONS, FORMULAS, RECURRENCES, TRACEABLE

aten = torch.ops.aten


class DerivativeRule:
    """The rule of an operator that the derivative table has.

    It is called with what ``process`` gets, in the state of a handler: it sends operators down by ``lower``.
    """

    def __init__(self, method: TableMethod) -> None:
        self.method = method
        self.entry = method.entry
        self.op = method.entry.op

    def __call__(self, interpreter: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class DerivativeInterpreter(TableInterpreter):
    """A transform that has, beside its table, a kind of rule for whatever the derivative table has."""

    differentiates = True
    rule_kind: ClassVar[type[DerivativeRule]]
    #: the rules of that kind that were made, by operator
    made: ClassVar[dict[OpOverload, DerivativeRule]]
    #: rules by hand that are called as these are: ``rule(interpreter, args, kwargs)``, in the state of a handler
    direct: ClassVar[dict[OpOverload, Callable[..., Any]]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.made, cls.direct = {}, {}
        cls.derives = True
        FUNCTION_RULES[cls] = function_rule

    def run_program(self, program: Program, args: Sequence[Any], whole: bool = True) -> Any:
        """What the transform makes of a program; NotImplemented: it is to be run operator by operator.

        ``whole``: what is sent down is sent as a program; else, since the tensors are not such as programs take, in
        pieces.
        """
        return NotImplemented

    def sender(self, whole: bool) -> Callable[..., Any]:
        """``lower`` for programs, which are sent down in pieces unless ``whole``."""

        def send(program: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return lower(self, program, args, kwargs)

        def send_pieces(program: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return program.decompose(*args, send=send)

        return send if whole else send_pieces

    def is_ruled(self, program: Program) -> bool:
        """Whether an operator of a program has a rule in the transform's own table."""
        return any(self.rules.get(instruction.op) is not None for instruction in program.instructions)

    def process(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op._functrans.program:
            out = NotImplemented if self.is_ruled(op) else self.run_program(op, args)
            return op.decompose(*args, send=sending(self.watcher)) if out is NotImplemented else out
        if self.rules.get(op) is None:
            if not kwargs and (found := as_program(op, args)) is not None:
                out = self.run_program(*found)
                if out is not NotImplemented:
                    return out
            rule = self.by_hand(op) or self.rule_for(op)
            if rule is not None and (any(map(self.carries, args)) or any(map(self.carries, kwargs.values()))):
                return rule(self, args, kwargs)
        return super().process(op, args, kwargs)

    def model(self, args: Sequence[Any]) -> WrapperTensor | None:
        """The argument of a program that shows what its results will show, if they are contiguous and of its shape."""
        first: Any = None
        for a in args:
            kind = type(a)
            if kind is WrapperTensor and a.interpreter is self and a.strides is None:
                if first is None:
                    first = a
                elif a.shape != first.shape:
                    return None
            elif kind is not float and kind is not int:
                return None
        return first

    def as_wide(self, x: Tensor, out: Tensor, front: int = 0) -> Tensor:
        """What belongs to ``out`` with its shape, behind ``front`` dimensions, and its dtype."""
        extra = len(x.shape) - front - len(out.shape)
        if extra > 0:  # other results of the program have more dimensions
            x = lower(self, aten.reshape.default, (x, [*x.shape[:front], *x.shape[front + extra :]]), {})
        shape = (*x.shape[:front], *out.shape)
        if tuple(x.shape) != shape:
            x = lower(self, aten.expand.default, (x, list(shape)), {})
        return x if x.dtype is out.dtype else lower(self, aten._to_copy.default, (x,), {"dtype": out.dtype})

    def carries(self, a: Any) -> bool:
        """Whether an argument, or one of a list, is no constant."""
        if type(a) is WrapperTensor:
            return a.interpreter is self and not self.is_constant(a)
        return type(a) in (list, tuple) and any(map(self.carries, a))

    def by_hand(self, op: Any) -> Callable[..., Any] | None:
        """The rule by hand that is called as those of ``rule_kind`` are.

        It stands for the derivative that the library has. Where somebody has given an operator another one, that holds,
        of this operator or of those that the rule is made of.
        """
        rule = self.direct.get(op)
        return rule if rule is not None and own_derivatives() else None

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


# --- operators as plain code ------------------------------------------------------------------------------------------


def code_at_level(
    cls: type[DerivativeInterpreter], *ops: OpOverload
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register operators that are to be run as plain ``torch`` code at the level, which gets the operator and its
    arguments; NotImplemented: as if there were no such code."""

    def register(code: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            cls.direct[op] = functools.partial(run_code, code, op)
        return code

    return register


def run_code(
    code: Callable[..., Any], op: OpOverload, level: DerivativeInterpreter, args: Any, kwargs: dict[str, Any]
) -> Any:
    with running_at(level):
        out = code(op, *args, **kwargs)
        if out is not NotImplemented:
            return map_tensors(level.own, out)
    rule = level.rule_for(op)
    if rule is not None:
        return rule(level, args, kwargs)
    if op_info(op).composite:
        return decompose(level, op, args, kwargs)
    return level.without_rule(level, op, args, kwargs)


# --- operators as programs --------------------------------------------------------------------------------------------

#: Operators whose numbers a program takes as inputs. Those of others are part of it.
OF_ANY_NUMBER = frozenset((aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.div.Tensor))
#: Operators whose formulas are right for complex numbers as they are for real ones: they are holomorphic, and so are
#: the operators in their formulas.
HOLOMORPHIC = OF_ANY_NUMBER | {
    getattr(aten, name).default
    for name in ("neg", "exp", "expm1", "sin", "cos", "sinh", "cosh", "log", "sqrt", "reciprocal")
} | {aten.square.default}  # fmt: skip
#: Operators of which power series are known.
KNOWN = TRACEABLE.union(RECURRENCES, DEFINITIONS, FORMULAS)
SINGLE = RuleCache()
#: The most programs that are kept; an exponent may be another one in every call.
MOST = 2000


def as_program(op: OpOverload, args: Sequence[Any]) -> tuple[Program, Sequence[Any], bool] | None:
    """A pointwise operator as a program, the program's arguments, and whether it may be sent down whole."""
    if op not in KNOWN or not fusible(op) or DERIVATIVES.get(op).tangent == NO_TANGENT:  # type: ignore[union-attr]
        return None
    dtypes = {a.dtype for a in args if isinstance(a, Tensor)}
    if any(dtype.is_complex for dtype in dtypes) and op not in HOLOMORPHIC:
        return None
    if op in OF_ANY_NUMBER and len(args) == 2:
        baked: tuple[Any, ...] = (None, None)
        inputs = args
    else:
        baked = tuple([None if isinstance(a, Tensor) else (type(a), a) for a in args])
        inputs = [a for a in args if isinstance(a, Tensor)]
        if len(SINGLE.entries) > MOST and (op, baked) not in SINGLE.entries:
            return None
    program = SINGLE.find((op, baked), of_operator, op, baked)
    whole = len(dtypes) == 1 and dtypes <= REAL and not any(type(a) is complex for a in args)
    return None if program is None else (program, inputs, whole)


def of_operator(op: OpOverload, baked: Sequence[Any]) -> Program | None:
    count = baked.count(None)
    rest = iter(range(count))
    builder = Builder(count)
    try:
        value = builder.emit(op, [Value(next(rest)) if number is None else number[1] for number in baked])
        return slice_out(builder, [Value(i) for i in range(count)], [value])
    except Untraceable:
        return None


def function_rule(interpreter: DerivativeInterpreter, cls: type[Function], args: Sequence[Any]) -> Any:
    """An autograd.Function: its own ``jvp``, which the table's policy differentiates as it does that of an operator."""
    given = [interpreter.own(a) if isinstance(a, Tensor) else a for a in args]
    if not any(map(interpreter.carries, given)):
        with lowered(interpreter):
            return map_tensors(interpreter.constant, cls.apply(*map(interpreter.value_of, given)))
    return interpreter.without_rule(interpreter, cls.apply, given, {})
