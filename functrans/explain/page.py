"""The page of an explanation: one file with everything in it."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any


def page(records: dict[str, Any]) -> str:
    """The page that shows ``records``, which are as ``functrans/explain/records.py`` says."""
    here = files("functrans.explain")
    parts = {
        "TITLE": html.escape(f"explain: {records['name']}"),
        "STYLE": here.joinpath("page.css").read_text(encoding="utf-8"),
        "SCRIPT": here.joinpath("page.js").read_text(encoding="utf-8"),
        "RECORDS": as_inert_json(records),
    }
    before, *rest = here.joinpath("page.html").read_text(encoding="utf-8").split("<!--")
    return before + "".join(parts[part.split("-->")[0].strip()] + part.split("-->", 1)[1] for part in rest)


def as_inert_json(x: Any) -> str:
    """JSON that may stand in a page: nothing in it ends the script element that it is in, or begins another."""
    text = json.dumps(x, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
