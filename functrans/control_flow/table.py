"""What the operators that take functions come to, and the way there from the door."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import HigherOrderError
from functrans.errors.call_sites import user_site
from functrans.interpreters.failures import note_rule
from functrans.operators.rules import RuleTable
from functrans.pytorch.thread_state import OBSERVERS, STATE, running_at
from functrans.pytorch.torch_private import EnableTorchFunction, HigherOrderOperator, torch_pytree

#: The operators in terms of others: ``definition(*args, **kwargs)`` is run at the level where the operator was called.
DEFINITIONS: RuleTable[Callable[..., Any]] = RuleTable("definitions of higher-order operators")


def run_higher_order(op: HigherOrderOperator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The door for operators that take functions: by the rule of the innermost transform, or by definition."""
    top: Interpreter = STATE.top  # type: ignore[assignment]
    with running_at(top), EnableTorchFunction():
        try:
            out = top.process_higher_order(op, args, kwargs)
        except Exception as error:
            note_rule(error, f"the rule for {op}", top)
            raise
        if out is NotImplemented:
            definition = DEFINITIONS.get(op)  # type: ignore[arg-type]
            if definition is None:
                raise HigherOrderError(op, top)
            if OBSERVERS and STATE.observer is not None:
                definition = STATE.observer.defined(top, op, definition)
            out = definition(*args, **kwargs)
    site = user_site(sys._getframe(1))
    for x in torch_pytree.tree_leaves(out):
        if type(x) is WrapperTensor and site is not None and not hasattr(x, "made_at"):
            x.made_at = site
    return out
