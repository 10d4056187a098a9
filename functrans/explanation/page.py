"""The page of an explanation: one file with everything in it."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template
from typing import Any


def page(records: dict[str, Any]) -> str:
    """The page that shows ``records``, which are as ``functrans/explanation/records.py`` says."""
    here = files("functrans.explanation")
    parts = {name: here.joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return Template(parts["html"]).substitute(
        title=html.escape(f"explain: {records['name']}"),
        style=parts["css"],
        script=parts["js"],
        records=as_inert_json(records),
    )


def as_inert_json(x: Any) -> str:
    """JSON that may stand in a page: nothing in it ends the script element that it is in, or begins another."""
    text = json.dumps(x, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
