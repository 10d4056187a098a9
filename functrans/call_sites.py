"""Where in the user's code something happened: the innermost line outside of functrans, PyTorch and Python's standard library.

A wrapper notes where it was made, for every operator, so a look must cost next to nothing where the caller is the user: one
look-up by file name. Only from library code (``torch.nn.Linear``, say) are the frames walked.
"""

from __future__ import annotations

import linecache
import os
import sys
from types import CodeType, FrameType
from typing import Any

import optree
import torch

#: A place in code: the code object and the offset of the instruction.
Site = tuple[CodeType, int]

#: What a file is to us: user code; library code that user code calls; library code that runs while an operator is handled, whose
#: results get the operator's place.
USER, LIBRARY, WITHIN = 0, 1, 2

#: The file name that the code of programs has.
PROGRAM_FILE = "<functrans program>"

OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
PACKAGES = tuple(STANDARD + name + os.sep for name in ("site-packages", "dist-packages"))
OPTREE = os.path.dirname(os.path.abspath(optree.__file__)) + os.sep
#: Modules of the package whose code users call.
CALLED = ("batching", "custom_function", "door", "extend", "jacobians", "modules", "stack", "tensor", "transforms")


class Files(dict[str, int]):
    """By file name, what the file is to us."""

    def __missing__(self, name: str) -> int:
        kind = self[name] = kind_of(os.path.abspath(name) if os.path.exists(name) else name)
        return kind


def kind_of(path: str) -> int:
    if path.startswith(OURS):
        rest = path[len(OURS) :]
        if rest.startswith("tour" + os.sep):
            return USER
        return LIBRARY if rest.removesuffix(".py") in CALLED else WITHIN
    if path == PROGRAM_FILE or path.startswith(tuple(TORCH + part for part in ("_decomp", "_refs", "_prims"))):
        return WITHIN
    if path.startswith((TORCH, OPTREE, "<frozen ")):
        return LIBRARY
    return LIBRARY if path.startswith(STANDARD) and not path.startswith(PACKAGES) else USER


FILES = Files()


def site_from(frame: FrameType) -> Site | None:
    """The user's line behind ``frame``; None if it was called while an operator was handled."""
    at: FrameType | None = frame
    while at is not None:
        code = at.f_code
        kind = FILES[code.co_filename]
        if kind == USER:
            return code, at.f_lasti
        if kind == WITHIN:
            return None
        at = at.f_back
    return None


def user_site(frame: FrameType | None) -> Site | None:
    """The user's line behind ``frame``, whatever is between."""
    while frame is not None:
        if FILES[frame.f_code.co_filename] == USER:
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
    return None


def frames_to_user() -> int:
    """The ``stacklevel`` with which a warning, given by the caller of this function, names the user's line."""
    level, frame = 1, sys._getframe(1)
    while FILES[frame.f_code.co_filename] != USER and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    return level


def line_of(site: Site) -> int:
    code, offset = site
    for start, end, number in code.co_lines():
        if start <= offset < end and number is not None:
            return number
    return code.co_firstlineno


def place(site: Site) -> str:
    """``file:line, in function``."""
    return f"{site[0].co_filename}:{line_of(site)}, in {site[0].co_name}"


def source_line(site: Site) -> str:
    """The text of the line, where it can be read."""
    return linecache.getline(site[0].co_filename, line_of(site)).strip()


def definition(function: Any) -> str | None:
    """``file:line`` of a Python function, or None."""
    code = getattr(function, "__code__", None)
    if code is None:
        inner = getattr(function, "__wrapped__", None) or getattr(function, "func", None) or getattr(type(function), "forward", None)
        return None if inner is None else definition(inner)
    return f"{code.co_filename}:{code.co_firstlineno}"
