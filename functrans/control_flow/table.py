"""What the operators that take functions come to, and the way there from the door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functrans.core.errors import HigherOrderError
from functrans.core.interpreter import Interpreter
from functrans.core.rules import RuleTable
from functrans.core.thread_state import STATE, running_at
from functrans.core.torch_private import EnableTorchFunction, HigherOrderOperator

#: The operators in terms of others: ``definition(*args, **kwargs)`` is run at the level where the operator was called.
DEFINITIONS: RuleTable[Callable[..., Any]] = RuleTable("definitions of higher-order operators")


def run_higher_order(op: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The door for operators that take functions: by the rule of the innermost transform, or by definition."""
    top: Interpreter = STATE.top  # type: ignore[assignment]
    with running_at(top), EnableTorchFunction():
        out = top.process_higher_order(op, args, kwargs)
        if out is not NotImplemented:
            return out
        definition = DEFINITIONS.get(op)  # type: ignore[arg-type]
        if definition is None:
            raise HigherOrderError(op, top)
        return definition(*args, **kwargs)
