"""The extension points: what a new derivative, batching rule or transform is made of.

A derivative is an entry in a table (``derivative``), a batching rule a function (``batching_rule``). A new transform is
a subclass of ``TableInterpreter`` with a table of rules, or of ``Interpreter`` where its meaning for an operator is no
table. See docs/extending.md.
"""

from __future__ import annotations

import keyword
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from functrans.api.checks import check_kind
from functrans.api.extension_calls import (
    check_operator,
    decompose,
    lower,
    lowered,
    map_tensors,
    op_info,
    run_transformed,
    running_at,
    wrap,
)
from functrans.api.rule_results import check_below, check_carried, checked_result
from functrans.api.rule_scopes import overriding, rules_in_scope
from functrans.core.defaults import completed
from functrans.core.errors import (
    CallTypeError,
    CarriedValueError,
    CustomFunctionError,
    DerivativeEntryError,
    DuplicateRuleError,
    FunctransError,
    MissingRuleError,
    RuleError,
    RuleResultError,
)
from functrans.core.facades import bare
from functrans.core.interpreter import Interpreter
from functrans.core.rules import RuleTable, place_in
from functrans.core.schemas import schema_default
from functrans.core.stack import interpreter_stack
from functrans.core.tensor import WrapperTensor
from functrans.core.torch_private import OpOverload
from functrans.derivatives.constants import READS_NO_VALUES
from functrans.derivatives.table import DERIVATIVES, derivative, no_derivative
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo, batching_rule

__all__ = [
    "BATCHING_RULES",
    "DERIVATIVES",
    "BatchInfo",
    "CarriedValueError",
    "CustomFunctionError",
    "DerivativeEntryError",
    "DuplicateRuleError",
    "FunctransError",
    "Interpreter",
    "MissingRuleError",
    "RuleError",
    "RuleResultError",
    "RuleTable",
    "TableInterpreter",
    "WrapperTensor",
    "batching_rule",
    "decompose",
    "derivative",
    "interpreter_stack",
    "lower",
    "lowered",
    "map_tensors",
    "missing_rule",
    "no_derivative",
    "op_info",
    "overriding",
    "rules_in_scope",
    "run_transformed",
    "running_at",
    "wrap",
]

Rule = TypeVar("Rule")


class TableInterpreter(Interpreter):
    """A transform that is a table of rules.

    A subclass sets ``kind``, ``payload`` (the names of what a wrapper carries beside ``value``) and ``rules``. An
    operator none of whose arguments carries a payload runs one level down, and its result is a constant. For the others
    the order is: a rule, the decomposition of a composite operator, MissingRuleError. Nothing passes through in
    silence. (``ones_like`` and its kind read no values of their arguments; without a rule their result is a constant
    too.)

    A rule is called as ``rule(interpreter, *args, **kwargs)`` with the operator's arguments, in which every tensor is a
    wrapper of this interpreter: ``x.value`` is the value one level down, and ``x.<payload name>`` what it carries, None
    on a constant. It runs one level down, in plain ``torch``, and returns what ``interpreter.carry(value, name=...)``
    makes, for each output of the operator and of its shape; anything else is a RuleResultError.
    """

    #: The transform's rules; one table per transform.
    rules: ClassVar[RuleTable[Callable[..., Any]]]

    def carry(self, value: Tensor, **payload: Any) -> WrapperTensor:
        """A wrapper of this level around ``value``, with its payload; names left out are None.

        The value is a tensor of a level below, and so is every tensor in the payload, which may be any Python value.

        Raises:
            CarriedValueError: one of them belongs to this level, or to one further in.
        """
        if not isinstance(value, Tensor):
            raise CarriedValueError(
                self, "value", f"a {type(value).__name__}", "a tensor", "Numbers and the like are payload."
            )
        check_below(self, "value", value)
        for name, carried in payload.items():
            check_carried(self, name, carried)
        wrapper = wrap(self, bare(value))
        for name in self.payload:
            setattr(wrapper, name, payload.pop(name, None))
        if payload:
            raise CallTypeError(
                f"carry of {self.name}", f"a payload {sorted(payload)}", f"names of its payload, {self.payload}"
            )
        return wrapper

    def own(self, x: Tensor) -> WrapperTensor:
        """``x`` as a wrapper of this level: itself, or the constant that it is here."""
        if type(x) is WrapperTensor:
            if x.view_link is not None and x.interpreter.alive:
                x.view_link.refresh(x)
            if x.interpreter is self:
                return x
        return self.constant(x)

    def constant(self, value: Tensor) -> WrapperTensor:
        return self.carry(value)

    def describe(self, wrapper: WrapperTensor) -> str:
        return "constant" if self.is_constant(wrapper) else ""

    def parts(self, wrapper: WrapperTensor) -> dict[str, Any]:
        return {} if self.is_constant(wrapper) else {name: getattr(wrapper, name) for name in self.payload}

    def rule_place(self, op: Any) -> str | None:
        return place_in(op, self.rules)

    def process(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carrying = False

        def value(a: Any) -> Any:
            nonlocal carrying
            if type(a) is WrapperTensor and a.interpreter is self:
                carrying = carrying or not self.is_constant(a)
                return a.value
            return [value(v) for v in a] if type(a) in (list, tuple) else a

        values, kwarg_values = [value(a) for a in args], {k: value(a) for k, a in kwargs.items()}
        rule = self.rules.get(op)
        if not carrying or (rule is None and op in READS_NO_VALUES):
            return map_tensors(self.constant, lower(self, op, values, kwarg_values))
        if rule is None:
            if op_info(op).composite:
                return decompose(self, op, args, kwargs)
            raise missing_rule(self, op)

        def mine(a: Any) -> Any:
            if isinstance(a, Tensor):
                return self.own(a)
            return [mine(v) for v in a] if type(a) in (list, tuple) else a

        entered, entered_kwargs = [mine(a) for a in args], {k: mine(a) for k, a in kwargs.items()}
        with lowered(self):
            out = completed(rule, op, 1)(self, *entered, **entered_kwargs)
        return checked_result(self, op, out, entered, entered_kwargs)


def missing_rule(interpreter: TableInterpreter, op: OpOverload) -> MissingRuleError:
    """The error for an operator without a rule: names operator, transform, levels and file, with the lines to paste."""
    call = "missing_rule(interpreter, op)"
    check_kind(call, "interpreter", interpreter, TableInterpreter, "a TableInterpreter")
    check_operator(call, op)
    levels = ", ".join(f"{i.level} {i.name}" for i in reversed(interpreter_stack()))
    return MissingRuleError(
        op,
        interpreter,
        f"Levels: {levels}. Schema: {op._schema}\n"
        f"The rules of {interpreter.kind} stand in {rules_file(interpreter)}. Add there:\n\n"
        f"{rule_to_paste(type(interpreter), op)}",
    )


def rule_to_paste(cls: type[TableInterpreter], op: OpOverload) -> str:
    """A rule of ``op`` for the transform ``cls``, as Python with the body left out."""
    packet, _, overload = str(op).rpartition(".")
    named = f"getattr(torch.ops.{packet}, {overload!r})" if keyword.iskeyword(overload) else f"torch.ops.{op}"
    name = packet.rpartition(".")[2]
    payload = "".join(f", {name}=..." for name in cls.payload)
    return (
        f"@{cls.__name__}.rules.register({named})\n"
        f"def {name + '_' * keyword.iskeyword(name)}({', '.join(['interpreter', *parameters(op)])}):\n"
        f"    return interpreter.carry(...{payload})"
    )


def parameters(op: OpOverload) -> list[str]:
    """The operator's arguments as Python has them, with their defaults."""
    found, options = [], []
    for a in op._schema.arguments:
        reserved = keyword.iskeyword(a.name)
        name = a.name + "_" * (reserved or a.name == "interpreter")
        text = f"{name}={schema_default(a)!r}" if a.has_default_value() else name
        if not a.kwarg_only:
            found.append(text)
        elif not reserved:
            options.append(text)
    if any(a.kwarg_only and keyword.iskeyword(a.name) for a in op._schema.arguments):
        return [*found, *(["*", *options] if options else []), "**kwargs"]
    return [*found, "*", *options] if options else found


def rules_file(interpreter: TableInterpreter) -> str:
    """The file of the transform's newest rule; if it has none, that of its class."""
    places = [interpreter.rules.place(op) for op in interpreter.rules]
    if places:
        return places[-1].rpartition(":")[0]
    module = type(interpreter).__module__
    return getattr(sys.modules.get(module), "__file__", None) or f"module {module}"
