"""Composite operators taken apart: by PyTorch's definition, or ours where that leads into a kernel without rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.operators.defaults import completed
from functrans.operators.rules import RuleTable
from functrans.operators.schemas import taken_apart
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import EnableTorchFunction, OpOverload

#: Functions with the operator's signature, in plain ``torch``, that grad and jvp run in place of PyTorch's definition.
DECOMPOSITIONS: RuleTable[Callable[..., Any]] = RuleTable("decompositions", cached=True)

#: The same for operators that PyTorch defines no earlier than a program needs them, by the name in their schema.
DEFINED_LATE: dict[str, Callable[..., Any]] = {}


def decomposition(op: OpOverload) -> Callable[..., Any] | None:
    """Our definition of ``op``, or None."""
    return DECOMPOSITIONS.get(op) or DEFINED_LATE.get(op._schema.name)


def decompose(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the pieces of a composite ``op`` through ``interpreter``'s level again."""
    ours = decomposition(op)
    with running_at(interpreter):
        if ours is not None:
            with EnableTorchFunction():  # where PyTorch's own way led here, its short ones are switched off
                return completed(ours, op)(*args, **kwargs)
        return taken_apart(op, *args, **kwargs)
