"""Composite operators taken apart: by PyTorch's definition, or ours where that leads into a kernel without rules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.decompositions.pieces import Definition
from functrans.operators.defaults import completed
from functrans.operators.factors import DROPPING, FactorsDropped
from functrans.operators.info import PURE, OpInfo, op_info, specialized_here
from functrans.operators.rules import RuleTable
from functrans.operators.schemas import taken_apart
from functrans.operators.scopes import SCOPES
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


def definition_of(op: OpOverload, known: OpInfo) -> Definition:
    """The definition of a composite ``op`` that holds in this context: ours, or PyTorch's."""
    specialized = known.specialized if not SCOPES else specialized_here(known)
    try:
        found: Definition = specialized[Definition]
    except KeyError:
        ours = decomposition(op)
        lasting = known.settled and known.kind_by_schema == PURE  # whether a view is one may depend on a lazy conjugate
        if ours is None:
            around = FactorsDropped if op._schema.name in DROPPING else None
            found = Definition(op, partial(taken_apart, op), lasting, around)
        else:
            found = Definition(op, partial(run_ours, ours, op), lasting and is_ours(ours))
        specialized[Definition] = found
    return found


def is_ours(define: Callable[..., Any]) -> bool:
    """Whether a definition is the library's, and says the same each time."""
    return getattr(define, "__module__", "").startswith("functrans.")


def decompose(interpreter: Interpreter, op: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run the pieces of a composite ``op`` through ``interpreter``'s level again."""
    return definition_of(op, op_info(op)).run(interpreter, args, kwargs)


def run_ours(ours: Callable[..., Any], op: OpOverload, *args: Any, **kwargs: Any) -> Any:
    with EnableTorchFunction():  # where PyTorch's own way led here, its short ones are switched off
        return completed(ours, op)(*args, **kwargs)
