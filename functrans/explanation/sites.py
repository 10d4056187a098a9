"""The user's line behind a frame, as explanations show it."""

from __future__ import annotations

import functools
import itertools
import linecache
import os
from types import CodeType, FrameType

from functrans.core.errors.call_sites import OURS, is_users, line_of
from functrans.explanation.events import Site

#: The code of transforms, and what of it calls the user's function, or does nothing but call operators.
TRANSFORMS = OURS + "api" + os.sep
DIRECT = tuple(TRANSFORMS + name for name in ("checks.py", "rearrange.py"))


def site_of(frame: FrameType | None) -> tuple[Site | None, bool]:
    """The innermost line outside of functrans, PyTorch and Python's library behind ``frame``, and whether it called
    what goes on by itself, and not a transform, which did so."""
    transform = ""
    while frame is not None and not is_users(name := frame.f_code.co_filename):
        if not transform and name.startswith(TRANSFORMS):
            transform = name  # the innermost one
        frame = frame.f_back
    direct = not transform or transform in DIRECT
    return (None, direct) if frame is None else (described(frame.f_code, frame.f_lasti), direct)


@functools.lru_cache(maxsize=4096)
def described(code: CodeType, offset: int) -> Site:
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
