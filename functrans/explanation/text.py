"""An explanation as text: a tree with a line for each event, and lines below it for what took it."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from functrans.errors.call_sites import OURS, PACKAGES, TORCH
from functrans.explanation.events import Event, Site
from functrans.explanation.looking import number_text
from functrans.explanation.looks import Look
from functrans.explanation.verdicts import BORROWED, CONSTANT, LOOPED, PASSED

if TYPE_CHECKING:
    from functrans.explanation.explanation import Explanation

#: The ways that a reader should not overlook.
MARKED = (BORROWED, LOOPED)


@dataclass(frozen=True)
class Style:
    """What a tree is shown with."""

    costs: bool = False
    numbers: bool = False
    checks: bool = False


class Node(NamedTuple):
    """A line of a tree, the lines that belong to it, and what is inside."""

    line: str
    notes: list[str]
    inside: list[Node]


def as_text(explanation: Explanation, style: Style) -> str:
    outermost = [event for event in explanation if event.parent is None or event.parent.kind == "run"]
    lines = [f"explain({explanation.name})", *draw(nodes(outermost, None, style))]
    if explanation.error is not None:
        lines.append(f"ended by {type(explanation.error).__name__}: {explanation.error}")
    return "\n".join(lines)


def as_summary(explanation: Explanation) -> str:
    lines = []
    for level in reversed(explanation.levels):
        mine = [event for event in explanation if event.level is level]
        ways = Counter(event.way for event in mine if event.kind == "operator")
        counts = [f"{'! ' if way in MARKED else ''}{count} {way}" for way, count in ways.items() if way]
        pulled = sum(event.kind == "pull" for event in mine)
        counts += [f"{pulled} pulled back"] if pulled else []
        lines.append(f"level {level.level} {level.name}: {', '.join(counts) or 'nothing'}")
    return "\n".join([*lines, f"base: {len(explanation.base_operators())} operators"])


def draw(inside: list[Node]) -> Iterator[str]:
    for node in inside:
        corner, edge = ("└ ", "  ") if node is inside[-1] else ("├ ", "│ ")
        yield corner + node.line
        yield from (edge + line for line in itertools.chain(node.notes, draw(node.inside)))


def nodes(events: Iterable[Event], around: Site | None, style: Style) -> list[Node]:
    """Events as a tree; those that one line of the user's called stand under that line."""
    shown = [event for event in events if event.kind != "check" or style.checks]

    def line(event: Event) -> tuple[Any, ...] | None:
        return place_of(event.site) if event.is_written and place_of(event.site) != place_of(around) else None

    found: list[Node] = []
    for key, group in itertools.groupby(shown, line):
        inside = [Node(headline(e, style), [*notes(e, style)], nodes(e.children, e.site, style)) for e in group]
        found += inside if key is None else [Node(f"{place_text(key[0])}:{key[1]}  {key[2]}".rstrip(), [], inside)]
    return found


def place_of(site: Site | None) -> tuple[Any, ...] | None:
    return None if site is None else (site.file, site.line, site.text)


def headline(event: Event, style: Style = Style()) -> str:
    """The line of one event."""
    level: Any = event.level
    returned = f" -> {event.returned}" if event.returned else ""
    if event.kind == "transform":
        text = f"{event.name} is level {level.level}{''.join(f', {about}' for about in level.about)}"
    elif event.kind == "walk":
        text = f"walk {event.name}, level {level.level}"
    elif event.kind == "check":
        text = f"check whether {event.name} is taken"
    elif event.kind == "pull":
        text = f"pull {record_text(event)}  {event.name} of the cotangent {event.given}{returned}"
    else:
        where = "base" if event.kind == "base" else f"level {level.level} {level.kind}"
        text = f"{where}  {event.name}({event.given}){returned}"
    if event.error is not None:
        text += f"  ended by {event.error.splitlines()[0]}"
    if style.costs:
        text += f"  [{event.nanoseconds / 1000:.0f} µs{f', {event.bytes} B' if event.bytes else ''}]"
    return text


def notes(event: Event, style: Style) -> Iterator[str]:
    """The lines below that of an event: what took it, what its arguments carry, a few numbers."""
    if event.way:
        place = "" if event.place is None else f", {places_text(event.place)}"
        recorded = f", recorded as {record_text(event)}" if event.kind == "operator" and event.record else ""
        made = "" if event.made_by is None else f", made at {event_place(event.made_by)}"
        yield f"· {'! ' if event.way in MARKED else ''}{event.way}{place}{recorded}{made}"
    if event.kind == "operator" and event.way not in (CONSTANT, PASSED):
        carried = [f"{look.name}: {own}" for look in event.takes if (own := own_layer(look, event))]
        if carried:
            yield f"· {'; '.join(carried)}"
    if style.numbers:
        for look in event.gives:
            for part, x in look.numbers.items():
                yield f"= {look.name}{' ' * bool(look.name)}{part} {number_text(x)}"


def own_layer(look: Look, event: Event) -> str:
    """What the transform of an event keeps on a tensor, as text."""
    head = f"level {event.level.level} {event.level.kind}, " if event.level is not None else ""
    found = next((layer for layer in look.layers[:-1] if layer.startswith(head)), None)
    return "" if found is None else found.removeprefix(head)


def record_text(event: Event) -> str:
    """``3 <- 1, 2``: the tape indices of outputs and inputs."""
    if event.record is None:
        return ""
    outs, ins = event.record
    return f"{indices(outs)} <- {indices(ins)}"


def indices(x: Any) -> str:
    return ", ".join(map(indices, x)) if isinstance(x, list | tuple) else "-" if x is None else str(x)


def event_place(event: Event) -> str:
    """The user's line in which an event happened."""
    return f"step {event.number}" if event.site is None else place_text(f"{event.site.file}:{event.site.line}")


def places_text(places: str) -> str:
    return ", ".join(place_text(place) for place in places.split(", "))


def place_text(place: str) -> str:
    """``file:line`` as one would say it: inside of the package, of PyTorch, of other packages, or of the project."""
    if place.startswith(OURS):
        return "functrans/" + place[len(OURS) :].replace(os.sep, "/")
    if place.startswith(TORCH):
        return "torch/" + place[len(TORCH) :].replace(os.sep, "/")
    for packages in PACKAGES:
        if place.startswith(packages):
            return place[len(packages) :].replace(os.sep, "/")
    here = os.getcwd() + os.sep
    return place[len(here) :].replace(os.sep, "/") if place.startswith(here) else place
