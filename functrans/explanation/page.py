"""The page of an explanation: one file with everything in it."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

from functrans.explanation.drawings import Drawings
from functrans.explanation.records import as_records
from functrans.pictures import variables

if TYPE_CHECKING:
    from functrans.explanation.explanation import Explanation


def page(explanation: Explanation) -> str:
    """The page that shows an explanation: its records with pictures, a script that reads them, and a style sheet."""
    records = with_pictures(explanation)
    levels = max((level.level for level in explanation.levels), default=0)
    here = files("functrans.explanation")
    parts = {name: here.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return Template(parts["html"]).substitute(
        title=html.escape(f"explain: {records['name']}"),
        light=variables(levels),
        dark=variables(levels, dark=True),
        style=parts["css"],
        script=parts["js"],
        records=as_inert_json(records),
    )


def with_pictures(explanation: Explanation) -> dict[str, Any]:
    """The records of an explanation, with ``pictures`` and their ``lines``; ``picture`` of an event, a value: which."""
    records, drawings = as_records(explanation), Drawings(explanation)
    for event, stack, values in zip(records["events"], drawings.stacks, drawings.values, strict=True):
        event["picture"] = stack
        for looks, places in zip((event["takes"], event["gives"]), values, strict=True):
            for look, place in zip(looks, places, strict=True):
                look["picture"] = place
    return {**records, "pictures": drawings.pictures, "lines": drawings.lines}


def as_inert_json(x: Any) -> str:
    """JSON that may stand in a page: nothing in it ends the script element that it is in, or begins another."""
    text = json.dumps(x, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
