"""The pictures on the page of an explanation: the stack at each event with its operator on the way down, and values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from functrans.explanation.events import Event
from functrans.explanation.looks import Look
from functrans.explanation.text import record_text
from functrans.pictures import stack_picture, value_picture

if TYPE_CHECKING:
    from functrans.explanation.explanation import Explanation

#: So many lines and characters a step of a picture has.
LINES, WIDTH = 4, 40
#: In front of what the chosen event is.
HERE = "▸ "


class Drawings:
    """The pictures of an explanation, each once.

    Attributes:
        lines: the lines of all SVG files, most of which are in many of them.
        pictures: the files, each as the places of its lines.
        stacks: by event, the place of its picture among them.
        values: by the event's ``takes`` and ``gives``, the same.
    """

    def __init__(self, explanation: Explanation) -> None:
        self.places: dict[str, int] = {}
        self.stacks = [self.place(stack_of(event, explanation)) for event in explanation.events]
        self.values = [(self.places_of(event.takes), self.places_of(event.gives)) for event in explanation.events]
        lines: dict[str, int] = {}
        self.pictures = [[lines.setdefault(line, len(lines)) for line in svg.splitlines()] for svg in self.places]
        self.lines = list(lines)

    def place(self, picture: str) -> int:
        return self.places.setdefault(picture, len(self.places))

    def places_of(self, looks: list[Look]) -> list[int | None]:
        """The pictures of values; None for a tensor of the base, which is what its text says."""
        boxes = [look.seen.boxes() for look in looks]
        return [self.place(value_picture(layers)) if len(layers) > 1 else None for layers in boxes]


def stack_of(event: Event, explanation: Explanation) -> str:
    """The levels that run at an event; of an operator, what becomes of it at each of them."""
    levels = [explanation.levels[number] for number in event.stack]
    names = [level.name for level in levels]
    if event.level is not None and event.level not in levels and event.level.level == len(names) + 1:
        names.append(f"{event.level.name}, ended")
        levels.append(event.level)
    if event.kind not in ("operator", "base", "pull"):
        return stack_picture(names)
    first = event
    while first.parent is not None and first.parent.kind == "operator":
        first = first.parent
    steps: dict[int, list[str]] = {}
    for step in (*event.path(), *below(event)):
        if step.number >= first.number and (step.level is None or step.level in levels):
            number = 0 if step.level is None else step.level.level
            steps.setdefault(number, []).append(HERE * (step is event) + said(step, first))
    texts = {level: "\n".join(shortened(lines)) for level, lines in steps.items()}
    label = f"pull of {first.name}" if first.kind == "pull" else first.name
    return stack_picture(names, operator="\n".join(shortened([label])), steps=texts)


def below(event: Event) -> Iterator[Event]:
    """The operators that an event comes to, without those of checks."""
    for child in event.children:
        if child.kind in ("operator", "base"):
            yield child
        if child.kind != "check":
            yield from below(child)


def said(step: Event, first: Event) -> str:
    """What becomes of the operator at a level."""
    if step.kind == "base":
        return step.name
    record = f"{'pull' if step.kind == 'pull' else 'recorded as'} {record_text(step)}" if step.record else ""
    name = "" if step.name == first.name else f"{step.name}: "
    return name + ", ".join(filter(None, [step.way, record]))


def shortened(lines: list[str]) -> list[str]:
    """A few lines, none of them long."""
    more = [f"{len(lines) - LINES + 1} more"] if len(lines) > LINES else []
    kept = lines[: LINES - 1] if more else lines
    return [line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in [*kept, *more]]
