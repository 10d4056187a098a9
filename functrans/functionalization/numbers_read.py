"""Reading the number of a tensor that carries a derivative: allowed where it is asked for, refused where it is not.

NOTE [Numbers that are read]
``float(x)`` and ``x.item()`` leave what is differentiated, as in plain PyTorch. A function that takes a Python number
and is given a tensor reads the number unasked (``torch.full(size, x)``). PyTorch's parsers refuse a tensor that
requires grad; a wrapper never does in their eyes, so that it is refused here. Some read with ``item``, some as Python
does, with ``__float__``: then the function and ``float(x)`` look the same until the operator comes in. So it is noted
which instruction of which frame has the number read, and an operator that comes in while that instruction still runs,
with this number among its arguments, is what read it.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from functrans.core.tensor import WrapperTensor
from functrans.errors import NumberArgumentError
from functrans.functionalization.hidden_effects import as_usual, stands_in_for
from functrans.operators.info import OpInfo
from functrans.pytorch.thread_state import STATE
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.pytrees import elements

aten = torch.ops.aten

#: What reads a tensor's number because that was asked for.
READERS = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "item",
        "tolist",
        "__float__",
        "__int__",
        "__bool__",
        "__complex__",
        "__index__",
        "__format__",
        "__contains__",
        "__repr__",
    )
)
#: Where the frames between a reader and the code that asked are.
ON_THE_WAY = (
    "functrans.door.torch_dispatch", "functrans.door.torch_function", "functrans.door.entrances",
    "functrans.door.program_entrances", "functrans.door.operator_entrances", "functrans.tensors.answers",
)  # fmt: skip


class NumberRead(NamedTuple):
    """A number that some code asked a tensor for, and where that code stood.

    Of the frame only its identity and of the interpreter only its name are kept, or what they hold would live on.
    """

    number: Any
    transform: str
    level: int
    frame: int
    code: CodeType
    instruction: int


@stands_in_for(aten.item.default, aten._local_scalar_dense.default)
def number(known: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Read it, unless its derivative would be lost without anyone having asked for the number."""
    (x,) = args
    if (
        type(x) is not WrapperTensor
        or not (x.dtype.is_floating_point or x.dtype.is_complex)
        or not carries_derivative(x)
    ):
        return as_usual(known, args, kwargs)
    by = who_reads()
    if isinstance(by, str):
        raise NumberArgumentError(by, x.interpreter.name, x.interpreter.level)
    value = as_usual(known, args, kwargs)
    if by is not None:
        STATE.number_read = NumberRead(value, x.interpreter.name, x.interpreter.level, id(by), by.f_code, by.f_lasti)
    return value


def who_reads() -> str | FrameType | None:
    """The function that reads a number unasked, or the frame that asked a tensor; None: the operator was called."""
    frame, asked = sys._getframe(2), False
    while passes_on(frame):
        if frame.f_code.co_name == "otherwise":
            function = frame.f_locals["function"]
            if function not in READERS:
                return str(getattr(function, "__name__", function))
            asked = True  # by the code around, or by a parser that reads the number as Python does, through __float__
        assert frame.f_back is not None
        frame = frame.f_back
        if asked and frame.f_globals.get("__name__") not in ON_THE_WAY and not of_a_mode(frame):
            return frame
    if frame.f_globals.get("__name__") == "torch._ops":  # the parser of torch.ops
        op = frame.f_locals.get("self")
        packet = getattr(op, "overloadpacket", op)
        return None if packet in (aten.item, aten._local_scalar_dense) else str(packet)
    return f"A function called at {frame.f_code.co_filename}:{frame.f_lineno}"


def passes_on(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").startswith("functrans.") or of_a_mode(frame)


def of_a_mode(frame: FrameType) -> bool:
    """Whether somebody's mode or subclass passes a function on there."""
    return frame.f_code.co_name == "__torch_function__"


def check_number_read(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
    """Refuse ``op`` if a number among its arguments was just read off a tensor, by the instruction that calls it."""
    read: NumberRead = STATE.number_read
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not (
        id(frame) == read.frame and frame.f_code is read.code and frame.f_lasti == read.instruction
    ):
        frame = frame.f_back
    if frame is None:  # that instruction is done
        STATE.number_read = None
        return
    given = elements((*args, *(kwargs or {}).values()))
    if any(type(a) is type(read.number) and repr(a) == repr(read.number) for a in given):  # which finds NaN
        STATE.number_read = None
        raise NumberArgumentError(op.overloadpacket.__name__, read.transform, read.level)


def carries_derivative(x: Any) -> bool:
    while type(x) is WrapperTensor:
        if x.interpreter.alive and x.interpreter.differentiates and not x.interpreter.is_constant(x):
            return True
        x = x.value
    return False
