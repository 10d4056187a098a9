"""The observer: what is told of a run, and writes down the events."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any
from weakref import WeakKeyDictionary

from functrans.core.errors.call_sites import definition
from functrans.core.errors.described import given, shown
from functrans.core.interpreter import Interpreter
from functrans.core.operators import op_info
from functrans.core.stack import interpreter_stack
from functrans.core.thread_state import DOOR, OBSERVERS, STATE, modes_on, set_modes
from functrans.core.torch_private import HigherOrderOperator, TorchDispatchMode
from functrans.explanation.events import Event, Level
from functrans.explanation.looking import bytes_made, looks, named, tensors_of, unseen
from functrans.explanation.sites import site_of
from functrans.explanation.verdicts import DECOMPOSED, LOOPED, PASSED, RULE, judge, way_back
from functrans.explanation.watching import Watched, watched_class
from functrans.interpreters.failures import name_of
from functrans.interpreters.grad.interpreter import GradInterpreter


@dataclass
class Watch:
    """What is known of an interpreter that is watched."""

    level: Level
    #: the class that it had
    cls: type[Interpreter]
    #: how many records of its tape have been attributed
    claimed: int
    #: by the first tape index that a record made, the event in which it was made
    made_by: dict[int | None, Event] = field(default_factory=dict)


class Observer(TorchDispatchMode):
    """Writes down what happens in this thread.

    It is PyTorch's innermost mode under the door, which sees what ends at the base, and it is told of interpreters and
    what these are asked (NOTE [Watched interpreters]).
    """

    supports_higher_order_operators = True

    def __init__(self, example: int) -> None:
        super().__init__()
        self.example = example
        self.run = Event(0, "run", "", None)
        self.current = self.run
        self.events: list[Event] = []
        self.levels: list[Level] = []
        #: what is watched: its level, the class that it had, and the events of its tape's records
        self.watched: WeakKeyDictionary[Interpreter, Watch] = WeakKeyDictionary()
        self.classes: dict[type[Interpreter], type[Interpreter]] = {}
        #: the time that the observer itself has taken
        self.own_time = 0

    def watch(self, interpreter: Interpreter) -> None:
        was = type(interpreter)
        cls = was.__mro__[2] if issubclass(was, Watched) else was
        if was in self.classes.values():
            was = cls  # it was made of the class of one that is watched; else an explanation around this one watches it
        place = definition(interpreter.func)
        details = () if tape_of(interpreter) is not None else tuple(interpreter.details())  # a tape of 0, by now
        about = interpreter.level, interpreter.kind, interpreter.name, details, place
        self.levels.append(Level(len(self.levels), *about))
        self.watched[interpreter] = Watch(self.levels[-1], was, len(tape_of(interpreter) or ()))
        if cls not in self.classes:
            self.classes[cls] = watched_class(cls)
        interpreter.__class__ = self.classes[cls]

    def watch_copy(self, new: Interpreter, original: Any) -> Interpreter:
        watch = self.watched.get(original)
        if watch is not None:
            self.watched[new] = watch
            new.__class__ = type(original)
        return new

    def around(self, interpreter: Interpreter, body: Callable[[], Any]) -> Callable[[], Any]:
        """``body``, which is about to run at the new level of ``interpreter``."""
        self.watch(interpreter)

        def observed() -> Any:
            with self.event("transform", interpreter.name, interpreter):
                return body()

        return observed

    def release(self) -> None:
        """Give all that is watched its class back."""
        for interpreter, watch in list(self.watched.items()):
            interpreter.__class__ = watch.cls

    def level_of(self, interpreter: Interpreter | None) -> Level | None:
        watch = None if interpreter is None else self.watched.get(interpreter)
        return None if watch is None else watch.level

    @contextmanager
    def event(
        self,
        kind: str,
        name: str,
        interpreter: Interpreter | None = None,
        args: Any = (),
        kwargs: Any = None,
        op: Any = None,
    ) -> Iterator[Event]:
        """Context: an event goes on."""
        began = perf_counter_ns()
        event = self.begin(kind, name, interpreter, args, kwargs or {}, op)
        around, self.current = self.current, event
        now = perf_counter_ns()
        self.own_time += now - began
        own = self.own_time
        try:
            yield event
        except BaseException as error:
            event.error = f"{type(error).__name__}: {error}"
            raise
        finally:
            event.nanoseconds = perf_counter_ns() - now - (self.own_time - own)
            self.claim_records(event)
            event.bytes += sum(child.bytes for child in event.children)
            self.current = around

    def begin(self, kind: str, name: str, interpreter: Interpreter | None, args: Any, kwargs: Any, op: Any) -> Event:
        self.claim_records(self.current)
        event = Event(len(self.events) + 1, kind, name, self.current, self.level_of(interpreter))
        event.stack = tuple(level.number for i in reversed(interpreter_stack()) if (level := self.level_of(i)))
        event.site, event.direct = site_of(sys._getframe(3))
        with unseen():
            event.given = given(args, kwargs)
            event.takes = looks(tensors_of(op, args, kwargs), self.example)
        self.events.append(event)
        self.current.children.append(event)
        return event

    def gives(self, event: Event, out: Any) -> None:
        """Note what an event returned."""
        began = perf_counter_ns()
        with unseen():
            event.returned = "" if out is None else shown(out)
            event.gives = looks(named("", out), self.example)
        self.own_time += perf_counter_ns() - began

    def claim_records(self, event: Event) -> None:
        """Let what has come onto tapes since this was asked last be what ``event`` recorded."""
        for interpreter in interpreter_stack():
            watch, tape = self.watched.get(interpreter), tape_of(interpreter)
            if watch is None or tape is None or len(tape) <= watch.claimed:
                continue
            for _, outs, ins, _ in tape[watch.claimed :]:
                watch.made_by[first_index(outs)] = event
                event.record = event.record or (outs, ins)
            watch.claimed = len(tape)

    def operator(self, interpreter: Interpreter, process: Callable[..., Any], op: Any, args: Any, kwargs: Any) -> Any:
        with self.event("operator", name_of(op), interpreter, args, kwargs, op) as event:
            event.source = op.source if op_info(op).program else None
            out = process(interpreter, op, args, kwargs)
            self.gives(event, out)
        judge(event, interpreter, op, args, kwargs)
        return out

    def higher_order(self, interpreter: Interpreter, process: Callable[..., Any], op: Any, *args: Any) -> Any:
        with self.event("operator", op.name(), interpreter) as event:
            out = process(interpreter, op, *args)
            event.way = DECOMPOSED if out is NotImplemented else RULE
        return out

    def loop(self, interpreter: Interpreter, loop: Callable[..., Any], *args: Any) -> Any:
        self.current.way = LOOPED
        return loop(interpreter, *args)

    def check(self, interpreter: Interpreter, check: Callable[..., Any], op: Any, *args: Any) -> Any:
        with self.event("check", f"one example of {op}", interpreter):
            return check(interpreter, op, *args)

    def asked(self, name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
        """``rule``, by which a level will be asked about what is no operator: an autograd.Function, a primitive."""

        def observed(interpreter: Interpreter, *args: Any, **kwargs: Any) -> Any:
            with self.event("operator", name, interpreter, args, kwargs) as event:
                event.way, event.place = RULE, definition(rule)
                out = rule(interpreter, *args, **kwargs)
                if out is NotImplemented:
                    event.way = PASSED
                else:
                    self.gives(event, out)
            return out

        return observed

    def walk(self, interpreter: Any, walk: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A walk back along a tape, with nodes in it that tell when they are asked."""
        tape = interpreter.tape
        originals = {}
        try:
            for i, (node, outs, ins, saved) in enumerate(tape):
                if node is not None:
                    telling = copy.copy(node)
                    telling.pull = functools.partial(self.pull, interpreter, node, outs, ins)
                    originals[telling] = node
                    tape[i] = telling, outs, ins, saved
            with self.event("walk", f"back along the tape of {interpreter.name}", interpreter):
                return walk(interpreter, *args, **kwargs)
        finally:
            for i, (node, *rest) in enumerate(tape):
                tape[i] = originals.get(node, node), *rest

    def pull(self, interpreter: Any, node: Any, outs: Any, ins: Any, saved: Any, grad: Any) -> Any:
        watch = self.watched[interpreter]
        op = node.operator(saved)
        with self.event("pull", name_of(op), interpreter, (grad,)) as event:
            event.record = outs, ins
            event.made_by = watch.made_by.get(first_index(outs))
            program = getattr(node, "pull_program", None)
            event.source = None if program is None else program.source
            event.way, event.place = way_back(node, op, interpreter)
            found = node.pull(saved, grad)
            self.gives(event, found)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # PyTorch asks a tensor of another subclass for its device: no operator
            return func(*args, **kwargs)
        name = func.name() if isinstance(func, HigherOrderOperator) else str(func)
        with self.event("base", name, None, args, kwargs, func) as event:
            if any(kind.__name__ == "DTensor" for kind in types):
                return NotImplemented  # what it is made of comes here, too
            out = func(*args, **kwargs)
            event.bytes = bytes_made(out, (args, kwargs))
            self.gives(event, out)
        return out


def tape_of(interpreter: Any) -> list[Any] | None:
    return interpreter.tape if isinstance(interpreter, GradInterpreter) else None


def first_index(outs: Any) -> int | None:
    """The first tape index among those that a record made."""
    return outs if isinstance(outs, int) else next((o for o in outs if o is not None), None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Context: ``observer`` observes this thread, next to the door where that is open, else as the innermost mode."""
    modes, outer, depth = modes_on(), STATE.observer, STATE.door_depth
    place = modes.index(DOOR) if DOOR in modes else len(modes)

    def put_back() -> None:
        if observer in OBSERVERS:
            OBSERVERS.remove(observer)
        STATE.observer = outer
        STATE.door_depth = depth
        set_modes(modes)
        observer.release()

    try:
        try:
            OBSERVERS.append(observer)
            STATE.observer = observer
            if DOOR in modes:
                STATE.door_depth = depth + 1
            set_modes([*modes[:place], observer, *modes[place:]])
            for interpreter in reversed(interpreter_stack()):
                observer.watch(interpreter)
            yield
        finally:
            put_back()
    except BaseException:
        put_back()  # once more: the exception may have come while the thread was put back
        raise
