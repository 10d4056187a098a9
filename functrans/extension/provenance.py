"""What a rule may ask: who lowered the operator to it, and what is being pulled back.

Nothing is kept for this while operators run: the answer is read off Python's frames when somebody asks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from functrans.core.interpreter import Interpreter
from functrans.door.autograd_function import send
from functrans.errors import CallError
from functrans.errors.call_sites import place, user_site
from functrans.extension.primitives import Primitive
from functrans.interpreters.failures import meaning_at
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.grad.noted_tape import site_of


class Caller(NamedTuple):
    """An operator of a level above, on the way down; what ``caller`` returns."""

    interpreter: Interpreter
    #: an operator overload, a tuple of them where the level runs several as one program, an operator that takes
    #: functions, a ``Primitive`` or a subclass of ``autograd.Function``
    op: Any
    #: whether it is the operator of a record that the interpreter pulls back through
    on_way_back: bool

    @property
    def level(self) -> int:
        return self.interpreter.level


class Origin(NamedTuple):
    """A record of a tape that is being pulled back through; what ``origin`` returns."""

    interpreter: GradInterpreter
    #: the operator, as in ``Caller``
    op: Any
    #: ``file:line, in function`` of the user's code that called it; None where lines are not noted
    place: str | None


def caller() -> Caller | None:
    """Inside a rule: the operator of a level above that lowered to this one, or None if code at this level called it.

    A rule is what an interpreter does with an operator: a rule of a table, a batching rule, a tangent, ``process``,
    what a ``PassThrough`` overrides, a rule of a ``Primitive``. On the way back along a tape the level above is that of
    the tape, although it has ended, and its operator that of the record.

    Raises:
        CallError: no rule is running.

    Example:
        >>> import torch
        >>> from functrans import grad
        >>> from functrans.extend import PassThrough, caller, transform
        >>> class Names(PassThrough):
        ...     kind = "names"
        ...     def before(self, op, args, kwargs):
        ...         above = caller()
        ...         print(op, "for", above.op, "on the way back" if above.on_way_back else "")
        >>> transform(Names, grad(torch.sin))(torch.tensor(0.0))
        aten.sin.default for aten.sin.default
        aten.cos.default for aten.sin.default on the way back
        aten.mul.Tensor for aten.sin.default on the way back
        tensor(1.)
    """
    running = meanings(sys._getframe(1))
    first = next(running, None)
    if first is None:
        cure = "Call it in a rule: what an interpreter does with an operator."
        raise CallError("caller()", "no operator that is being interpreted", "a rule that runs", cure)
    level = first.interpreter
    if first.on_way_back:
        return None  # the formula of a record; what stood above has ended
    for above in running:
        if above.interpreter is not level:
            return above if above.on_way_back or stands_on(above.interpreter, level) else None
    return None


def origin() -> Origin | None:
    """Inside a rule, a formula or a hook: the record of the tape that is being pulled back through, or None.

    Where the user's code called it is known inside of ``noting_lines()`` and under
    ``torch.autograd.set_detect_anomaly``.

    Example:
        >>> import torch
        >>> from functrans import grad
        >>> from functrans.extend import derivative, noting_lines, origin
        >>> @torch.library.custom_op("docs::halved", mutates_args=())
        ... def halved(x: torch.Tensor) -> torch.Tensor:
        ...     return x / 2
        >>> derivative(torch.ops.docs.halved.default, x=lambda grad: grad / (print(origin().op) or 2), tangent="linear")
        >>> grad(halved)(torch.tensor(1.0))
        docs.halved.default
        tensor(0.5000)
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        record = record_at(frame)
        if record is not None:
            walk = frame.f_locals
            site = site_of(walk["self"].tape, record)
            return Origin(walk["self"], pulled(walk), None if site is None else place(site))
        frame = frame.f_back
    return None


def user_line() -> str | None:
    """Inside a rule: ``file:line, in function`` of the code outside of functrans that called the operator.

    On a walk back it is where the operator was called that is being pulled back through, inside of ``noting_lines()``;
    otherwise what asked for the walk. None: there is no such code (a function of a library, called from C++).

    Raises:
        CallError: no operator is being interpreted.

    Example:
        >>> import torch
        >>> from functrans.extend import PassThrough, transform, user_line
        >>> class Lines(PassThrough):
        ...     kind = "lines"
        ...     def before(self, op, args, kwargs):
        ...         print(op, "in", user_line().rpartition(", in ")[2])
        >>> def double(x):
        ...     return x + x
        >>> _ = transform(Lines, lambda x: double(x).sin())(torch.ones(2))
        aten.add.Tensor in double
        aten.sin.default in <lambda>
    """
    record = origin()
    if record is not None and record.place is not None:
        return record.place
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and next(meanings(frame, 1), None) is None:
        frame = frame.f_back
    if frame is None:
        cure = "Call it in a rule: what an interpreter does with an operator."
        raise CallError("user_line()", "no operator that is being interpreted", "a rule that runs", cure)
    site = user_site(frame)
    return None if site is None else place(site)


SEND, ASK = send.__code__, Primitive.ask.__code__
PULL, ROWS = GradInterpreter.pull.__code__, GradInterpreter.rows_behind.__code__


def record_at(frame: FrameType) -> int | None:
    """Which record of its tape a walk back that ``frame`` is of has come to; None if it is of none."""
    walk = frame.f_locals if frame.f_code in (PULL, ROWS) else {}
    if walk.get("node") is None:
        return None
    return walk["i"] if frame.f_code is PULL else walk["end"] - 1


def meanings(frame: FrameType | None, frames: int | None = None) -> Iterator[Caller]:
    """The operators that are being interpreted around ``frame``, innermost first; in so many frames, if a number is
    given."""
    while frame is not None and frames != 0:
        frames = None if frames is None else frames - 1
        code, values = frame.f_code, frame.f_locals
        interpreter = meaning_at(frame) or meaning_at(frame, "process_higher_order")
        if interpreter is not None:
            yield Caller(interpreter, shown_op(values[code.co_varnames[1]]), False)
        elif record_at(frame) is not None:
            yield Caller(values["self"], pulled(values), True)
        elif code is SEND and values["level"] is not None:
            yield Caller(values["level"], values["cls"], False)
        elif code is ASK and values["level"] is not None:
            yield Caller(values["level"], values["self"], False)
        frame = frame.f_back


def pulled(walk: dict[str, Any]) -> Any:
    """The operator of the record that a walk back is at."""
    node, saved = walk["node"], walk["saved"]
    operators = getattr(node, "operators", ())
    return operators if len(operators) > 1 else getattr(saved, "cls", None) or node.operator(saved)


def shown_op(op: Any) -> Any:
    if not hasattr(op, "instructions"):
        return op
    operators = tuple(instruction.op for instruction in op.instructions)
    return operators[0] if len(operators) == 1 else operators


def stands_on(above: Interpreter, level: Interpreter) -> bool:
    """Whether ``level`` is one of those below ``above``."""
    below = above.below
    while below is not None and below is not level:
        below = below.below
    return below is level
