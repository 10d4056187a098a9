"""Where in the user's code something happened: the innermost line outside of functrans, PyTorch and Python's library.

A wrapper notes where it was made, for every operator, so a look must cost next to nothing where the caller is the user:
one look-up by file name. Only from library code (``torch.nn.Linear``, say) are the frames walked.
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

#: The file name that the code of programs has.
PROGRAM_FILE = "<functrans program>"

OURS = os.path.abspath(os.path.join(__file__, *[os.pardir] * 2)) + os.sep
TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
PACKAGES = tuple(STANDARD + name + os.sep for name in ("site-packages", "dist-packages"))
OPTREE = os.path.dirname(os.path.abspath(optree.__file__)) + os.sep
#: Modules of the package whose code users call.
CALLED_BY_USERS = (
    "api/arguments", "api/batches", "api/forward", "api/functionalize", "api/jacobians", "api/linear", "api/modules",
    "api/pullbacks", "api/rearrange", "api/reverse", "api/rows_and_columns", "api/transforms", "api/vmap",
    "boundary/made_at", "core/interpreter", "core/stack", "core/tensor", "door/autograd_function", "door/backward",
    "door/entrances", "door/leaves", "door/operator_entrances", "door/program_entrances", "door/torch_dispatch",
    "door/torch_function", "explanation/comparing", "explanation/explaining", "explanation/recording",
    "explanation/trace", "explanation/watching", "extend", "interpreters/function_context",
    "interpreters/grad/function", "interpreters/jvp/function", "interpreters/vmap/function", "tensors/answers",
)  # fmt: skip

#: PyTorch's modules through which any call may come.
IN_BETWEEN = tuple(
    TORCH + os.path.join(*name.split("/"))
    for name in ("_compile", "_dynamo", "_jit_internal", "_ops", "_prims_common/wrappers", "_tensor", "functional",
                 "nn/modules/module", "overrides", "utils/_contextlib", "utils/_device", "utils/_python_dispatch")
)  # fmt: skip

#: File names met so far: of user code; of library code that user code calls; of library code that runs while an
#: operator is handled, whose results get the operator's place.
USER_FILES: set[str] = set()
LIBRARY_FILES: set[str] = set()
WITHIN_FILES: set[str] = set()


def is_users(name: str) -> bool:
    """Whether the code of the file ``name`` is the user's."""
    if name not in USER_FILES and name not in LIBRARY_FILES and name not in WITHIN_FILES:
        kind_of(os.path.abspath(name) if os.path.exists(name) else name).add(name)
    return name in USER_FILES


def kind_of(path: str) -> set[str]:
    if path.startswith(OURS):
        rest = path[len(OURS) :]
        if rest.startswith(("tour" + os.sep, os.path.join("explanation", "demo"))):
            return USER_FILES
        return LIBRARY_FILES if rest.removesuffix(".py").replace(os.sep, "/") in CALLED_BY_USERS else WITHIN_FILES
    if path == PROGRAM_FILE or path.startswith(tuple(TORCH + part for part in ("_decomp", "_refs", "_prims"))):
        return WITHIN_FILES
    if path.startswith((TORCH, OPTREE, "<frozen ")):
        return LIBRARY_FILES
    return LIBRARY_FILES if path.startswith(STANDARD) and not path.startswith(PACKAGES) else USER_FILES


def user_site(frame: FrameType | None) -> Site | None:
    """The user's line behind ``frame``, whatever is between."""
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
    return None


def frames_to_user() -> int:
    """The ``stacklevel`` with which a warning, given by the caller of this function, names the user's line."""
    level, frame = 1, sys._getframe(1)
    while not is_users(frame.f_code.co_filename) and frame.f_back is not None:
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
    """The text of the line, where it can be read, and its beginning where it is long."""
    text = linecache.getline(site[0].co_filename, line_of(site)).strip()
    return text if len(text) <= 100 else f"{text[:97]}..."


def definition(function: Any) -> str | None:
    """``file:line`` of a Python function, or None."""
    code = getattr(function, "__code__", None)
    if code is None:
        inner = (
            getattr(function, "__wrapped__", None)
            or getattr(function, "func", None)
            or getattr(type(function), "forward", None)
        )
        return None if inner is None else definition(inner)
    return f"{code.co_filename}:{code.co_firstlineno}"


def made_where(wrapper: Any) -> str:
    """``at file:line`` of the user code that made a wrapper; without one, the transform called its function with it."""
    made_at = getattr(wrapper, "made_at", None)
    if made_at is not None:
        return f"at {place(made_at)}"
    where = definition(wrapper.interpreter.func)
    defined = f", which is defined at {where}" if where else ""
    return f"when the transform wrapped the arguments of its function{defined}"


def at_line() -> str:
    """Where the user's code is that called what raises an error, with the text of the line."""
    return at_site(user_site(sys._getframe(1)))


def by_pytorch() -> str:
    """The line of PyTorch's own Python code that did what is wrong, where the user's line called that code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        name = frame.f_code.co_filename
        if name.startswith(TORCH) and name in LIBRARY_FILES and not name.startswith(IN_BETWEEN):
            site = frame.f_code, frame.f_lasti
            where = f"torch/{name[len(TORCH) :].replace(os.sep, '/')}:{line_of(site)}, in {site[0].co_name}"
            return f" PyTorch's own code called it there, at {where}: `{source_line(site)}`."
        frame = frame.f_back
    return ""


def at_site(site: Site | None) -> str:
    if site is None:
        return ""
    text = source_line(site)
    return f" At {place(site)}: `{text}`." if text else f" At {place(site)}."
