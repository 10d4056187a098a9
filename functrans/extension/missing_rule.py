"""The error for an operator that a transform by a table has no rule for, with the lines to paste."""

from __future__ import annotations

import keyword
import sys
from typing import TYPE_CHECKING, Any

from functrans.core.stack import interpreter_stack
from functrans.errors import MissingRuleError
from functrans.interpreters.failures import add_note
from functrans.operators.schemas import schema_default
from functrans.pytorch.torch_private import OpOverload

if TYPE_CHECKING:
    from functrans.core.interpreter import Interpreter
    from functrans.extension.table_interpreter import TableInterpreter


def missing_rule_error(interpreter: TableInterpreter, op: OpOverload) -> MissingRuleError:
    levels = ", ".join(f"{i.level} {i.name}" for i in reversed(levels_with(interpreter)))
    error = MissingRuleError(
        op,
        interpreter,
        f"Levels: {levels}. Schema: {op._schema}\n"
        f"The rules of {interpreter.kind} stand in {rules_file(interpreter)}. Add there:\n\n"
        f"{rule_to_paste(owner_of_rules(type(interpreter)), op)}",
    )
    if interpreter.rule_for(op) is not None:
        add_note(error, f"Its rule, registered at {interpreter.rule_place(op)}, returned NotImplemented for this call.")
    return error


def levels_with(interpreter: Interpreter) -> list[Interpreter]:
    """The interpreter stack, from ``interpreter`` on if code of a level below it runs."""
    levels = interpreter_stack()
    if interpreter in levels:
        return levels
    below: Any = interpreter
    levels = []
    while below is not None:
        levels.append(below)
        below = below.below
    return levels


def owner_of_rules(cls: type[TableInterpreter]) -> type[TableInterpreter]:
    """The class whose table it is: a subclass may carry more, of which the rules know nothing."""
    return next((c for c in cls.__mro__ if "rules" in vars(c)), cls)


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
