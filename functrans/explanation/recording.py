"""The observer: what is told of a run, and writes down the events."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from functrans.core.interpreter import Interpreter
from functrans.core.stack import interpreter_stack
from functrans.errors.call_sites import definition
from functrans.explanation.during import During
from functrans.explanation.events import Event, Level
from functrans.explanation.looking import bytes_made
from functrans.explanation.looks import Looking
from functrans.explanation.verdicts import DECOMPOSED, LOOPED, PASSED, RULE, judge, way_back
from functrans.explanation.watching import Watch, Watched, WatchedInterpreters, watched_class
from functrans.interpreters.failures import name_of
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.operators.info import PURE, SPECIAL, OpInfo, op_info
from functrans.pytorch.dynamo import leave_alone
from functrans.pytorch.thread_state import DOOR, OBSERVERS, STATE, modes_on, set_modes
from functrans.pytorch.torch_private import Mode, OpOverload

#: What operators and programs are called, which takes a while to write down, by what is known of them.
NAMES: dict[OpInfo | str, str] = {}


def named(op: Any) -> str:
    known = op if type(op) is str else op_info(op)  # of a pull it may be a name
    name = NAMES.get(known)
    if name is None:
        if len(NAMES) > 4096:
            NAMES.clear()
        name = NAMES[known] = name_of(op)
    return name


class Observer(Mode):
    """Writes down what happens in this thread.

    It is PyTorch's innermost mode under the door, which sees what ends at the base, and it is told of interpreters and
    what these are asked (NOTE [Watched interpreters]).
    """

    supports_higher_order_operators = True

    def __init__(self, example: int) -> None:
        super().__init__()
        self.looking = Looking(example)
        self.run = Event(0, "run", "", None)
        self.during: During | None = None
        self.events: list[Event] = []
        self.levels: list[Level] = []
        #: what is watched: its level, the class that it had, and the events of its tape's records
        self.watched = WatchedInterpreters()
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
        stack = (*self.stack(interpreter.below), len(self.levels) - 1)
        self.watched.add(interpreter, Watch(self.levels[-1], was, stack, len(tape_of(interpreter) or ())))
        if cls not in self.classes:
            self.classes[cls] = watched_class(cls)
        interpreter.__class__ = self.classes[cls]

    def watch_copy(self, new: Interpreter, original: Any) -> Interpreter:
        watch = self.watched.get(original)
        if watch is not None:
            self.watched.add(new, watch)
            new.__class__ = type(original)
        return new

    def around(self, interpreter: Interpreter, body: Callable[[], Any]) -> Callable[[], Any]:
        """``body``, which is about to run at the new level of ``interpreter``."""
        self.watch(interpreter)

        def observed() -> Any:
            with During(self, "transform", interpreter.name, interpreter):
                return body()

        return observed

    def release(self) -> None:
        """Give all that is watched its class back."""
        for interpreter, watch in self.watched.items():
            interpreter.__class__ = watch.cls

    def level_of(self, interpreter: Interpreter | None) -> Level | None:
        watch = self.watched.get(interpreter)
        return None if watch is None else watch.level

    def stack(self, top: Interpreter | None) -> tuple[int, ...]:
        """The levels from ``top`` on that are watched, outermost first."""
        while top is not None:
            if (watch := self.watched.get(top)) is not None:
                return watch.stack
            top = top.below
        return ()

    @property
    def current(self) -> Event:
        """What goes on."""
        return self.run if self.during is None else self.during.event

    def new_event(self, kind: str, name: str, interpreter: Interpreter | None) -> Event:
        around, events, top = self.current, self.events, STATE.top
        if top is not None and around.kind != "base":
            self.claim_records(around)
        level = None if interpreter is None else self.level_of(interpreter)
        event = Event(len(events) + 1, kind, name, around, level, () if top is None else self.stack(top))
        events.append(event)
        around.children.append(event)
        return event

    def claim_records(self, event: Event) -> None:
        """Let what has come onto tapes since this was asked last be what ``event`` recorded."""
        interpreter = STATE.top
        while interpreter is not None:
            if isinstance(interpreter, GradInterpreter) and (tape := interpreter.tape):
                watch = self.watched.get(interpreter)
                if watch is not None and len(tape) > watch.claimed:
                    for _, outs, ins, _ in tape[watch.claimed :]:
                        watch.made_by[first_index(outs)] = event
                        event.record = event.record or (outs, ins)
                    watch.claimed = len(tape)
            interpreter = interpreter.below

    def operator(self, interpreter: Interpreter, process: Callable[..., Any], op: Any, args: Any, kwargs: Any) -> Any:
        with During(self, "operator", named(op), interpreter, op, args, kwargs) as during:
            if op_info(op).program:
                during.event.source = op.source
            out = process(interpreter, op, args, kwargs)
            during.gives(out)
        judge(during.event, interpreter, op, args, kwargs)
        return out

    def higher_order(
        self, interpreter: Interpreter, process: Callable[..., Any], op: Any, args: Any, kwargs: Any
    ) -> Any:
        with During(self, "operator", op.name(), interpreter, None, args, kwargs) as during:
            out = process(interpreter, op, args, kwargs)
            if out is not NotImplemented:
                during.event.way, during.event.place = RULE, interpreter.rule_place(op)
                during.gives(out)
        if out is NotImplemented and self.events[-1] is during.event:  # nothing happened: ``defined`` comes
            self.events.pop()
            self.current.children.pop()
        return out

    def defined(self, interpreter: Interpreter, op: Any, meaning: Callable[..., Any]) -> Callable[..., Any]:
        """``meaning``, by which the operator that takes functions will be run at a level that has no rule for it."""

        def observed(*args: Any, **kwargs: Any) -> Any:
            with During(self, "operator", op.name(), interpreter, None, args, kwargs) as during:
                during.event.way, during.event.place = DECOMPOSED, definition(meaning)
                out = meaning(*args, **kwargs)
                during.gives(out)
            return out

        return observed

    def loop(self, interpreter: Interpreter, loop: Callable[..., Any], *args: Any) -> Any:
        self.current.way = LOOPED
        return loop(interpreter, *args)

    def check(self, interpreter: Interpreter, check: Callable[..., Any], op: Any, *args: Any) -> Any:
        with During(self, "check", f"one example of {op}", interpreter):
            return check(interpreter, op, *args)

    def asked(self, name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
        """``rule``, by which a level will be asked about what is no operator: an autograd.Function, a primitive."""

        def observed(interpreter: Interpreter, *args: Any, **kwargs: Any) -> Any:
            with During(self, "operator", name, interpreter, None, args, kwargs) as during:
                event = during.event
                event.way, event.place = RULE, definition(rule)
                out = rule(interpreter, *args, **kwargs)
                if out is NotImplemented:
                    event.way = PASSED
                else:
                    during.gives(out)
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
            with During(self, "walk", f"back along the tape of {interpreter.name}", interpreter):
                return walk(interpreter, *args, **kwargs)
        finally:
            for i, (node, *rest) in enumerate(tape):
                tape[i] = originals.get(node, node), *rest

    def pull(self, interpreter: Any, node: Any, outs: Any, ins: Any, saved: Any, grad: Any) -> Any:
        watch: Any = self.watched.get(interpreter)
        op = node.operator(saved)
        with During(self, "pull", named(op), interpreter, None, (grad,)) as during:
            event = during.event
            event.record = outs, ins
            event.made_by = watch.made_by.get(first_index(outs))
            program = getattr(node, "pull_program", None)
            event.source = None if program is None else program.source
            event.way, event.place = way_back(node, op, interpreter)
            found = node.pull(saved, grad)
            during.gives(found)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = info_of(func)
        name = named(func) if known is not None else name_of(func) if isinstance(func, OpOverload) else func.name()
        if name.startswith("prim."):  # PyTorch asks a tensor of another subclass for its device: no operator
            return func(*args, **kwargs)
        with During(self, "base", name, None, func, args, kwargs) as during:
            if types and any(kind.__name__ == "DTensor" for kind in types):
                return NotImplemented  # what it is made of comes here, too
            out = func(*args, **kwargs)
            during.event.bytes = bytes_made(known is not None and known.kind == PURE, out, args, kwargs)
            if known is None or known.written or known.kind == SPECIAL:
                self.looking.forget()
                during.event.whole = self.looking.whole(out)
            during.gives(out)
        return out


leave_alone(Observer.__torch_dispatch__)


def info_of(op: Any) -> OpInfo | None:
    """What is known of an operator; None: it takes functions, or is one that PyTorch has but a name for."""
    try:
        return op_info(op) if isinstance(op, OpOverload) else None
    except RuntimeError:  # aten.dim of a jagged tensor, in PyTorch 2.11
        return None


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
