"""The page of a diff: both sides in columns, a fold for what is inside of each step, the first difference marked."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from functrans.explanation.events import Event
from functrans.explanation.side_by_side import MARKS, counted, first, line_of
from functrans.explanation.text import Style, draw, headline, nodes, notes
from functrans.pictures import variables

if TYPE_CHECKING:
    from functrans.explanation.comparing import Diff, Row


def diff_page(diff: Diff) -> str:
    """The page that shows a diff. It has no script: steps fold by themselves."""
    levels = max((level.level for side in (diff.left, diff.right) for level in side.levels), default=0)
    here = files("functrans.explanation")
    results = "" if diff.left.error or diff.right.error else f"; results: {diff.results or 'the same'}"
    found = "nothing differs" if diff.first is None else '<a href="#first">the first difference</a>'
    return Template(here.joinpath("diff.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(f"diff({diff.left.name}, {diff.right.name})"),
        light=variables(levels),
        dark=variables(levels, dark=True),
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        counts=html.escape(counted(diff) + results),
        found=found,
        left=html.escape(diff.left.name),
        right=html.escape(diff.right.name),
        rows="\n".join(rows(diff)),
    )


def rows(diff: Diff) -> Iterator[str]:
    last: list[str] | None = None
    for row in diff.rows:
        lines = [line_of(events[-1]) or "" if events else "" for events in (row.left, row.right)]
        if any(lines) and lines != last:
            yield f'<div class="sides line">{"".join(f"<div>{html.escape(line)}</div>" for line in lines)}</div>'
        last = lines
        yield one_row(row, diff)


def one_row(row: Row, diff: Diff) -> str:
    said = f'<p class="why" id="first">{html.escape(chr(10).join(first(row, diff)))}</p>' if row is diff.first else ""
    heads = "".join(f"<div>{'<br>'.join(map(head, events))}</div>" for events in (row.left, row.right))
    inside = "".join(f"<pre>{html.escape(chr(10).join(in_full(events)))}</pre>" for events in (row.left, row.right))
    opened = " open" if row is diff.first else ""
    return (
        f'{said}<details class="{row.status.replace(" ", "-")}"{opened}><summary><b title="{row.status}">'
        f'{MARKS[row.status]}</b>{heads}</summary><div class="sides">{inside}</div></details>'
    )


def head(event: Event) -> str:
    level = 0 if event.level is None else event.level.level
    hue = f"var(--level-{level}-line)" if level else "var(--base-line)"
    return f'<span style="--hue: {hue}">{html.escape(headline(event))}</span>'


def in_full(events: tuple[Event, ...]) -> Iterator[str]:
    """Steps with what took them, their numbers, and all that is inside."""
    style = Style(numbers=True)
    for event in events:
        yield headline(event)
        yield from itertools.chain(notes(event, style), draw(nodes(event.children, event.site, style)))
