"""Interpreters that tell the observer of their thread what they are asked.

NOTE [Watched interpreters]
An interpreter is watched by giving it another class: a subclass of its own whose methods call the observer around those
of the class. So all that is asked of it is seen, whoever asks, and one that is not watched pays nothing. (Functions put
on the instance would go wrong on a copy of it, as pullbacks make them: they would act on the original.) The class is
put back when the explanation is over; a copy that somebody kept does as the original class, since no observer is there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.pytorch.thread_state import STATE

#: The methods around which the observer is called, by the name of its own method for them.
AROUND = {
    "process": "operator",
    "process_higher_order": "higher_order",
    "pull": "walk",
    "rows_behind": "walk",
    "loop": "loop",
    "check_example": "check",
}


class Watched:
    """What the class of a watched interpreter has in front of the interpreter's own."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing: the interpreter's class has been set up, and this one is no other transform."""

    def __copy__(self) -> Any:
        original = copy.copy(unwatched(self))  # type: ignore[arg-type]
        return original if STATE.observer is None else STATE.observer.watch_copy(original, self)


def watched_class(cls: type[Interpreter]) -> type[Interpreter]:
    """The class that a watched interpreter of ``cls`` gets."""
    methods = {name: around(name, getattr(cls, name), asked) for name, asked in AROUND.items() if hasattr(cls, name)}
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (Watched, cls), {**names, **methods})


def around(name: str, original: Callable[..., Any], asked: str) -> Callable[..., Any]:
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        observer = STATE.observer
        if observer is None:
            return original(self, *args, **kwargs)
        return getattr(observer, asked)(self, original, *args, **kwargs)

    watched.watched = original  # type: ignore[attr-defined] # for who asks whether a method is the class's own
    return watched


def unwatched(interpreter: Interpreter) -> Interpreter:
    """A look-alike of a watched interpreter, of the class that it had."""
    plain: Interpreter = object.__new__(type(interpreter).__mro__[2])
    plain.__dict__.update(interpreter.__dict__)
    return plain
