"""An explanation as plain data: what ``to_json()`` writes and the page reads.

version    1
name       the function's name
example    the example whose numbers are shown
error      the error that ended the run, or null
ways       what each way of taking an operator means
levels     [{level, kind, name, about, place}], in the order in which they were entered
files      [{name, path, first, lines}]: the user's source around what it called; the first line's number
events     [{...}], in the order in which they began; an event is its number, from 1 on:
    number, parent (0: none), kind, name, level (place among the levels; null: the base), stack (such places)
    file (place among the files), line, function, columns ([from, to] in the stripped line, or null), text
    given, returned (as text), takes, gives ([{name, text, layers, numbers}], numbers as text by part)
    way, place, source, record ([outs, ins] as text), made_by (event), error, nanoseconds, bytes
"""

from __future__ import annotations

import linecache
from typing import TYPE_CHECKING, Any

from functrans.explanation.events import Event
from functrans.explanation.looking import number_text
from functrans.explanation.looks import Look
from functrans.explanation.text import indices, place_text, places_text
from functrans.explanation.verdicts import WAYS

if TYPE_CHECKING:
    from functrans.explanation.explanation import Explanation

#: So many lines of a file are shown before the first and after the last line that called something.
AROUND = 12


def as_records(explanation: Explanation) -> dict[str, Any]:
    files = files_of(explanation.events)
    numbers = {name: i for i, name in enumerate(files)}
    return {
        "version": 1,
        "name": explanation.name,
        "example": explanation.example,
        "error": None if explanation.error is None else f"{type(explanation.error).__name__}: {explanation.error}",
        "ways": WAYS,
        "levels": [
            {
                "level": level.level,
                "kind": level.kind,
                "name": level.name,
                "about": list(level.about),
                "place": level.place and place_text(level.place),
            }
            for level in explanation.levels
        ],
        "files": list(files.values()),
        "events": [record_of(event, numbers) for event in explanation.events],
    }


def files_of(events: list[Event]) -> dict[str, dict[str, Any]]:
    """The user's files by their names, and the part of each that called something."""
    called: dict[str, list[int]] = {}
    for event in events:
        if event.site is not None:
            called.setdefault(event.site.file, []).append(event.site.line)
    found = {}
    for name, lines in called.items():
        text = linecache.getlines(name)
        first = max(min(lines) - AROUND, 1)
        shown = [line.rstrip("\n") for line in text[first - 1 : max(lines) + AROUND]]
        found[name] = {"name": place_text(name), "path": name, "first": first, "lines": shown}
    return found


def record_of(event: Event, files: dict[str, int]) -> dict[str, Any]:
    site = event.site
    return {
        "number": event.number,
        "parent": 0 if event.parent is None else event.parent.number,
        "kind": event.kind,
        "name": event.name,
        "level": None if event.level is None else event.level.number,
        "stack": list(event.stack),
        "written": event.is_written,
        "file": None if site is None else files[site.file],
        "line": None if site is None else site.line,
        "function": None if site is None else site.function,
        "columns": None if site is None or site.columns is None else list(site.columns),
        "text": None if site is None else site.text,
        "given": event.given,
        "returned": event.returned,
        "takes": [look_record(look) for look in event.takes],
        "gives": [look_record(look) for look in event.gives],
        "way": event.way or None,
        "place": event.place and places_text(event.place),
        "source": event.source,
        "record": None if event.record is None else [indices(event.record[0]), indices(event.record[1])],
        "made_by": None if event.made_by is None else event.made_by.number,
        "error": event.error,
        "nanoseconds": event.nanoseconds,
        "bytes": event.bytes,
    }


def look_record(look: Look) -> dict[str, Any]:
    numbers = {part: number_text(x) for part, x in look.numbers.items()}
    return {"name": look.name, "text": look.text, "layers": list(look.layers), "numbers": numbers}
