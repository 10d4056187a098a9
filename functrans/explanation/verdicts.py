"""What took an operator at a level, told from what happened inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import PendingWrapper, WrapperTensor
from functrans.decompositions.table import decomposition
from functrans.errors.call_sites import definition
from functrans.explanation.events import Event
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.nodes import BackwardNode, BorrowedNode, ProgramNode
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.operators.info import op_info
from functrans.operators.rules import RuleCache
from functrans.pytorch.torch_private import DECOMPOSITION_TABLE, OpOverload
from functrans.tensors.described import is_wrapper

RULE, PROGRAM, ENTRY = "rule", "program", "derivative entry"
DECOMPOSED, BORROWED, LOOPED, CONSTANT, PASSED = "decomposed", "borrowed", "looped", "constant", "passed on"
#: The ways in which a level can take an operator, and what they mean.
WAYS = {
    RULE: "by the rule that the transform has for it",
    PROGRAM: "pointwise code, taken whole",
    ENTRY: "by the entry of the derivative table",
    DECOMPOSED: "taken apart; the pieces come through the same level",
    BORROWED: "by PyTorch's own derivative",
    LOOPED: "once per example, since there is neither a rule nor a decomposition",
    CONSTANT: "nothing among the arguments carries anything at this level",
    PASSED: "looked at, and sent down as it is",
}


def judge(event: Event, interpreter: Interpreter, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Note on ``event``, in which ``interpreter`` was asked about ``op``, what took it and where that is written."""
    event.way, event.place = verdict(event, interpreter, op, args, kwargs)


def verdict(
    event: Event, interpreter: Interpreter, op: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[str, str | None]:
    if event.way:
        return event.way, event.place
    differentiates = isinstance(interpreter, DIFFERENTIATE)
    borrowed = False
    for inside in event.children:
        if inside.level is not None and inside.kind != "check":
            if inside.level is event.level and inside.kind == "operator":
                return DECOMPOSED, definition_of(op, differentiates)
            borrowed = borrowed or (differentiates and is_borrowing(inside, interpreter))
    if borrowed:
        return BORROWED, None
    if interpreter.carries_autograd or (interpreter.sees_everything and not interpreter.payload):
        return PASSED, None
    known = op_info(op)
    if not (carries(interpreter, args) or known.random or (kwargs and carries(interpreter, [*kwargs.values()]))):
        return CONSTANT, None
    place = rule_place(interpreter, op)
    if known.program:
        return PROGRAM, place
    if differentiates and event.record is None and isinstance(interpreter, GradInterpreter) and place is None:
        return CONSTANT, None  # under no_grad
    return ENTRY if differentiates else RULE, place


DIFFERENTIATE = (GradInterpreter, JvpInterpreter)
#: Where grad, jvp and vmap have their rules for an operator: their tables say when that is to be found anew.
PLACES = RuleCache()
IN_TABLES = frozenset(cls.rule_place for cls in (GradInterpreter, JvpInterpreter, VmapInterpreter))


def rule_place(interpreter: Interpreter, op: Any) -> str | None:
    method: Any = interpreter.rule_place
    if method.__func__ not in IN_TABLES or type(op) is str:
        return method(op)
    known = op_info(op)
    if not (known.program or known.settled):  # PyTorch may come to have a rule for it, and tells nobody
        return method(op)
    return PLACES.find((method.__func__, known), method, op)


def way_back(node: Any, op: Any, interpreter: Interpreter) -> tuple[str, str | None]:
    """What pulls a record of a tape back."""
    if isinstance(node, BorrowedNode):
        return BORROWED, None
    if isinstance(node, ProgramNode):
        return PROGRAM, rule_place(interpreter, op)
    if isinstance(node, BackwardNode):
        return ENTRY, rule_place(interpreter, op)
    return RULE, None


def is_borrowing(inside: Event, interpreter: Interpreter) -> bool:
    """Whether an event inside of an operator's is PyTorch's derivative of it, or two walks that make a tangent."""
    level: Any = inside.level
    return inside.kind == "transform" or (level.kind == "native derivative" and level.level == interpreter.level)


def carries(interpreter: Interpreter, values: Sequence[Any]) -> bool:
    """Whether the transform keeps something on one of ``values``."""
    for x in values:
        if type(x) is WrapperTensor or is_wrapper(x):
            if x.interpreter is interpreter and not is_constant(x):
                return True
        elif isinstance(x, list | tuple) and carries(interpreter, x):
            return True
    return False


def is_constant(x: Any) -> bool:
    """What ``Interpreter.is_constant`` says, which would make tensors of pending wrappers."""
    if getattr(x, "_carried", None) is not None:
        return False
    return type(x) is PendingWrapper or x.interpreter.is_constant(x)


def definition_of(op: Any, differentiates: bool) -> str | None:
    """Where the pieces of an operator are written; None: in PyTorch, in C++."""
    if not isinstance(op, OpOverload):
        return None
    ours = decomposition(op)
    if ours is None and not differentiates and not op_info(op).composite:
        ours = DECOMPOSITION_TABLE.get(op)
    return None if ours is None else definition(ours)
