"""The lessons of docs/learn/ run, fail where they say that they fail, and lead to places that are there."""

from __future__ import annotations

import ast
import re
import traceback
from pathlib import Path
from typing import Any

import lessons
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LESSONS = lessons.lessons()
PARTS = ["Run", "Break it", "Repair", "Exercise", "Now read"]
MARK = "# without this"
STATED = re.compile(r"# (without this|with the blank): (.+)$")
each_lesson = pytest.mark.parametrize("page", LESSONS, ids=lambda page: page.stem)


class Failure(Exception):
    """What a lesson raised: the line of the page where it did, and the text."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(line, text)
        self.line, self.text = line, text


def run(page: Path, *, solved: bool = True, mark: str = "") -> None:
    """Run the blocks of a lesson: with its solution or without, and without the line that ends with ``mark``."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": page.stem}
    try:
        for block in lessons.blocks(page):
            if block.role == "solution" and not solved:
                continue
            code = "\n".join("" if mark and line.endswith(mark) else line for line in block.code.splitlines())
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), namespace)  # noqa: S102 - our own pages
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)]
        text = str(error) if isinstance(error, AssertionError) else type(error).__name__
        raise Failure(frames[0].lineno or 0, text) from error


def stated(page: Path, what: str) -> tuple[int, str]:
    """The line of the page that says what it fails with, and what that is; there is one."""
    found = [
        (i, m) for i, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1) if (m := STATED.search(line))
    ]
    ((line, text),) = [(i, m[2]) for i, m in found if m[1] == what]
    return line, text


def marked(page: Path) -> list[str]:
    """The lines of a lesson without which its check fails."""
    return [line for block in lessons.blocks(page) for line in block.code.splitlines() if line.endswith(MARK)]


def test_there_are_sixteen_lessons_in_order():
    assert [page.name[:3] for page in LESSONS] == [f"{i:02}_" for i in range(1, 17)]


@each_lesson
def test_a_lesson_has_its_parts_and_is_short(page):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if heading in PARTS] == PARTS
    assert text.startswith(f"# {int(page.name[:2])}. ") and "\n**Idea.** " in text
    assert text.count("\n") < 250
    assert len(marked(page)) == 1 and marked(page)[0] in text[text.index("## Repair") : text.index("## Exercise")]


@each_lesson
def test_a_lesson_runs_with_its_solution(page):
    run(page)


@each_lesson
def test_the_exercise_fails_as_it_says_until_it_is_solved(page):
    with pytest.raises(Failure) as failure:
        run(page, solved=False)
    assert (failure.value.line, failure.value.text) == stated(page, "with the blank")


@each_lesson
def test_without_the_marked_line_the_check_fails_with_the_number_it_states(page):
    with pytest.raises(Failure) as failure:
        run(page, mark=MARK)
    assert (failure.value.line, failure.value.text) == stated(page, "without this")


@each_lesson
def test_a_solution_fills_the_blanks_and_changes_nothing_else(page):
    (exercise,) = [block.code for block in lessons.blocks(page) if block.role == "exercise"]
    (solution,) = [block.code for block in lessons.blocks(page) if block.role == "solution"]
    assert "..." in exercise
    parts = re.split(r"\.\.\.", exercise.partition("\n")[2])
    assert re.fullmatch(".+".join(re.escape(part) for part in parts), solution.partition("\n")[2], re.DOTALL)


def defined(path: Path) -> set[str]:
    """The functions, classes and methods of a module, by their qualified names."""
    names: set[str] = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + child.name)
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return names


def wrong_places(text: str) -> list[str]:
    """What is wrong with places named as "`file`: `symbol`, `symbol`": files and symbols that there are not."""
    wrong = []
    for file, symbols in re.findall(r"`(\w+/[\w/]+\.(?:py|md))`((?:(?::|,) `[\w.]+`)*)", text):
        if not (ROOT / file).exists():
            wrong.append(file)
        elif symbols:
            names = defined(ROOT / file)
            wrong += [f"{file}: {symbol}" for symbol in re.findall(r"`([\w.]+)`", symbols) if symbol not in names]
    return wrong


@each_lesson
def test_what_to_read_now_is_there(page):
    reading = unwrapped(page.read_text(encoding="utf-8").partition("## Now read")[2])
    items = re.findall(r"^- (.*)$", reading, re.MULTILINE)
    assert items and all(re.match(r"`(functrans|tests|docs)/[\w/]+\.(py|md)`[.:]", item) for item in items)
    assert any("functrans/" in item or "docs/" in item for item in items)
    assert wrong_places(reading) == []


def unwrapped(text: str) -> str:
    """The text with each item of a list on one line."""
    return re.sub(r"\n +", " ", text)


def quoted_lines(text: str) -> list[tuple[str, str]]:
    """The lines of code that a reading asks to look for: (file, line)."""
    return re.findall(r"^- `([\w/]+\.py)`.*[Tt]he line (?:with )?`([^`]+)`", text, re.MULTILINE)


def test_lines_to_look_for_are_there():
    found = [place for page in LESSONS for place in quoted_lines(unwrapped(page.read_text(encoding="utf-8")))]
    assert len(found) >= 3
    assert [place for place in found if place[1] not in (ROOT / place[0]).read_text(encoding="utf-8")] == []


def test_the_map_of_functorch_and_jax_leads_to_places_that_are_there():
    text = (ROOT / "docs" / "learn" / "map.md").read_text(encoding="utf-8")
    assert text.count(".py`: `") > 20 and wrong_places(text) == []


# ---- the testers


def lesson(folder: Path, old: str = "", new: str = "") -> Path:
    """A small lesson that is as it should be, but for ``new`` in the place of ``old``."""
    text = """\
# exercise
blank = ...
```

```python
# solution
blank = 2
```

```python
assert blank == 2, blank  # with the blank: Ellipsis
number = 1
number = 2  # without this
```

```python
assert number == 2, number  # without this: 1
"""
    assert old in text
    page = folder / "01_page.md"
    page.write_text(f"```python\n{text.replace(old, new)}```\n", encoding="utf-8")
    return page


def test_the_runner_of_lessons_notices(tmp_path):
    good = lesson(tmp_path)
    test_a_lesson_runs_with_its_solution(good)
    test_the_exercise_fails_as_it_says_until_it_is_solved(good)
    test_without_the_marked_line_the_check_fails_with_the_number_it_states(good)
    test_a_solution_fills_the_blanks_and_changes_nothing_else(good)

    for test, old, new in [
        (test_a_lesson_runs_with_its_solution, "blank = 2", "blank = 3"),
        (test_the_exercise_fails_as_it_says_until_it_is_solved, "blank: Ellipsis", "blank: 3"),
        (test_the_exercise_fails_as_it_says_until_it_is_solved, "blank == 2", "blank"),
        (test_without_the_marked_line_the_check_fails_with_the_number_it_states, "this: 1", "this: 7"),
        (test_without_the_marked_line_the_check_fails_with_the_number_it_states, "number = 1", "number = 2"),
        (test_a_solution_fills_the_blanks_and_changes_nothing_else, "blank = 2", "other = 2"),
    ]:
        with pytest.raises((AssertionError, Failure, pytest.fail.Exception)):
            test(lesson(tmp_path, old, new))


def test_the_check_of_places_notices():
    good = "- `functrans/core/dispatch.py`: `dispatch`, `unwrap`. Text."
    assert wrong_places(good) == []
    assert wrong_places(good.replace("unwrap", "unwrapped")) == ["functrans/core/dispatch.py: unwrapped"]
    assert wrong_places(good.replace("core/dispatch", "core/nowhere")) == ["functrans/core/nowhere.py"]
    assert quoted_lines("- `a/b.py`: `c`. The line with `x > y`.") == [("a/b.py", "x > y")]


def test_a_lesson_can_be_had_as_a_script_with_its_blanks():
    text = lessons.script(5)
    assert "by_hand = ..." in text and "by_hand = 6" not in text
    with pytest.raises(AssertionError, match="Ellipsis"):
        exec(compile(text, "lesson 5", "exec"), {})  # noqa: S102 - our own page
