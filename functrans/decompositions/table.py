"""Composite operators taken apart: by PyTorch's definition, or ours where that leads into a kernel without rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functrans.core.dispatch import NO_KWARGS, sending
from functrans.core.interpreter import Interpreter
from functrans.decompositions.sent_down import SENT_DOWN
from functrans.operators.defaults import completed
from functrans.operators.rules import RuleTable
from functrans.operators.schemas import taken_apart
from functrans.pytorch.thread_state import running_at
from functrans.pytorch.torch_private import EnableTorchFunction, OpOverload

#: Functions with the operator's signature, in plain ``torch``, that grad and jvp run in place of PyTorch's definition.
DECOMPOSITIONS: RuleTable[Callable[..., Any]] = RuleTable("decompositions", cached=True)

#: The same for operators that PyTorch defines no earlier than a program needs them, by the name in their schema.
DEFINED_LATE: dict[str, Callable[..., Any]] = {
    # those that PyTorch makes of an empty tensor that is written, one of them under no_grad
    "prims::convert_element_type": lambda x, dtype: x.to(dtype),
    "prims::copy_strided": lambda x, stride: x.new_empty_strided(x.shape, stride).copy_(x),
    "prims::collapse": lambda x, start, end: x.flatten(start, end),
}


def decomposition(op: OpOverload) -> Callable[..., Any] | None:
    """The definition of ``op`` that derivatives are taken of, or None."""
    ours = DECOMPOSITIONS.get(op) or DEFINED_LATE.get(op._schema.name)
    if ours is None and op.namespace == "prims":
        # What PyTorch's decompositions end in has no derivatives there. Each knows the function that it stands for.
        return getattr(op, "impl_aten", None)
    return ours


def decompose(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the pieces of a composite ``op`` through ``interpreter``'s level again."""
    ours = decomposition(op)
    define = SENT_DOWN.get(op)
    if define is not None and ours is None and not kwargs:
        send = sending(interpreter.watcher)
        out = define(lambda op, *args: send(op, args, NO_KWARGS), *args)
        if out is not NotImplemented:
            return out
    with running_at(interpreter):
        if ours is not None:
            with EnableTorchFunction():  # where PyTorch's own way led here, its short ones are switched off
                return completed(ours, op)(*args, **kwargs)
        return taken_apart(op, *args, **kwargs)
