"""The lessons of docs/learn/: they run, fail where they say so, and make a file that is a small functrans."""

from __future__ import annotations

import ast
import re
import traceback
from pathlib import Path
from typing import Any

import glossary_links
import lessons
import mini
import pytest
import torch

import functrans

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


# ---- the words

#: For readers who do not know the words yet.
INTRODUCTIONS = [ROOT / "docs" / "one_sitting.md", *sorted((ROOT / "docs" / "learn").glob("*.md"))]


@pytest.mark.parametrize("page", INTRODUCTIONS, ids=lambda page: page.stem)
def test_words_of_the_glossary_are_links_where_a_page_uses_them_first(page):
    unlinked = glossary_links.unlinked(page.read_text(encoding="utf-8"), glossary_links.words())
    assert [use.word for use in unlinked] == [], f"tests/checkers/glossary_links.py --fix {page}"


def test_the_glossary_has_the_words_of_the_lessons():
    words = {"perturbation confusion", "composite", "backward node", "tracked", "borrow", "operator", "tape index"}
    assert words <= set(glossary_links.words())


def test_the_check_of_words_notices(tmp_path):
    known = {"level": "here", "top level": "here", "tape": "there"}

    def found(text: str) -> list[str]:
        return [use.word for use in glossary_links.unlinked(text, known)]

    assert found("Each level has a tape.\n") == ["level", "tape"]
    assert found("Each [level](../glossary.md#here) has `a tape`, and levels.\n") == []
    assert found("# A level\n\n```python\nlevel\n```\n\nA leveller.\n") == []
    assert found("The top level, and later a [level](../glossary.md#here).\n") == ["top level"]
    assert found("Levels first, then a [level](../glossary.md).\n") == ["level"]
    fixed = glossary_links.with_links(tmp_path / "page.md", "Two levels, one tape.\n", known)
    assert found(fixed) == [] and "glossary.md#there" in fixed


# ---- the file


def test_the_file_is_what_the_lessons_make_of_it():
    assert Path(mini.__file__).read_text(encoding="utf-8") == lessons.complete_file(), "run docs/learn/lessons.py"
    assert lessons.complete_file().count("\n") < 250


matrix, rows, point, direction = torch.randn(3, 3), torch.randn(4, 3), torch.randn(3), torch.randn(3)
pairs = torch.randn(2, 4, 3)


def f(x: Any) -> Any:
    return (torch.tanh((matrix * x).sum(1)) * x.sin()).sum() - (x * x - x).cos().sum() * 0.5


def slope(library: Any) -> Any:
    return lambda f: lambda x: library.jvp(f, (x,), (torch.ones_like(x),))[1]


def confusion(derivative: Any) -> Any:
    return derivative(lambda x: x * derivative(lambda y: x + y)(torch.tensor(1.0)))(torch.tensor(1.0))


def issue_32576(derivative: Any) -> Any:
    return derivative(lambda x: derivative(lambda y: y * (x - y))(x))(torch.tensor(1.0))


COMPOSITIONS = {
    "vmap(grad)": lambda T: T.vmap(T.grad(f))(rows),
    "grad(vmap)": lambda T: T.grad(lambda rows: T.vmap(f)(rows).sum())(rows),
    "vmap(vmap(grad))": lambda T: T.vmap(T.vmap(T.grad(f)))(pairs),
    "vmap(grad(grad))": lambda T: T.vmap(T.grad(lambda x: (T.grad(f)(x) * direction).sum()))(rows),
    "vmap(jvp(grad))": lambda T: T.vmap(lambda x: T.jvp(T.grad(f), (x,), (direction,))[1])(rows),
    "grad(jvp)": lambda T: T.grad(lambda x: T.jvp(f, (x,), (direction,))[1])(point),
    "jvp(jvp)": lambda T: T.jvp(lambda x: T.jvp(f, (x,), (direction,))[1], (point,), (point,))[1],
    "grad(vmap(grad))": lambda T: T.grad(lambda rows: T.vmap(T.grad(f))(rows).tanh().sum())(rows),
    "a Hessian": lambda T: T.vmap(lambda row: T.jvp(T.grad(f), (point,), (row,))[1])(torch.eye(3)),
    "confusion of grad": lambda T: confusion(T.grad),
    "confusion of jvp": lambda T: confusion(slope(T)),
    "confusion of jvp in grad": lambda T: T.grad(lambda x: x * slope(T)(lambda y: x + y)(x))(torch.tensor(1.0)),
    "pytorch#32576 by grad": lambda T: issue_32576(T.grad),
    "pytorch#32576 by jvp": lambda T: issue_32576(slope(T)),
    "pytorch#32576 of a batch": lambda T: T.vmap(lambda x: T.grad(lambda x: T.grad(lambda y: y * (x - y))(x))(x))(
        point
    ),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_file_does_what_functrans_does(name):
    torch.testing.assert_close(COMPOSITIONS[name](mini), COMPOSITIONS[name](functrans))
    assert mini.TOP is None


def test_derivatives_are_not_confused():
    for derivative in (mini.grad, slope(mini), functrans.grad):
        assert confusion(derivative) == 1 and issue_32576(derivative) == -1


def test_random_numbers_of_the_file_differ_between_examples():
    assert len(set(mini.vmap(lambda x: x * 0 + torch.rand(()))(torch.ones(4)).tolist())) == 4


def test_the_file_refuses_what_it_cannot_do_and_leaves_its_stack_as_it_was():
    with pytest.raises(NotImplementedError, match="PyTorch's own autograd"):
        mini.grad(torch.sin)(torch.tensor(1.0, requires_grad=True))
    with pytest.raises(ValueError, match="expected a number"):
        mini.grad(torch.sin)(rows)
    with pytest.raises(KeyError):
        mini.vmap(mini.grad(torch.lgamma))(point)
    assert mini.TOP is None


# ---- the testers


def lesson_of(tmp_path: Path, **changes: str) -> Path:
    """A small lesson that is as it should be, but for the changes."""
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
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    page = tmp_path / "01_page.md"
    page.write_text(f"```python\n{text}```\n", encoding="utf-8")
    return page


def test_the_runner_of_lessons_notices(tmp_path):
    good = lesson_of(tmp_path)
    test_a_lesson_runs_with_its_solution(good)
    test_the_exercise_fails_as_it_says_until_it_is_solved(good)
    test_without_the_marked_line_the_check_fails_with_the_number_it_states(good)
    test_a_solution_fills_the_blanks_and_changes_nothing_else(good)

    for test, change in [
        (test_a_lesson_runs_with_its_solution, ("blank = 2", "blank = 3")),
        (test_the_exercise_fails_as_it_says_until_it_is_solved, ("blank: Ellipsis", "blank: 3")),
        (test_the_exercise_fails_as_it_says_until_it_is_solved, ("blank == 2", "blank")),
        (test_without_the_marked_line_the_check_fails_with_the_number_it_states, ("this: 1", "this: 7")),
        (test_without_the_marked_line_the_check_fails_with_the_number_it_states, ("number = 1", "number = 2")),
        (test_a_solution_fills_the_blanks_and_changes_nothing_else, ("blank = 2", "other = 2")),
    ]:
        with pytest.raises((AssertionError, Failure, pytest.fail.Exception)):
            test(lesson_of(tmp_path, change=change))


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
