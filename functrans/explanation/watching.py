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
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from functrans.core.interpreter import Interpreter
from functrans.explanation.events import Event, Level
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


@dataclass
class Watch:
    """What is known of an interpreter that is watched."""

    level: Level
    #: the class that it had
    cls: type[Interpreter]
    #: its number after those of the levels below it
    stack: tuple[int, ...]
    #: how many records of its tape have been attributed
    claimed: int
    #: by the first tape index that a record made, the event in which it was made
    made_by: dict[int | None, Event] = field(default_factory=dict)


class WatchedInterpreters:
    """A dict from interpreters to what is known of them that does not hold them, and is asked for every event."""

    def __init__(self) -> None:
        self.watches: dict[int, Watch] = {}
        self.references: dict[int, ref[Interpreter]] = {}

    def add(self, interpreter: Interpreter, watch: Watch) -> None:
        number, watches = id(interpreter), self.watches
        watches[number] = watch
        self.references[number] = ref(interpreter, lambda _: watches.pop(number, None))  # before another gets it

    def get(self, interpreter: Interpreter | None) -> Watch | None:
        return self.watches.get(id(interpreter))

    def items(self) -> list[tuple[Interpreter, Watch]]:
        alive = [(reference(), self.watches.get(number)) for number, reference in self.references.items()]
        return [(interpreter, watch) for interpreter, watch in alive if interpreter is not None and watch is not None]


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
