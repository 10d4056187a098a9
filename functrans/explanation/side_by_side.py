"""A diff as text: two columns, and the first difference in full."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from functrans.explanation.events import Event
from functrans.explanation.text import Style, draw, headline, nodes, notes, place_text, places_text

if TYPE_CHECKING:
    from functrans.explanation.comparing import Diff, Row

#: The mark in front of a row, by its status.
MARKS = {"same": " ", "otherwise": "~", "different": "≠", "left only": "<", "right only": ">"}


def as_text(diff: Diff, width: int) -> str:
    lines = [f"diff({diff.left.name}, {diff.right.name})"]
    last = None
    for row in diff.rows:
        line = lines_of(row)
        if line and line != last:
            lines.append(f"    {line}")
        last = line
        if row is diff.first:
            lines += first(row, diff)
        lines += in_columns(row, width)
    lines.append(counted(diff))
    if diff.left.error is None and diff.right.error is None:
        lines.append(f"results: {diff.results or 'the same'}")
    if diff.first is not None:
        lines += first_in_full(diff.first, diff)
    return "\n".join(lines)


def counted(diff: Diff) -> str:
    """How many steps are of which status."""
    counts = {status: sum(row.status == status for row in diff.rows) for status in MARKS}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "no steps"


def in_columns(row: Row, width: int) -> Iterator[str]:
    for left, right in itertools.zip_longest(map(headline, row.left), map(headline, row.right), fillvalue=""):
        yield f"{MARKS[row.status]} {clipped(left, width):{width}} | {clipped(right, width)}".rstrip()


def clipped(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def lines_of(row: Row) -> str:
    """The user's lines that a step belongs to: one, or that of each side."""
    found = [line for events in (row.left, row.right) if events and (line := line_of(events[-1])) is not None]
    return " | ".join(dict.fromkeys(found))


def line_of(event: Event) -> str | None:
    """The user's line that a step belongs to."""
    site = event.site if event.kind != "pull" else None if event.made_by is None else event.made_by.site
    if site is None:
        return None
    return f"{'back: ' * (event.kind == 'pull')}{place_text(f'{site.file}:{site.line}')}  {site.text}".rstrip()


def first(row: Row, diff: Diff) -> Iterator[str]:
    """What is said of the first difference, in front of its row."""
    yield f"▶ first difference{' in the way' if row.status == 'otherwise' else ''}{': ' if row.why else ''}{row.why}"
    if row.status != "otherwise":
        for one in itertools.takewhile(lambda one: one is not row, diff.rows):
            if one.status in ("same", "otherwise") and one.why:
                yield f"  before, {headline(one.event)} has the same numbers, but {one.why}"
                yield f"  {' against '.join(taken(events[-1]) for events in (one.left, one.right))}"
                break
    if row.before:
        yield f"  its arguments differ already, {row.before}"
    if row.inside is not None:
        yield f"  inside, {headline(row.inside.event)}: {row.inside.why}"
        yield f"  {' against '.join(taken(*events) for events in (row.inside.left, row.inside.right))}"


def taken(event: Event) -> str:
    return f"{event.way}{'' if event.place is None else f', {places_text(event.place)}'}"


def first_in_full(row: Row, diff: Diff) -> Iterator[str]:
    """Both sides of the first difference, with what is inside of the innermost."""
    style = Style(numbers=True)
    within = row.inside or row
    for side, explanation, events in (("left", diff.left, row.left), ("right", diff.right, row.right)):
        yield ""
        yield f"{side}, {explanation.name}{'' if events else ': nothing'}"
        innermost = within.left if side == "left" else within.right
        for event in events if within is row else (*events, *innermost):
            yield headline(event)
            yield from notes(event, style)
            if event in innermost:
                yield from draw(nodes(event.children, event.site, style))
