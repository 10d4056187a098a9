"""An interpreter class that is wrong, and an interpreter that is used wrongly."""

from __future__ import annotations

from threading import get_ident
from typing import Any, NoReturn

from torch import Tensor

from functrans.errors import InterpreterError, OtherThreadError, PayloadError, SameLevelError

#: names that a payload cannot have: those of a tensor, and of a wrapper (added by ``functrans.core.tensor``)
RESERVED = {"self", *dir(Tensor)}


def check_payload(cls: Any) -> None:
    """Refuse names of a payload that would overwrite what a wrapper is made of."""
    payload: Any = cls.payload
    if not isinstance(payload, tuple) or not all(isinstance(name, str) and name.isidentifier() for name in payload):
        raise PayloadError(cls, f"payload is {payload!r}")
    if len(set(payload)) < len(payload):
        raise PayloadError(cls, f"payload {payload!r} has a name twice")
    inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "payload", ())}
    taken = [name for name in payload if name in RESERVED and name not in inherited]
    if taken:
        raise PayloadError(cls, f"payload has {', '.join(map(repr, taken))}, which every wrapper tensor has already")


def check_enterable(interpreter: Any, before: Any) -> None:
    """Refuse an interpreter that has run, or whose level and switches are not those of the place where it is run."""
    here, grad, forward = before.top, before.grad, before.forward
    if interpreter.below is here and interpreter.outer_grad_mode is grad and interpreter.outer_forward_mode is forward:
        try:
            interpreter.unused.pop()  # atomic: threads that try at once get one run between them
            return
        except IndexError:
            pass
    if not interpreter.unused:
        what = "got one that is running" if interpreter.alive else "got one that has run already"
    elif interpreter.below is not here:
        what = f"got one that was made {place_of(interpreter.below)}, and is run {place_of(here)}"
    else:
        what = "got one that was made where grad mode, or forward mode, was switched otherwise"
    raise InterpreterError(interpreter, what)


def place_of(interpreter: Any) -> str:
    """Where code at a level is, for a message."""
    return (
        "outside of all transforms"
        if interpreter is None
        else f"inside {interpreter.name} at level {interpreter.level}"
    )


def refuse_same_level(one: Any, other: Any) -> NoReturn:
    """Two running transforms of one level whose wrappers met: of two threads, or one in the other's place."""
    for interpreter in (one, other):
        if interpreter.thread is not None and interpreter.thread != get_ident():
            raise OtherThreadError(interpreter)
    raise SameLevelError(one, other)
