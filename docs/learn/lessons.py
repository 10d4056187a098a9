"""The code of the lessons: the file that grows along them, and a lesson as a script with its blanks.

    python lessons.py        writes mini.py, the file as the last lesson leaves it
    python lessons.py 5      prints lesson 5 as a script, with its blanks and without the solution

What a Python block of a lesson is for stands in its first line:

    # mini.py                      it goes into the file; a definition replaces the one that has its name
    # mini.py, in place of A, B    the same, and A and B go
    # exercise                     has blanks, which are written ``...``
    # solution                     the same with the blanks filled in

and in comments at the end of a line:

    # without this                 take this line away, and the check below fails
    # without this: 2.0            a check, and what it says without the line
    # with the blank: 3            a check, and what it says as long as the blank is there
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

HERE = Path(__file__).parent
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r"# (mini\.py|exercise|solution)(?:, in place of (.*))?\n")
DEFINITION = (ast.FunctionDef, ast.ClassDef)


class Block(NamedTuple):
    """A Python block of a page: where its code begins, the code, what it is for, and the names that it replaces."""

    line: int
    code: str
    role: str | None
    replaces: tuple[str, ...]


def lessons() -> list[Path]:
    """The pages of the lessons, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.md"))


def blocks(page: Path) -> list[Block]:
    """The Python blocks of a page."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        role = ROLE.match(fence[1])
        replaced = tuple(role[2].split(", ")) if role and role[2] else ()
        found.append(Block(text.count("\n", 0, fence.start(1)) + 1, fence[1], role and role[1], replaced))
    return found


class Part(NamedTuple):
    """A statement of the file, with the comments in front of it."""

    name: str | None
    text: str
    kind: type


def parts(code: str) -> list[Part]:
    """The statements of a block; one that defines something has its name."""
    lines, end, found = code.splitlines(), 0, []
    for statement in ast.parse(code).body:
        text = "\n".join(lines[end : statement.end_lineno]).strip("\n")
        end = statement.end_lineno
        assigned = isinstance(statement, ast.Assign)
        name = ast.unparse(statement.targets[0]) if assigned else getattr(statement, "name", None)
        name = name or getattr(statement, "module", None)
        found.append(Part(name, text, type(statement)))
    return found


def joined(found: list[Part]) -> str:
    """The text of a file made of these statements, laid out as a formatter would."""
    text, before = "", None
    for part in found:
        if before is not None:
            apart = part.kind in DEFINITION or before.kind in DEFINITION
            together = part.kind is before.kind and "\n" not in part.text + before.text
            text += "\n\n\n" if apart else "\n" if together else "\n\n"
        text, before = text + part.text, part
    return text + "\n"


def file_after(lesson: int) -> str:
    """The text of mini.py as this lesson leaves it."""
    found: list[Part] = []
    for page in lessons()[:lesson]:
        for block in blocks(page):
            if block.role != "mini.py":
                continue
            found = [part for part in found if (part.name or "").partition("[")[0] not in block.replaces]
            for part in parts(block.code[block.code.index("\n") + 1 :]):
                same = [i for i, old in enumerate(found) if old.name == part.name and (part.name or old == part)]
                if same:
                    found[same[0]] = part
                else:
                    found.append(part)
    imports = sorted(part.text for part in found if part.kind in (ast.Import, ast.ImportFrom))
    ours = [text for text in imports if "torch" in text]
    groups = [[text for text in imports if text not in ours], sorted(ours, key=lambda text: text.startswith("from"))]
    rest = [part for part in found if part.text not in imports]
    return "\n\n".join([*("\n".join(group) for group in groups if group), joined(rest)])


def file_before(lesson: int) -> CodeType:
    """The code of mini.py as the lessons before this one leave it, to be run by ``exec``."""
    text, name = file_after(lesson - 1), f"mini.py before lesson {lesson}"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # for tracebacks
    return compile(text, name, "exec")


@contextlib.contextmanager
def walk(*kinds: type) -> Iterator[list[str]]:
    """The steps taken inside by these classes of interpreters: "2 Grad sin" for a call of ``process`` at level 2."""
    steps: list[str] = []
    originals = [(kind, kind.process) for kind in kinds]

    def noting(original: Callable[..., Any]) -> Callable[..., Any]:
        def process(self: Any, op: Any, args: Any, kwargs: Any) -> Any:
            steps.append(f"{self.level} {type(self).__name__} {name_of(op)}")
            return original(self, op, args, kwargs)

        return process

    try:
        for kind, original in originals:
            kind.process = noting(original)
        yield steps
    finally:
        for kind, original in originals:
            kind.process = original


def name_of(op: Any) -> str:
    """The name of an operator without its overload, or those of the operators that a program is made of."""
    if hasattr(op, "instructions"):
        return "+".join(name_of(instruction.op) for instruction in op.instructions)
    return str(op).split(".")[1]


def complete_file() -> str:
    """The text of mini.py as the last lesson leaves it."""
    docstring = '"""functrans in miniature, as the lessons of docs/learn/ make it. Written by lessons.py."""'
    return f"{docstring}\n\n{file_after(len(lessons()))}"


def script(lesson: int) -> str:
    """A lesson as a script: its Python, and its text as comments; without the solution."""
    text = re.sub(r"<details>.*?</details>\n", "", lessons()[lesson - 1].read_text(encoding="utf-8"), flags=re.DOTALL)
    found, end = [], 0
    for fence in FENCE.finditer(text):
        found += [commented(text[end : fence.start()]), fence[1]]
        end = fence.end()
    return "\n\n".join([*found, commented(text[end:])]) + "\n"


def commented(text: str) -> str:
    """Text as comments, links as the words that they are on."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).strip()
    return "\n".join(f"# {line}".rstrip() for line in words.splitlines())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(script(int(sys.argv[1])), end="")
    else:
        (HERE / "mini.py").write_text(complete_file(), encoding="utf-8")
