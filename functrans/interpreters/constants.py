"""What does not depend on what is transformed.

NOTE [Constants below the top]
Code at a level sees a result that the level has nothing to do with as a wrapper of that level all the same: its writes,
views and errors are those of any other. An operator that a higher level sent down is not seen by such code, and no
wrapper is made: a value of a lower level is a constant to every level above it as it is, and what is computed of it
passes by this level from then on. (A level without wrappers, a Handler, does not count: what its code sees is of the
level below it.) Where a transform hands such a value over as a result, it becomes what code at that
level made: a write to it is no write to a captured tensor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functrans.boundary.calls import lift
from functrans.core.dispatch import map_tensors
from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.pytorch.thread_state import STATE


def constants(interpreter: Interpreter, out: Any) -> Any:
    """An operator's output, of lower levels, as what ``process`` returns; see NOTE [Constants below the top]."""
    top = STATE.top
    if top is not None and top.level > interpreter.level and type(interpreter).constant is Interpreter.constant:
        while getattr(top, "transparent", False):
            top = top.below  # type: ignore[union-attr]
        if top is not interpreter:
            return out
    return map_tensors(interpreter.constant, out)


def as_own(level: Interpreter | None, value: Any) -> Any:
    """``value``, of ``level`` or one below, as code at ``level`` (None: the base) has it of what it made itself."""
    owner = value.interpreter if type(value) is WrapperTensor else None
    return value if owner is level or not isinstance(value, Tensor) else lift(value, owner, level)
