"""The documentation is executed, its links and notes lead somewhere, and its commands are those that CI runs."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any, NamedTuple

import glossary_links
import lessons
import pytest
import torch

from functrans.extend import Interpreter

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")])
SOURCES = sorted(path for folder in ("functrans", "tests", "benchmarks") for path in (ROOT / folder).glob("**/*.py"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NOTE = re.compile(r"NOTE \[([^\]\n]+)\]")
#: A note stands on a line of its own; anywhere else it is referred to.
NOTE_ITSELF = re.compile(r"^\s*(?:#+\s*)?NOTE \[([^\]\n]+)\]\s*$", re.MULTILINE)
# The pattern of a name, as this file and the README write it, is not a note.
PLACEHOLDERS = {"...", "{name}"}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, with the line on which the code begins."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in FENCE.finditer(text)]


def run_block(block: Block, namespace: dict[str, Any]) -> None:
    """Run a Python block: a doctest if it is written as one, else a program, which must assert something."""
    name = f"{block.page.name}:{block.line}"
    if ">>>" in block.code:
        test = doctest.DocTestParser().get_doctest(block.code, namespace, name, str(block.page), block.line - 1)
        output: list[str] = []
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        result = doctest.DocTestRunner(optionflags=flags).run(test, out=output.append, clear_globs=False)
        assert result.failed == 0, "".join(output)
        assert any(example.want or "assert" in example.source for example in test.examples), f"{name} asserts nothing"
        namespace.update(test.globs)
    else:
        assert re.search(r"^\s*(assert |with pytest\.raises)", block.code, re.MULTILINE), f"{name} asserts nothing"
        # line numbers of tracebacks are those of the page
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
        exec(code, namespace)  # noqa: S102 - our own pages


#: Those whose blocks run here; tests/test_learn.py runs the lessons, in more than one way.
EXECUTED = [page for page in PAGES if page not in lessons.lessons()]


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_of_a_page_runs_and_asserts(page):
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language in ("python", "py", "pycon"):
            run_block(block, namespace)
        else:
            assert block.language or ">>>" not in block.code, (
                f"{page}:{block.line}: a Python block without its language"
            )


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its headings, and those that are written."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {*map(glossary_links.slug, headings), *re.findall(r'<a id="([\w-]+)"></a>', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = CODE.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    for target in LINK.findall(prose):
        if not target.startswith(("http:", "https:", "#")):
            file, _, anchor = target.partition("#")
            path = page.parent / file
            assert path.exists(), f"{page.relative_to(ROOT)} links to {target}, which does not exist"
            assert not anchor or anchor in anchors(path), (
                f"{page.relative_to(ROOT)} links to {target}: no such anchor"
            )


def undefined_and_repeated_notes(texts: dict[str, str]) -> list[str]:
    """What is wrong with the notes of some files: a reference without its note, or a note written twice."""
    places: dict[str, list[str]] = {}
    for file, text in texts.items():
        for name in NOTE_ITSELF.findall(text):
            places.setdefault(name, []).append(file)
    wrong = [f"NOTE [{name}] is written more than once: {files}" for name, files in places.items() if len(files) > 1]
    for file, text in texts.items():
        for name in NOTE.findall(text):
            if name not in places and name not in PLACEHOLDERS:
                wrong.append(f"{file} refers to NOTE [{name}], which is nowhere")
    return wrong


def test_notes_are_written_once_and_references_resolve():
    here = Path(__file__).resolve()
    texts = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in [*SOURCES, *PAGES] if p != here}
    assert undefined_and_repeated_notes(texts) == []


def test_the_check_of_notes_notices():
    good = {"a.py": '"""\nNOTE [One]\ntext\n"""\n', "b.py": "x = 1  # see NOTE [One]\n"}
    assert undefined_and_repeated_notes(good) == []
    assert undefined_and_repeated_notes(good | {"c.py": "# NOTE [One]\n"}) != []
    assert undefined_and_repeated_notes(good | {"c.py": "# as in NOTE [Two]\n"}) != []


@pytest.mark.parametrize("code", ["x = 1\n", "assert False\n", ">>> 1 + 1\n3\n", ">>> x = 1\n"])
def test_the_runner_of_blocks_notices(code):
    with pytest.raises(AssertionError):
        run_block(Block(Path("page.md"), 1, "python", code), {})


#: What the stack notes on an interpreter for itself.
OF_THE_STACK = {"carries_autograd", "lowers_plainly", "on_base", "stands_for", "thread", "watcher", "within"}


def test_the_members_of_an_interpreter_are_told():
    page = (ROOT / "docs" / "interpreters.md").read_text()
    _, _, table = page.partition("## What an interpreter may say of itself\n")
    members = "".join(line.split(" | ")[0] for line in table.splitlines() if line.startswith("| "))
    told = set(re.findall(r"`(\w+)", members)) | {"name"}
    there = {name for name in vars(Interpreter) if not name.startswith("_")}
    assert there - OF_THE_STACK - told == set() and told - there == set()


def test_ci_runs_the_command_of_the_readme():
    commands = [block.code.strip() for block in blocks(ROOT / "README.md") if block.language == "bash"]
    assert len(commands) == 2 and all("\n" not in command for command in commands)
    tour, tests = commands
    assert tour.endswith("functrans tour") and "pytest" in tests
    assert tests in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
