"""Wrappers of transforms that do not run where they are read.

NOTE [Leftovers]
A wrapper whose interpreter is not alive is refused by whatever meets it, before anything else is done; the door then
asks here what it stands for. That is certain in two cases. Of a transform that has ended, the value of a wrapper that
is the same for all examples: one value, read as the constant that it is by now, which a warning says. And of a
transform that is *suspended* while the methods of an ``autograd.Function`` run in its place: one level down for grad
and jvp, where the value stands for the wrapper, and for vmap in a run of its own, whose wrapper does. What a Function
closes over is thus what it is without transforms: a constant to the derivative, and of each example its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import attrgetter
from threading import get_ident
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.core.tensor import WrapperTensor
from functrans.errors import DeadWrapperError, OtherThreadError
from functrans.errors.call_sites import frames_to_user, made_where
from functrans.operators.info import OpInfo
from functrans.tensors.pytrees import tree_map


def as_here(x: Any, expected: bool = False) -> Any:
    """``x``, or what it stands for if it is a wrapper of a transform that does not run; see NOTE [Leftovers].

    ``expected``: it is a value of a transform in whose place code runs, with which those around it may have ended.
    """
    given, ended = x, False
    while type(x) is WrapperTensor and not x.interpreter.alive:
        interpreter = x.interpreter
        stands_for = interpreter.stands_for
        if x.view_link is not None:
            refresh(x, stands_for is not None)
        expected = expected or stands_for is not None
        ended = ended or not expected
        if interpreter.values_remain or interpreter.is_constant(x):
            x = x.value
        elif stands_for is None:
            raise DeadWrapperError(given) from None
        else:
            x = stands_for(x)
    if ended:
        warn_of(given)
    return x


def refresh(x: WrapperTensor, suspended: bool) -> None:
    """Bring a view up to date; if its transform has ended and what it is a view of was written since, refuse it."""
    if suspended:
        try:
            x.interpreter.alive = True
            x.view_link.refresh(x)
        finally:
            x.interpreter.alive = False
    elif x.synced_version != x.view_link.group.version:
        raise DeadWrapperError(x) from None


def warn_of(x: WrapperTensor) -> None:
    i = x.interpreter
    lost = f": what {i.name} would know of its derivative is gone" if i.differentiates else ""
    warnings.warn(
        f"A tensor that belongs to {i.name} at level {i.level} was used after that transform had ended. It was made "
        f"{made_where(x)}. Its value is taken, as a constant{lost}. "
        "Return it from the transformed function (has_aux=True for values beside the result), or store its detach().",
        stacklevel=frames_to_user(),
    )


def has_leftovers(args: Any) -> bool:
    """Whether a leftover is among arguments, or in a list that is one."""
    return any(
        not a.interpreter.alive if type(a) is WrapperTensor else isinstance(a, list | tuple) and has_leftovers(a)
        for a in args
    )


def all_as_here(tree: Any) -> Any:
    """``tree`` with what leftovers in it stand for; ``tree`` itself if there are none."""
    found = False

    def replaced(x: Any) -> Any:
        nonlocal found
        new = as_here(x)
        found |= new is not x
        return new

    new = tree_map(replaced, tree)
    return new if found else tree


def arguments_as_here(known: OpInfo, args: Any, kwargs: Any) -> Any:
    """The arguments of an operator that met a leftover, which it must not write; None if it is not among them."""
    for i in known.written:
        given = args[i] if i < len(args) else kwargs.get(known.arguments[i])
        if type(given) is WrapperTensor and not given.interpreter.alive:
            raise DeadWrapperError(given) from None
    new = all_as_here((args, kwargs))
    return None if new[0] is args and new[1] is kwargs else new


def check_thread(owner: Interpreter) -> None:
    """Refuse a wrapper of another thread's transform.

    (What the autograd engine calls on shadows comes from threads of its own.)
    """
    if owner.thread is not None and owner.thread != get_ident():
        raise OtherThreadError(owner)


class suspended:
    """Context: code runs in the place of ``interpreter``; see NOTE [Leftovers].

    ``stands_for``: what a wrapper stands for, where that is not its value.
    """

    __slots__ = ("before", "interpreter", "stands_for")

    def __init__(
        self, interpreter: Interpreter, stands_for: Callable[[WrapperTensor], Any] = attrgetter("value")
    ) -> None:
        self.interpreter = interpreter
        self.stands_for = stands_for

    def __enter__(self) -> None:
        interpreter = self.interpreter
        self.before = interpreter.alive, interpreter.stands_for
        interpreter.alive, interpreter.stands_for = False, self.stands_for

    def __exit__(self, *exc: object) -> None:
        self.interpreter.alive, self.interpreter.stands_for = self.before
