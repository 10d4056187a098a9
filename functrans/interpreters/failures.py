"""What an exception is told on its way out: which operator failed at which level, on what, called from where.

NOTE [What becomes of an exception]
All of this is read off the traceback, when an exception passes the door: code that runs without one pays nothing. What
a *kernel* raises (PyTorch, on the shapes or numbers that the user gave it, or a custom operator's own code) keeps its
type and message, and gets a note for each level, since the message shows the shapes of the level at the bottom. What a
*rule* raises, or a formula, is a mistake there and becomes a RuleError. It has to: Python takes a TypeError out of
``x + y`` for "this operand is not for me" and reports something else. A deliberate error of functrans, an exception of
a class of the user's and a warning keep their type and message; they get the notes where code of the user's raised
them, in a rule. Each note names level, operator and, of a rule of the user's, its place. What does not come through the
door is told the same where it is called: primitives, Functions, operators that take functions. (Notes are the
``__notes__`` of Python 3.11; Python 3.10 keeps them without showing them.)
"""

from __future__ import annotations

import inspect
import opcode
import sys
from types import FrameType, TracebackType
from typing import Any

from torch import Tensor

from functrans.core import dispatch
from functrans.core.interpreter import Interpreter
from functrans.errors import FunctransError, LayoutError, RuleError, SparseOperatorError
from functrans.errors.call_sites import TORCH, definition, is_users, place, user_site
from functrans.tensors.described import given
from functrans.tensors.sparse import has_sparse

#: Code under which a kernel runs.
KERNELS = (dispatch.base.__code__, dispatch.base_recorded.__code__)
OPERATORS = TORCH + "_ops.py"
#: Methods of the user's modes and tensor subclasses, which see what rules run.
LISTENERS = ("__torch_dispatch__", "__torch_function__")
#: Errors that PyTorch raises on purpose.
DELIBERATE = (RuntimeError, IndexError, ValueError)
RAISE = opcode.opmap["RAISE_VARARGS"]


class FailedCall:
    """One call of an interpreter's ``process``, for messages."""

    def __init__(
        self, interpreter: Interpreter, op: Any, args: Any, kwargs: Any, what: str, traceback: TracebackType
    ) -> None:
        self.interpreter = interpreter
        self.op = op
        self.what = what
        self.given = given(args, kwargs)
        #: a nested tensor among the arguments, which rules do not know
        self.nested = next((a for a in args if isinstance(a, Tensor) and a.is_nested), None)
        #: whether there is a sparse one
        self.sparse = has_sparse(args)
        self.registered = place_of_rule(interpreter, op)
        self.traceback = traceback

    def __str__(self) -> str:
        about = f"{self.interpreter.name} at level {self.interpreter.level}: {name_of(self.op)} of {self.given}"
        return about + by_rule(self.registered)


def place_of_rule(interpreter: Interpreter, op: Any) -> str | None:
    """``file:line`` of what ``interpreter`` does with ``op``: a ``process`` of the user's, or what it says itself."""
    own = definition(inspect.unwrap(type(interpreter).process))
    return own if of_user(own) else interpreter.rule_place(op)


def by_rule(place: str | None) -> str:
    return f", by the rule at {place}" if of_user(place) else ""


def of_user(place: str | None) -> bool:
    """Whether ``place``, ``file:line``, is in the user's code."""
    return place is not None and is_users(place.rpartition(":")[0])


def name_of(op: Any) -> str:
    return ", ".join(str(i.op) for i in op.instructions) if hasattr(op, "instructions") else str(op)


def entries(traceback: TracebackType | None) -> list[TracebackType]:
    found = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def meaning_at(frame: FrameType, method: str = "process") -> Interpreter | None:
    """The interpreter whose ``process``, or another ``method`` of its arguments, ``frame`` is, or None."""
    code = frame.f_code
    if code.co_name != method or code.co_argcount < 4:
        return None
    found = frame.f_locals.get(code.co_varnames[0])
    return found if isinstance(found, Interpreter) and not found.carries_autograd else None


def calls_in(traceback: TracebackType | None) -> list[FailedCall]:
    """The operators being interpreted, outermost first; of a composite one and its pieces at one level the former."""
    found: list[FailedCall] = []
    for entry in entries(traceback):
        interpreter = meaning_at(entry.tb_frame)
        if interpreter is None:
            continue
        values, names = entry.tb_frame.f_locals, entry.tb_frame.f_code.co_varnames
        op, args, kwargs = (values[name] for name in names[1:4])
        found.append(FailedCall(interpreter, op, args, kwargs, f"the rule for {name_of(op)}", entry))
    return found


def is_kernels(error: Exception, traceback: TracebackType) -> bool:
    """Whether what was raised below the call at ``traceback`` comes from a kernel, and not from a mistake in a rule."""
    below = entries(traceback)
    if type(error).__module__ != "builtins":  # one of PyTorch's classes
        return True
    codes = [e.tb_frame.f_code for e in below]
    if any(
        c in KERNELS or c.co_filename == OPERATORS or (c.co_name in LISTENERS and is_users(c.co_filename))
        for c in codes
    ):
        return True
    innermost = below[-1]
    code = innermost.tb_frame.f_code
    raised_by_python = code.co_code[innermost.tb_lasti] == RAISE
    if not isinstance(error, DELIBERATE) or (raised_by_python and isinstance(error, NotImplementedError)):
        return False
    if not is_users(code.co_filename):
        return True
    if raised_by_python or isinstance(error, ValueError):
        return False
    return not (isinstance(error, IndexError) and str(error).endswith("index out of range"))  # of a list or tuple


def passes(error: Exception) -> bool:
    """Whether an exception keeps its type, whoever raised it; see NOTE [What becomes of an exception]."""
    if isinstance(error, FunctransError):
        return not isinstance(error, RuleError)
    return isinstance(error, Warning) or type(error).__module__.split(".")[0] not in ("builtins", "torch")


def explain(error: BaseException) -> None:
    """Called where an exception passes the door: raises a RuleError in its place, or adds notes to it."""
    if not isinstance(error, Exception):
        return
    first = next((entry for entry in entries(error.__traceback__) if meaning_at(entry.tb_frame) is not None), None)
    kept = passes(error)
    if first is None or (kept and not runs_users(first)):
        return
    calls = calls_in(first)
    if kept:
        add_notes(error, calls, sys._getframe(2))
        return
    nested = next((call.nested for call in calls if call.nested is not None), None)
    if nested is not None:
        raise LayoutError(nested) from error
    outside = sys._getframe(2)
    if not isinstance(error, RuleError) and not is_kernels(error, calls[-1].traceback):
        site = user_site(outside)
        new = RuleError(calls[-1], error, last_place(error), None if site is None else place(site))
        add_notes(new, calls[:-1], outside)
        raise new from error
    if any(call.sparse for call in calls) and is_about_sparse(error):
        refusal = SparseOperatorError(name_of(calls[0].op), first_sentence(error))
        add_notes(refusal, calls, outside)
        raise refusal from error
    add_notes(error, calls, outside)


def is_about_sparse(error: Exception) -> bool:
    """Whether PyTorch refused the layout, and not something else about the tensors."""
    return isinstance(error, NotImplementedError) or "sparse" in str(error).lower()


def first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].rstrip(".")


def runs_users(traceback: TracebackType | None) -> bool:
    """Whether code of the user's raised, or called what raised."""
    return any(is_users(entry.tb_frame.f_code.co_filename) for entry in entries(traceback))


def users_rule(error: Exception) -> str | None:
    """``file:line`` of the user's function that was called on the way to where ``error`` was raised."""
    codes = (entry.tb_frame.f_code for entry in entries(error.__traceback__))
    return next((f"{c.co_filename}:{c.co_firstlineno}" for c in codes if is_users(c.co_filename)), None)


def note_rule(error: Exception, what: str, interpreter: Interpreter) -> None:
    """Note on an exception that it was raised in a rule that the door does not see called."""
    add_note(error, f"in {what} of {interpreter.name} at level {interpreter.level}{by_rule(users_rule(error))}")


def explain_pull(
    error: Exception, interpreter: Interpreter, op: Any, grad: Any, formula: bool, place: str | None = None
) -> None:
    """Called where an exception leaves the derivative of ``op`` on the way back: as ``explain``.

    ``formula``: the derivative is a formula, and not PyTorch's or that of an autograd.Function. ``place``: where it is,
    if not in the table.
    """
    if error.__traceback__ is None or (passes(error) and not runs_users(error.__traceback__)):
        return
    grads = grad if isinstance(grad, list) else [grad]
    call = FailedCall(interpreter, op, grads, {}, f"the derivative of {name_of(op)}", error.__traceback__)
    call.given = f"cotangent {call.given}"
    call.registered = place or interpreter.rule_place(op) or users_rule(error)
    kept = passes(error) or isinstance(error, RuleError)
    if formula and not kept and not is_kernels(error, error.__traceback__):
        raise RuleError(call, error, last_place(error), None) from error
    calls = calls_in(error.__traceback__)
    for each in calls:
        add_note(error, f"in {each}")
    if is_about_sparse(error) and (call.sparse or any(each.sparse for each in calls)):
        raise SparseOperatorError(f"The derivative of {name_of(op)}", first_sentence(error)) from error
    about = f"in the derivative of {name_of(op)} of {interpreter.name} at level {interpreter.level}, on {call.given}"
    add_note(error, about + by_rule(call.registered))


def last_place(error: Exception) -> str:
    innermost = entries(error.__traceback__)[-1]
    return place((innermost.tb_frame.f_code, innermost.tb_lasti))


def add_notes(error: Exception, calls: list[FailedCall], outside: FrameType) -> None:
    """A note per level, the innermost level first; the last one says where the user called the operator."""
    frame: FrameType | None = outside
    while frame is not None:
        if meaning_at(frame) is not None:
            return  # a rule called this operator: the call of the rule's operator passes the door too
        frame = frame.f_back
    by_level: dict[Interpreter, FailedCall] = {}
    for call in calls:
        by_level.setdefault(call.interpreter, call)
    site = user_site(outside)
    for call in reversed(by_level.values()):
        add_note(error, f"in {call}")
    if by_level and site is not None:
        add_note(error, f"called at {place(site)}")


def add_note(error: Exception, note: str) -> None:
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = error.__notes__ = []  # type: ignore[attr-defined]
    if note not in notes:
        notes.append(note)
