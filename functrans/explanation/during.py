"""The context of an event that goes on: where it was called from, how its arguments looked, how long it took."""

from __future__ import annotations

import sys
from time import perf_counter_ns
from types import FrameType
from typing import TYPE_CHECKING, Any

from functrans.explanation.sites import Origin, origin_of

if TYPE_CHECKING:
    from functrans.core.interpreter import Interpreter
    from functrans.explanation.recording import Observer

#: Events in which code of the user's runs without being inside of a further event.
OPEN = ("run", "transform", "walk")


class During:
    """Context: an event goes on, inside of the one that the observer is in.

    Args:
        observer: who writes it down.
        kind: that of the event, as ``name`` is.
        interpreter: whose level it belongs to; None: the base.
        op: the operator, where there is one, ``args`` and ``kwargs`` its arguments.
    """

    __slots__ = ("around", "began", "event", "frame", "fresh", "observer", "origin", "others", "out")

    def __init__(
        self,
        observer: Observer,
        kind: str,
        name: str,
        interpreter: Interpreter | None,
        op: Any = None,
        args: Any = (),
        kwargs: Any = None,
    ) -> None:
        began = perf_counter_ns()
        self.observer = observer
        self.around: During | None = observer.during
        self.frame: FrameType | None = sys._getframe(1)
        self.event = event = observer.new_event(kind, name, interpreter)
        around, frame = self.around, self.frame.f_back
        outer = (None, None) if around is None else (around.frame, around.origin)
        self.origin: Origin = origin_of(frame, *outer)
        event.site, event.direct, new = self.origin
        #: whether code of the user's can have run since what went on before, and can run after this event
        self.fresh = new or event.parent is None or event.parent.kind in OPEN
        if self.fresh:
            observer.looking.forget()
        if args or kwargs:
            look = observer.looking.look
            named = {name: look(x) for name, x in kwargs.items()} if kwargs else {}
            event.op, event.arguments = op, (look(args), named)
        self.out: Any = None
        self.began = perf_counter_ns()
        observer.own_time += self.began - began
        self.others = observer.own_time

    def gives(self, out: Any) -> None:
        """Note what the event returned, which is looked at as it ends."""
        self.out = out

    def __enter__(self) -> During:  # noqa: PYI034 - Python 3.10 has no Self
        self.observer.during = self
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        event, observer, ended = self.event, self.observer, perf_counter_ns()
        event.nanoseconds = ended - self.began - (observer.own_time - self.others)
        if self.out is not None:
            event.results = observer.looking.look(self.out)
            self.out = None
        if error is not None:
            event.error = f"{type(error).__name__}: {error}"
        if event.kind != "base":
            observer.claim_records(event)
        if self.fresh:
            observer.looking.forget()
        if event.parent is not None:
            event.parent.bytes += event.bytes
        self.frame = None
        observer.during = self.around
        observer.own_time += perf_counter_ns() - ended
