"""The user's line behind a frame, as explanations show it."""

from __future__ import annotations

import itertools
import linecache
import os
from types import CodeType, FrameType
from typing import NamedTuple

from functrans.errors.call_sites import OURS, is_users, line_of
from functrans.explanation.events import Site

#: The code of transforms, and what of it calls the user's function, or does nothing but call operators.
TRANSFORMS = OURS + "api" + os.sep
DIRECT = tuple(TRANSFORMS + name for name in ("checks.py", "rearrange.py"))

#: By file name, whose code it is: the user's, that of a transform, or other code of libraries.
USERS, TRANSFORM, OTHER = "users", "transform", "other"
KINDS: dict[str, str] = {}


class Origin(NamedTuple):
    """Where what goes on was called from."""

    #: the innermost line outside of functrans, PyTorch and Python's library
    site: Site | None
    #: whether that line called it by itself, and not a transform, which did so
    direct: bool
    #: whether the line is inside of the event that goes on
    new: bool


def origin_of(frame: FrameType | None, around: FrameType | None, outer: Origin | None) -> Origin:
    """The origin of what goes on in ``frame``; ``outer`` is that of the event which goes on in the frame ``around``."""
    direct = True
    asked = False
    while frame is not None:
        if frame is around and outer is not None:
            same = not (outer.new or (asked and direct is not outer.direct))
            return outer if same else Origin(outer.site, direct if asked else outer.direct, False)
        name = frame.f_code.co_filename
        try:
            kind = KINDS[name]
        except KeyError:
            kind = kind_of(name)
        if kind is USERS:
            return Origin(described(frame.f_code, frame.f_lasti), direct, True)
        if kind is TRANSFORM and not asked:
            direct, asked = name in DIRECT, True  # the innermost one says
        frame = frame.f_back
    return Origin(None, direct, True)


def kind_of(name: str) -> str:
    kind = USERS if is_users(name) else TRANSFORM if name.startswith(TRANSFORMS) else OTHER
    KINDS[name] = kind
    return kind


#: What is known of lines, by the number that Python knows their code by; it is held, so that no other gets that number.
#: (Code that Dynamo has written need not be hashable.)
SITES: dict[tuple[int, int], tuple[CodeType, Site]] = {}


def described(code: CodeType, offset: int) -> Site:
    known = SITES.get((id(code), offset))
    if known is None:
        if len(SITES) > 4096:
            SITES.clear()
        known = SITES[id(code), offset] = code, site_at(code, offset)
    return known[1]


def site_at(code: CodeType, offset: int) -> Site:
    line = line_of((code, offset))
    text = linecache.getline(code.co_filename, line)
    return Site(code.co_filename, line, code.co_name, text.strip(), columns_of(code, offset, line, text))


def columns_of(code: CodeType, offset: int, line: int, text: str) -> tuple[int, int] | None:
    """Where in the text of its line, which is stripped, an instruction's expression stands."""
    positions = getattr(code, "co_positions", None)
    if positions is None or not text:
        return None
    first, last, start, end = next(itertools.islice(positions(), offset // 2, None))
    if first != line or last != line or start is None:
        return None
    indent = len(text) - len(text.lstrip())
    before, inside = text.encode()[:start], text.encode()[start:end]  # the columns are those of bytes
    left = len(before.decode(errors="replace")) - indent
    return left, left + len(inside.decode(errors="replace"))
