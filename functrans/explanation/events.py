"""What an explanation is made of: events, each inside of another, in the order in which they began."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from functrans.explanation.looks import Look, looks
from functrans.programs.program import names as letters
from functrans.pytorch.torch_private import OpOverload
from functrans.tensors.described import given, shown


@dataclass(frozen=True)
class Site:
    """A line of the user's."""

    file: str
    line: int
    function: str
    text: str
    #: where in the line the call stands; None where Python does not say (before 3.11), or where it takes several lines
    columns: tuple[int, int] | None


@dataclass(frozen=True)
class Level:
    """An interpreter that ran."""

    #: its place among those of the explanation
    number: int
    level: int
    kind: str
    name: str
    about: tuple[str, ...]
    #: where the transformed function is defined
    place: str | None


@dataclass(eq=False)
class Event:
    """Something that happened.

    Its kind is one of

    - ``transform``: a function ran at a new level;
    - ``operator``: a level was asked about an operator;
    - ``base``: plain PyTorch ran an operator;
    - ``walk``: the tape of a level was walked backwards; ``pull``: one record of it was pulled back;
    - ``check``: vmap looked whether one example is taken at all.
    """

    number: int
    kind: str
    name: str
    parent: Event | None
    level: Level | None = None
    #: the levels that were running, outermost first
    stack: tuple[int, ...] = ()
    site: Site | None = field(default=None, init=False)
    #: whether the user's line itself called it, and not a transform that the line called
    direct: bool = field(default=False, init=False)
    #: the operator, and how its arguments and results looked (see NOTE [Looks are taken at once and read later])
    op: Any = field(default=None, init=False)
    arguments: tuple[Any, Any] = field(default=((), {}), init=False)
    results: Any = field(default=None, init=False)
    #: how the tensor looked to a view of which plain PyTorch wrote, after that
    whole: Any = field(default=None, init=False)
    #: what took it: one of ``functrans.explanation.verdicts.WAYS``
    way: str = field(default="", init=False)
    #: where what took it is written
    place: str | None = field(default=None, init=False)
    #: the operators of a program as Python
    source: str | None = field(default=None, init=False)
    #: the tape indices of outputs and inputs of the record that was made, or is pulled back
    record: tuple[Any, Any] | None = field(default=None, init=False)
    #: of a pull: the event in which its record was made
    made_by: Event | None = field(default=None, init=False)
    #: the error that ended it
    error: str | None = field(default=None, init=False)
    nanoseconds: int = field(default=0, init=False)
    #: new memory for results, of plain PyTorch, all together
    bytes: int = field(default=0, init=False)
    children: list[Event] = field(default_factory=list, init=False)

    @cached_property
    def given(self) -> str:
        """The arguments of the call, as messages show them."""
        return given(*self.arguments)

    @cached_property
    def returned(self) -> str:
        """The results of the call, as messages show them."""
        return "" if self.results is None else shown(self.results)

    @cached_property
    def takes(self) -> list[Look]:
        """The tensors among the arguments."""
        args, kwargs = self.arguments
        return looks([*zip(names_of(self.op, len(args)), args, strict=True), *kwargs.items()])

    @cached_property
    def gives(self) -> list[Look]:
        """The tensors among the results."""
        return looks([("", self.results)])

    def walk(self) -> Iterator[Event]:
        """This event and all inside of it, in order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def path(self) -> list[Event]:
        """The events around this one, outermost first, and itself."""
        return [*(self.parent.path() if self.parent is not None and self.parent.parent is not None else []), self]

    @property
    def is_written(self) -> bool:
        """Whether it is an operator that a user's function called, and not one that a level sent down."""
        return self.direct and self.kind in ("operator", "base") and not inside_of_a_rule(self.parent)

    def __repr__(self) -> str:
        level = "" if self.level is None else f" at level {self.level.level}, {self.level.kind}"
        return f"<Event {self.number}: {self.kind} {self.name}{level}>"


def inside_of_a_rule(event: Event | None) -> bool:
    """Whether ``event`` is, or is inside of, what a level does with an operator, or a pull."""
    while event is not None:
        if event.kind in ("operator", "pull", "check"):
            return True
        event = event.parent
    return False


def names_of(op: Any, count: int) -> list[str]:
    """What an operator calls its first ``count`` arguments; of what is no operator, their places."""
    names = [a.name for a in op._schema.arguments] if isinstance(op, OpOverload) else []
    if hasattr(op, "instructions"):  # a program, whose Python has these
        names = [*itertools.islice(letters(), count)]
    return [*names[:count], *map(str, range(len(names), count))]
